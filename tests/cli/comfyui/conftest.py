"""Stand-ins for the parts of ComfyUI that the nodes use: schemas, folders, progress, Cancel, and patching."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from cli.comfyui.command import PACK


class InterruptError(Exception):
    """What ComfyUI raises in a node that was cancelled."""


class Socket:
    """An input or output: its type, id and options."""

    def __init__(self, io_type: str, id: str, **options: Any) -> None:
        self.io_type, self.id, self.options = io_type, id, options


class Kind:
    """A type of inputs and outputs; an input takes no option that ComfyUI's does not."""

    def __init__(self, io_type: str, *options: str) -> None:
        self.io_type, self.options = io_type, {"optional", "tooltip", *options}

    def Input(self, id: str, **options: Any) -> Socket:  # noqa: N802 - ComfyUI's name
        assert set(options) <= self.options, f"{id}: {options}"
        return Socket(self.io_type, id, **options)

    def Output(self, id: str, display_name: str, tooltip: str = "", is_output_list: bool = False) -> Socket:  # noqa: N802
        return Socket(self.io_type, id, display_name=display_name, is_output_list=is_output_list)


class Patcher:
    """A MODEL, or the patcher of a CLIP: a model whose layers have names in LoRA files, and the patches on each."""

    def __init__(self, model: torch.nn.Module, prefix: str, patches: Any = ()) -> None:
        self.model, self.prefix = model, prefix
        self.patches = {name: list(several) for name, several in dict(patches).items()}

    def key_map(self) -> dict[str, str]:
        return {self.prefix + name.removesuffix(".weight").replace(".", "_"): name for name in self.model.state_dict()}

    def with_patches(self, tensors: dict, strength: float) -> "Patcher":
        patched = Patcher(self.model, self.prefix, self.patches)
        for layer in {name.partition(".")[0] for name in tensors} & set(self.key_map()):
            factors = {end: tensors[f"{layer}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha")}
            patched.patches.setdefault(layer, []).append((strength, factors))
        return patched


class Comfy:
    """A ComfyUI of its own folder, with what the nodes did to it."""

    interrupted = InterruptError

    def __init__(self, folder: Path) -> None:
        self.loras, self.checkpoints = folder / "models" / "loras", folder / "models" / "checkpoints"
        for place in (self.loras, self.checkpoints):
            place.mkdir(parents=True)
        self.progress: list[tuple[int, int]] = []
        self.previews, self.is_cancelled, self.unloaded = 0, False, 0

    def load_checkpoint(self) -> tuple[Patcher, SimpleNamespace]:
        """A MODEL and a CLIP: those of the miniature."""
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        from testbed import miniature_path

        encoder = CLIPTextModel.from_pretrained(miniature_path() / "text_encoder")
        model = Patcher(UNet2DConditionModel.from_pretrained(miniature_path() / "unet"), "lora_unet_")
        return model, SimpleNamespace(cond_stage_model=encoder, patcher=Patcher(encoder, "lora_te_"))

    def files(self, kind: str) -> list[str]:
        return sorted(file.name for file in getattr(self, kind).iterdir())

    def path(self, kind: str, name: str) -> str | None:
        file = getattr(self, kind) / name
        return str(file) if file.is_file() else None

    def path_or_raise(self, kind: str, name: str) -> str:
        path = self.path(kind, name)
        if path is None:
            raise FileNotFoundError(f"Model in folder '{kind}' with filename '{name}' not found.")
        return path

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
                comfy.cancel_check()
                comfy.progress.append((value, total or self.total))
                comfy.previews += preview is not None

        def unload() -> None:
            comfy.unloaded += 1

        def load_lora(model, clip, tensors, strength_model, strength_clip):
            return (
                None if model is None else model.with_patches(tensors, strength_model),
                None
                if clip is None
                else SimpleNamespace(
                    cond_stage_model=clip.cond_stage_model, patcher=clip.patcher.with_patches(tensors, strength_clip)
                ),
            )

        def load_file(path, safe_load=False):
            from safetensors.torch import load_file

            assert safe_load
            return load_file(path)

        number = ("default", "min", "max", "step", "display_mode", "control_after_generate")
        options = {"Image": (), "Model": (), "Clip": (), "String": ("default", "multiline", "placeholder"),
                   "Int": number, "Float": (*number, "round"), "Boolean": ("default", "label_on", "label_off"),
                   "Combo": ("options", "default", "upload", "remote")}  # fmt: skip
        kinds = {name: Kind(name.upper(), *given) for name, given in options.items()}
        io = SimpleNamespace(
            ComfyNode=object, Schema=lambda **fields: SimpleNamespace(**fields),
            NodeOutput=lambda *values: SimpleNamespace(result=values), **kinds,
        )  # fmt: skip
        return {
            "comfy": _module(),
            "comfy.lora": _module(
                model_lora_keys_unet=lambda unet, key_map: key_map | Patcher(unet, "lora_unet_").key_map(),
                model_lora_keys_clip=lambda encoder, key_map: key_map | Patcher(encoder, "lora_te_").key_map(),
            ),
            "comfy.sd": _module(load_lora_for_models=load_lora),
            "comfy.utils": _module(ProgressBar=ProgressBar, load_torch_file=load_file),
            "comfy.model_management": _module(
                unload_all_models=unload, soft_empty_cache=lambda: None, cpu_mode=lambda: True,
            ),
            "comfy_api": _module(),
            "comfy_api.latest": _module(io=io, ComfyExtension=object),
            "folder_paths": _module(
                get_filename_list=self.files, get_full_path=self.path, get_full_path_or_raise=self.path_or_raise,
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


@pytest.fixture
def nodes(comfy, monkeypatch):
    """Name -> node, loaded as ComfyUI loads a custom node: by the path of its folder."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lidb_custom_node"]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.spec_from_file_location(
        "lidb_custom_node", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "lidb_custom_node", module)
    spec.loader.exec_module(module)

    async def listed():
        return await (await module.comfy_entrypoint()).get_node_list()

    found = {node.define_schema().node_id: node for node in asyncio.run(listed())}
    yield found
    for name in [name for name in sys.modules if name.startswith("lidb_custom_node")]:
        sys.modules.pop(name)


def images(*pictures) -> torch.Tensor:
    """ComfyUI's pictures ``(batch, height, width, 3)``, made as ComfyUI does while it runs a workflow."""
    import numpy as np

    with torch.inference_mode():
        return torch.stack([torch.from_numpy(np.array(one.convert("RGB"), dtype=np.float32)) / 255 for one in pictures])


@pytest.fixture
def photos(portrait):
    return images(Image.open(portrait))
