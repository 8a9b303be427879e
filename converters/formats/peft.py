"""A LoRA as PEFT saves it: a folder with a config and the tensors, one for each model of the pipeline."""

from collections import Counter
from functools import lru_cache

import torch

from converters.formats.diffusers import path_tensors
from converters.layer import LoraLayer
from converters.lora import Lora
from lidb_peft.families import FAMILIES
from lidb_peft.files import Tensors

_CLIP = "CLIPTextModel"  # the one with a projection still has this level
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def peft_folders(lora: Lora) -> dict[str, tuple[dict[str, object], Tensors]]:
    """Return component -> config and tensors, by PEFT's names, for ``PeftModel.from_pretrained``.

    Differing ranks and alphas go into PEFT's patterns. Text encoders are named as in the installed transformers.

    Raises:
        ValueError: some layers of a component are DoRA and some are not.
    """
    components: dict[str, dict[str, LoraLayer]] = {}
    for name, layer in lora.layers.items():
        component, _, path = name.partition(".")
        components.setdefault(component, {})[path] = layer
    check_magnitudes(lora)
    base = lora.metadata.get("ss_sd_model_name") or None
    return {name: _peft_folder(name, layers, base) for name, layers in components.items()}


def check_magnitudes(lora: Lora) -> None:
    """Raise ValueError if some layers of a component are DoRA and some are not, which PEFT's config cannot express.

    Also if one is a kind of DoRA that PEFT lacks.
    """
    path_tensors({name: layer for name, layer in lora.layers.items() if layer.has_input_magnitude}, "diffusers", str)
    for component in dict.fromkeys(name.partition(".")[0] for name in lora.layers):
        own = {name: layer.magnitude is not None for name, layer in lora.layers.items()
               if name.startswith(f"{component}.")}  # fmt: skip
        if len(set(own.values())) > 1:
            dora, plain = (min(name for name, found in own.items() if found == kind) for kind in (True, False))
            raise ValueError(
                f"of the {component}, {dora.partition('.')[2]} is DoRA and {plain.partition('.')[2]} is not, which one"
                " PEFT config cannot hold; convert to kohya or diffusers"
            )


def _peft_folder(component: str, layers: dict[str, LoraLayer], base: str | None) -> tuple[dict[str, object], Tensors]:
    is_dora = any(layer.magnitude is not None for layer in layers.values())
    layers = {_module_path(component, path): layer for path, layer in layers.items()}
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in
                   ((layer.rank for layer in layers.values()), (layer.alpha for layer in layers.values())))  # fmt: skip
    config: dict[str, object] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {path: layer.rank for path, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {path: _plain(layer.alpha) for path, layer in layers.items() if layer.alpha != alpha},
        "target_modules": sorted(layers),
        "base_model_name_or_path": base,
        "inference_mode": True,
        **({"use_dora": True} if is_dora else {}),  # older versions refuse unknown settings
    }
    return config, path_tensors(layers, "diffusers", lambda path: f"base_model.model.{path}")


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _module_path(component: str, path: str) -> str:
    found = [part for family in FAMILIES.values() for part in family.components if part.name == component]
    is_flat = any(_CLIP in part.classes for part in found) and _clip_is_flat()
    return path.removeprefix(found[0].level) if is_flat else path


@lru_cache(maxsize=1)
def _clip_is_flat() -> bool:
    """Whether the installed transformers dropped ``text_model.`` from the names of ``CLIPTextModel``'s modules."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1))
    return not hasattr(model, "text_model")
