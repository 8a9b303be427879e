"""diffusers' LoRA file, ``pytorch_lora_weights.safetensors``: module paths, scale 1, all components in one file.

Since 0.20 the names are PEFT's; before, an attention's LoRA belonged to its processor. Newer versions read old files
too, and ComfyUI knows only the old names of a UNet's layers. ComfyUI and versions before 0.34 do not read alpha here,
so none is written.
"""

from collections.abc import Callable

from torch import Tensor

from converters.formats.layout import SPELLINGS
from converters.key_maps import to_old_diffusers_name
from converters.layer import Loader, LoraLayer
from converters.lora import Lora
from lidb_peft.families import DENOISERS, FAMILIES
from lidb_peft.files import LazyTensor, Tensors

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"


def diffusers_tensors(lora: Lora) -> Tensors:
    """Return the tensors of a LoRA of scale 1 under diffusers' names."""
    return path_tensors(lora.layers, "diffusers", lambda layer: layer)


def old_diffusers_tensors(lora: Lora) -> Tensors:
    """Return the tensors of a LoRA of scale 1 under the names of diffusers 0.18 and 0.19.

    Raises:
        ValueError: a family that diffusers did not support then, a DoRA layer, or a layer that is not an attention
            projection of a UNet.
    """
    if lora.family and not FAMILIES[lora.family].has_old_diffusers_names:
        raise ValueError(f"{FAMILIES[lora.family].title} is newer than diffusers' old LoRA files; convert to diffusers")
    dora = [name for name, layer in lora.layers.items() if layer.magnitude is not None]
    if dora:
        raise ValueError(f"layer {dora[0]} is DoRA, which diffusers' old LoRA files cannot hold; convert to diffusers")
    unet = {name: layer for name, layer in lora.layers.items() if name.partition(".")[0] in DENOISERS}
    others = {name: layer for name, layer in lora.layers.items() if name not in unet}
    return {
        **path_tensors(unet, "diffusers-old", to_old_diffusers_name),
        **path_tensors(others, "diffusers-old text encoder", lambda layer: layer),
    }


def path_tensors(layers: dict[str, LoraLayer], spelling: str, name_of: Callable[[str], str]) -> Tensors:
    """Return tensors under module paths: ``name_of`` a layer and an ending of ``SPELLINGS``."""
    endings = SPELLINGS[spelling]
    tensors: dict[str, Tensor | LazyTensor] = {}
    loader = Loader()
    for layer_name, layer in layers.items():
        name = name_of(layer_name)
        lora_A, lora_B, *magnitude = loader.tensors(layer)
        tensors[name + endings["lora_A"]], tensors[name + endings["lora_B"]] = lora_A, lora_B
        if layer.has_input_magnitude:
            raise ValueError(
                f"layer {layer_name} is DoRA with a magnitude for each input, as LyCORIS trains it, which diffusers and"
                " PEFT do not have; convert to kohya"
            )
        if magnitude:  # for a convolution, PEFT stores it in the shape in which it is multiplied
            shape = (-1,) if layer.lora_B.dim() == 2 else (1, -1, 1, 1)
            tensors[name + endings["dora"]] = magnitude[0].reshape(*shape)
    return tensors
