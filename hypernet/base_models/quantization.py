"""A base's transformer blocks in 4 or 8 bits, by bitsandbytes."""

from types import ModuleType

import torch
from torch import nn

from hypernet.recipe import QUANTIZATIONS


def quantize_blocks(model: nn.Module, kind: str, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers of a transformer's blocks; the numbers are rounded when the model is moved to a device.

    What lies before and after the blocks, which is small, keeps its dtype.

    Args:
        kind: ``nf4`` (Dettmers et al. 2023, QLoRA) or ``int8`` (Dettmers et al. 2022, LLM.int8()).

    Raises:
        ValueError: the kind is unknown, or bitsandbytes is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantize is {kind!r}; choose {' or '.join(QUANTIZATIONS)}")
    try:
        from bitsandbytes import nn as bnb
    except ImportError as error:
        raise ValueError(f"{kind} needs bitsandbytes; pip install bitsandbytes, or leave --quantize out") from error

    for blocks in (child for child in model.children() if isinstance(child, nn.ModuleList)):
        for module in list(blocks.modules()):
            for name, layer in module.named_children():
                if type(layer) is nn.Linear:
                    setattr(module, name, _quantized(bnb, layer, kind, compute_dtype))


def _quantized(bnb: ModuleType, layer: nn.Linear, kind: str, compute_dtype: torch.dtype) -> nn.Linear:
    arguments = (layer.in_features, layer.out_features, layer.bias is not None)
    if kind == "nf4":
        # The weight is taken over, so nothing is allocated for it.
        found = bnb.Linear4bit(*arguments, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
        found.weight = bnb.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    else:
        found = bnb.Linear8bitLt(*arguments, has_fp16_weights=False, device="meta")
        found.weight = bnb.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    found.bias = layer.bias
    return found
