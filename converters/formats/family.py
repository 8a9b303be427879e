"""Which base models an adapter is for: by its layers, or by what its metadata says."""

import re
from collections.abc import Iterable, Mapping

from converters.architectures import CROSS_WIDTHS
from converters.key_maps import is_sgm_name
from converters.metadata import MODEL_FAMILIES

_CROSS_KEY = re.compile(r"attn2[._](processor[._])?to_k(_lora)?$")


def find_base(layers: Iterable[tuple[str, str, int]], metadata: Mapping[str, str]) -> str:
    """Return the family, another model's own name, or "" where nothing tells.

    Args:
        layers: ``(name, component, in_features)`` of each layer, named as in the file.
    """
    layers = list(layers)
    crossing = (width for name, component, width in layers if component == "unet" and _CROSS_KEY.search(name))
    family = CROSS_WIDTHS.get(next(crossing, 0), "")
    if family:
        return family
    if any(component == "text_encoder_2" or is_sgm_name(name) for name, component, _ in layers):
        return "sdxl"
    stated = stated_base(metadata)
    if stated:
        return stated
    # SDXL's first text encoder is as wide as SD1's only one.
    if any(name.startswith("lora_te1_") for name, _, _ in layers):
        return "sdxl"
    widths = {width for name, component, width in layers if component == "text_encoder" and "q_proj" in name}
    return CROSS_WIDTHS.get(widths.pop(), "") if len(widths) == 1 else ""


def stated_base(metadata: Mapping[str, str]) -> str:
    """Return the family that the metadata names, another model's own name, or ""."""
    version, architecture = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    if version.startswith("sdxl_") or architecture.startswith("stable-diffusion-xl"):
        return "sdxl"
    if version.startswith("sd_v2") or metadata.get("ss_v2") == "True" or architecture.startswith("stable-diffusion-v2"):
        return "sd2"
    if version.startswith("sd_v1") or architecture.startswith("stable-diffusion-v1"):
        return "sd1"
    return architecture.partition("/")[0] or version


def shown_base(base: str) -> str:
    """Return a family as A1111 calls it; another model's name as it is."""
    return MODEL_FAMILIES[base].a1111_version if base in MODEL_FAMILIES else base
