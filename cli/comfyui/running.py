"""What the nodes have to do with ComfyUI: its pictures, folders, progress bar, memory and Cancel."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image

MINIATURE = "testbed"
_PREVIEW_PX = 512


def base_choices() -> list[str]:
    """ComfyUI's own checkpoints, and the miniature."""
    return [*folder_paths.get_filename_list("checkpoints"), MINIATURE]


def base_source(checkpoint: str, other: str = "") -> str:
    """What to load: the checkpoint's file, or the id or folder that is typed in its place."""
    if other.strip() or checkpoint == MINIATURE:
        return other.strip() or MINIATURE
    return folder_paths.get_full_path_or_raise("checkpoints", checkpoint)


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Pictures of ComfyUI's ``(batch, height, width, 3)`` in [0, 1]."""
    pixels = (images[..., :3].detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(one) for one in pixels]


def to_images(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """ComfyUI's ``(batch, height, width, 3)`` in [0, 1] of pictures of one size."""
    pixels = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in pictures])
    return torch.from_numpy(pixels / 255)


def free_lora(name: str) -> tuple[Path, str]:
    """A file in ComfyUI's folder of LoRAs that is not there yet, and what ComfyUI will call it."""
    from lidb_peft.outputs import NO_FILE_NAME

    folder, stem = Path(folder_paths.get_folder_paths("loras")[0]), NO_FILE_NAME.sub("-", name).strip(". ") or "me"
    folder.mkdir(parents=True, exist_ok=True)
    number, file = 1, folder / f"{stem}.safetensors"
    while file.exists():
        number += 1
        file = folder / f"{stem}-{number}.safetensors"
    return file, file.name


def lora_choices() -> list[str]:
    return folder_paths.get_filename_list("loras")


def lora_file(name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise("loras", name))


def apply_lora(model: Any, clip: Any, file: Path, weight: float) -> tuple[Any, Any]:
    """ComfyUI's MODEL and CLIP with a LoRA on them; what is not connected stays None."""
    if model is None and clip is None:
        return None, None
    tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
    return comfy.sd.load_lora_for_models(model, clip, tensors, weight, weight)


@contextmanager
def own_memory() -> Iterator[None]:
    """ComfyUI's models leave the card while ours is on it; gradients may be taken, which ComfyUI turns off."""
    comfy.model_management.unload_all_models()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        comfy.model_management.soft_empty_cache()


def is_cancelled() -> bool:
    return comfy.model_management.processing_interrupted()


def check_cancelled() -> None:
    """Raise what ComfyUI expects of a node that was cancelled."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class Progress:
    """ComfyUI's progress bar of a node, with a picture where there is one."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, done: int, total: int | None, picture: Image.Image | None = None) -> None:
        if not total:
            return
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
        shown = None if picture is None else ("JPEG", picture.convert("RGB"), _PREVIEW_PX)
        self._bar.update_absolute(done, total, shown)

    def of_stage(self, stage: str, done: int, total: int | None) -> None:
        """A callback for the API's ``progress``."""
        self.show(done, total)

    def or_cancel(self) -> Callable[[int, int], None]:
        """A callback that also ends what does not ask whether it is cancelled."""

        def report(done: int, total: int) -> None:
            check_cancelled()
            self.show(done, total)

        return report
