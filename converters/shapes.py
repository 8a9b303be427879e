"""Which layers a family has, what they are, and giving a LoRA's factors the shapes of those.

A 1x1 convolution and a linear layer do the same, so trainers write one for the other; readers that fill a module's
weights (diffusers, kohya) fail on the wrong number of dimensions.
"""

import re
from dataclasses import replace
from functools import lru_cache

from converters.key_maps import is_module, to_kohya_name
from converters.layer import LoraLayer
from converters.lora import Lora
from lidb_peft.families import FAMILIES, Family

# A path up to the number of an attention, or of one of the blocks that are stacked.
_BLOCK = re.compile(r"(.*(?:attentions|transformer_blocks|encoder\.layers)\.\d+)\.")


@lru_cache(maxsize=50_000)
def has_layer(layer: str, family: str) -> bool:
    """Whether the published models of a family have a layer, given by our name."""
    name, _, path = layer.partition(".")
    component = FAMILIES[family].component(name)
    if component is None or not is_module(path, component):
        return False
    block = _BLOCK.match(path)
    if block:
        return block[1] in _blocks(family, name)
    return not component.originals or any(
        path == ours or path.startswith(f"{ours}.") for ours, _ in component.originals
    )


@lru_cache
def _blocks(family: str, component: str) -> frozenset[str]:
    """All starts of the paths of a component's attention projections."""
    found = FAMILIES[family].component(component)
    words = [path.split(".") for path in found.shapes] if found else []
    return frozenset(".".join(path[:end]) for path in words for end in range(len(path)))


def kernel_side(layer: str, family: str = "", for_kohya: bool = False) -> int | None:
    """Return the side of a convolution's kernel, 0 for a linear layer, None where the families differ.

    Args:
        layer: our name.
        family: one of ``FAMILIES``; "" asks all that have such a component.
        for_kohya: as kohya's sd-scripts has the layer, and not diffusers.
    """
    families = (FAMILIES[family],) if family else FAMILIES.values()
    sides = {_kernel_side(layer, found, for_kohya) for found in families} - {None}
    return sides.pop() if len(sides) == 1 else None


def _kernel_side(layer: str, family: Family, for_kohya: bool) -> int | None:
    name, _, path = layer.partition(".")
    component = family.component(name)
    if component is None:
        return None
    last = path.rpartition(".")[2]
    return component.convolutions.get(last, int(for_kohya and last in component.kohya_convolutions))


def fit_shapes(lora: Lora, for_kohya: bool = False) -> Lora:
    """Return a LoRA whose factors have as many dimensions as its family's layers; every number stays as it is.

    Raises:
        ValueError: the family has no such layer, or one has a kernel and is none of the family's convolutions.
    """
    for name in lora.layers if lora.family else ():
        to_kohya_name(name, lora.family)
        if not has_layer(name, lora.family):
            raise ValueError(f"layer {name} is none of {FAMILIES[lora.family].title}'s; choose the right family")
    layers = {
        name: _fit_shape(name, layer, kernel_side(name, lora.family, for_kohya)) for name, layer in lora.layers.items()
    }
    return replace(lora, layers=layers)


def _fit_shape(name: str, layer: LoraLayer, side: int | None) -> LoraLayer:
    lora_A, lora_B = layer.lora_A, layer.lora_B
    if side is None or lora_A.dim() == (4 if side else 2):
        return layer
    if not side and layer.is_convolution:
        raise ValueError(
            f"layer {name} has a kernel of {lora_A.shape[2]} x {lora_A.shape[3]}, but is linear in this family"
        )
    if not side:
        return replace(layer, lora_A=lora_A.flatten(1), lora_B=lora_B.flatten(1))
    # No width of a layer is a multiple of 9: that is a flattened kernel.
    size = side if lora_A.shape[1] % side**2 == 0 else 1
    return replace(layer, lora_A=lora_A.unflatten(1, (-1, size, size)), lora_B=lora_B[:, :, None, None])
