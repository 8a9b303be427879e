"""What the nodes have to do with ComfyUI: its pictures, folders, progress bar, memory and Cancel."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from hypernet.base_models.config import BaseConfig

MINIATURE = "testbed"
_PREVIEW_PX = 512
_CONNECT = "connect those of the checkpoint that it was made for"
# How the nodes call what the command line calls an option.
_WORDS = {"pass --no-crop": "turn find_face off", "--base": "other_base"}


def base_choices() -> list[str]:
    """ComfyUI's own checkpoints, and the miniature."""
    return [*folder_paths.get_filename_list("checkpoints"), MINIATURE]


def chosen_base(name: str) -> "BaseConfig":
    """One of ComfyUI's checkpoints by its name there, or an id or a folder; on the CPU if ComfyUI is."""
    from hypernet.base_models.config import BaseConfig

    source = folder_paths.get_full_path("checkpoints", name) or name
    return BaseConfig(source, device="cpu" if comfy.model_management.cpu_mode() else "auto")


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Pictures of ComfyUI's ``(batch, height, width, 3)`` in [0, 1]."""
    pixels = (images[..., :3].detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(one) for one in pixels]


def to_images(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """ComfyUI's ``(batch, height, width, 3)`` in [0, 1] of pictures of one size."""
    pixels = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in pictures])
    return torch.from_numpy(pixels / 255)


def free_lora(name: str) -> Path:
    """A file in ComfyUI's folder of LoRAs that is not there yet."""
    from lidb_peft.outputs import NO_FILE_NAME

    folder, stem = Path(folder_paths.get_folder_paths("loras")[0]), NO_FILE_NAME.sub("-", name).strip(". ") or "me"
    folder.mkdir(parents=True, exist_ok=True)
    number, file = 1, folder / f"{stem}.safetensors"
    while file.exists():
        number += 1
        file = folder / f"{stem}-{number}.safetensors"
    return file


def lora_choices() -> list[str]:
    return folder_paths.get_filename_list("loras")


def lora_file(name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise("loras", name))


def apply_lora(model: Any, clip: Any, file: Path, weight: float) -> tuple[Any, Any]:
    """ComfyUI's MODEL and CLIP with a kohya LoRA on them; what is not connected stays None.

    Raises:
        ValueError: they are of another base than the LoRA, of which ComfyUI only tells its log.
    """
    if model is None and clip is None:
        return None, None
    tensors = comfy.utils.load_torch_file(str(file), safe_load=True)
    _check_fits(tensors, model, clip)
    return comfy.sd.load_lora_for_models(model, clip, tensors, weight, weight)


def _check_fits(tensors: Mapping[str, torch.Tensor], model: Any, clip: Any) -> None:
    key_map: dict[str, Any] = {}
    weights: dict[str, torch.Tensor] = {}
    if model is not None:
        key_map = comfy.lora.model_lora_keys_unet(model.model, key_map)
        weights |= model.model.state_dict()
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
        weights |= clip.cond_stage_model.state_dict()
    layers = {name.partition(".")[0] for name in tensors} & set(key_map)
    if not layers:
        raise ValueError(f"no layer of the LoRA is in the connected model or clip; {_CONNECT}")
    for layer in layers:
        down, up = (tensors.get(f"{layer}.lora_{side}.weight") for side in ("down", "up"))
        weight = weights.get(key_map[layer])  # None of a part of a weight
        if down is not None and weight is not None and len(up) * down[0].numel() != weight.numel():
            raise ValueError(f"the LoRA's layer {layer} is of another size in the connected model or clip; {_CONNECT}")


@contextmanager
def own_memory() -> Iterator[None]:
    """ComfyUI's models leave the card while ours is on it; gradients may be taken, which ComfyUI turns off."""
    comfy.model_management.unload_all_models()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        comfy.model_management.soft_empty_cache()


@contextmanager
def words_of_nodes() -> Iterator[None]:
    """Errors name a node's inputs where they would name options of the command line."""
    from cli.main import as_sentence

    try:
        yield
    except (OSError, ValueError) as error:
        text = as_sentence(error)
        for option, words in _WORDS.items():
            text = text.replace(option, words)
        raise ValueError(text) from error


class Progress:
    """ComfyUI's progress bar of a node, with a picture where there is one.

    ComfyUI raises its own exception in it when Cancel was pressed.
    """

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, done: int, total: int | None, picture: Image.Image | None = None) -> None:
        if not total:
            return
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
        shown = None if picture is None else ("JPEG", picture.convert("RGB"), _PREVIEW_PX)
        self._bar.update_absolute(done, total, shown)
