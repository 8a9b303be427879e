"""Stand-ins for the parts of ComfyUI that the nodes use: schemas, folders, progress, Cancel, and patching."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image


class InterruptError(Exception):
    """What ComfyUI raises in a node that was cancelled."""


class Socket:
    """An input or output: its type, id and options."""

    def __init__(self, io_type: str, id: str, **options: Any) -> None:
        self.io_type, self.id, self.options = io_type, id, options


class Kind:
    def __init__(self, io_type: str) -> None:
        self.io_type = io_type

    def Input(self, id: str, **options: Any) -> Socket:  # noqa: N802 - ComfyUI's name
        return Socket(self.io_type, id, **options)

    Output = Input


class Comfy:
    """A ComfyUI of its own folder, with what the nodes did to it."""

    interrupted = InterruptError

    def __init__(self, folder: Path) -> None:
        self.loras, self.checkpoints = folder / "models" / "loras", folder / "models" / "checkpoints"
        for place in (self.loras, self.checkpoints):
            place.mkdir(parents=True)
        self.progress: list[tuple[int, int]] = []
        self.previews, self.is_cancelled, self.unloaded = 0, False, 0

    def files(self, kind: str) -> list[str]:
        return sorted(file.name for file in getattr(self, kind).iterdir())

    def path(self, kind: str, name: str) -> str:
        file = getattr(self, kind) / name
        if not file.is_file():
            raise FileNotFoundError(f"Model in folder '{kind}' with filename '{name}' not found.")
        return str(file)

    def cancel_check(self) -> None:
        if self.is_cancelled:
            self.is_cancelled = False
            raise InterruptError

    def modules(self) -> dict[str, ModuleType]:
        comfy = self

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                comfy.progress.append((value, total or self.total))
                comfy.previews += preview is not None

        def unload() -> None:
            comfy.unloaded += 1

        def load_lora(model, clip, tensors, strength_model, strength_clip):
            patched = SimpleNamespace(tensors=tensors, strength=strength_model)
            return (None if model is None else patched), (None if clip is None else patched)

        def load_file(path, safe_load=False):
            from safetensors.torch import load_file

            assert safe_load
            return load_file(path)

        kinds = {name: Kind(name.upper()) for name in ("Image", "Model", "Clip", "String", "Int", "Float", "Boolean")}
        io = SimpleNamespace(
            ComfyNode=object, Combo=Kind("COMBO"), Schema=lambda **fields: SimpleNamespace(**fields),
            NodeOutput=lambda *values: SimpleNamespace(result=values), **kinds,
        )  # fmt: skip
        return {
            "comfy": _module(),
            "comfy.sd": _module(load_lora_for_models=load_lora),
            "comfy.utils": _module(ProgressBar=ProgressBar, load_torch_file=load_file),
            "comfy.model_management": _module(
                unload_all_models=unload, soft_empty_cache=lambda: None,
                processing_interrupted=lambda: comfy.is_cancelled,
                throw_exception_if_processing_interrupted=self.cancel_check,
            ),
            "comfy_api": _module(),
            "comfy_api.latest": _module(io=io, ComfyExtension=object),
            "folder_paths": _module(
                get_filename_list=self.files, get_full_path_or_raise=self.path,
                get_folder_paths=lambda kind: [str(getattr(self, kind))],
            ),
        }  # fmt: skip


def _module(**attributes: Any) -> ModuleType:
    module = ModuleType("stand-in")
    vars(module).update(attributes)
    return module


def install(comfy: Comfy, monkeypatch) -> None:
    """Put the stand-ins where imports find them."""
    modules = comfy.modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    comfy = Comfy(tmp_path)
    install(comfy, monkeypatch)
    return comfy


def images(*pictures) -> torch.Tensor:
    """ComfyUI's pictures ``(batch, height, width, 3)``, made as ComfyUI does while it runs a workflow."""
    import numpy as np

    with torch.inference_mode():
        return torch.stack([torch.from_numpy(np.array(one.convert("RGB"), dtype=np.float32)) / 255 for one in pictures])


@pytest.fixture
def photos(portrait):
    return images(Image.open(portrait))
