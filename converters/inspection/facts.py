"""What the tensors of an adapter file say, layer by layer."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from converters.arithmetic.algebra import update_norm
from converters.formats.layout import AdapterModule, Layout
from converters.formats.lora_config import layer_alpha, stated_number
from converters.lora import is_finite
from lidb_peft.families import FAMILIES

Configs = Mapping[str, Mapping[str, object]]
_BLOCKS = {part.name: part.blocks for family in FAMILIES.values() for part in family.components if part.blocks}


@dataclass(frozen=True)
class ModuleFacts:
    """What one adapted layer's tensors say; ``rank`` and ``in_features`` are 0 where they cannot be told.

    ``norm`` is the Frobenius norm of a LoRA's update, None for other algorithms and broken layers. ``config_error``
    says how PEFT's config is at odds with the tensors.
    """

    name: str
    component: str
    rank: int
    in_features: int
    alpha: float | None
    alpha_is_scalar: bool
    has_non_finite: bool
    is_zero: bool
    is_complete: bool
    norm: float | None
    config_error: str = ""


def block_norms(modules: Sequence[ModuleFacts]) -> dict[str, float]:
    """Return the Frobenius norm of the updates of each text encoder and block of a denoiser; to see where it acts."""
    norms: dict[str, float] = {}
    for module in modules:
        if module.norm is not None:
            found = re.search(_BLOCKS[module.component], module.name) if module.component in _BLOCKS else None
            block = f"{module.component} {found[0].replace('.', '_')}" if found else module.component
            norms[block] = math.hypot(norms.get(block, 0.0), module.norm)
    return {block: norm for block, norm in norms.items() if math.isfinite(norm)}


def gather_facts(tensors: Mapping[str, Tensor], layout: Layout, configs: Configs) -> list[ModuleFacts]:
    """Say what each layer's tensors, of all those of a file, hold."""
    return [
        _facts(module, tensors, configs.get(module.component, configs.get("", {})))
        for module in layout.modules.values()
    ]


def _facts(module: AdapterModule, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> ModuleFacts:
    parts = {role: [tensors[name] for name in names] for role, names in module.parts.items()}
    lora_A, lora_B, stored_alpha = (next(iter(parts.get(role, ())), None) for role in ("lora_A", "lora_B", "alpha"))
    shape = () if lora_A is None else lora_A.shape
    rank, alpha, config_error = _rank_and_alpha(module.name, shape, _number(stored_alpha), config)
    is_sound = all(is_finite(tensor) for role, found in parts.items() if role != "alpha" for tensor in found)
    factors = [tensor for role in ("lora_A", "lora_B", "lidb") for tensor in parts.get(role, ())]
    return ModuleFacts(
        name=module.name,
        component=module.component,
        rank=rank,
        in_features=shape[1] if len(shape) > 1 else 0,
        alpha=alpha,
        alpha_is_scalar=stored_alpha is None or stored_alpha.dim() == 0,
        has_non_finite=not is_sound,
        is_zero=any(not tensor.any() for tensor in factors),
        is_complete=(lora_A is None) == (lora_B is None),
        norm=_norm(lora_A, lora_B, alpha) if is_sound else None,
        config_error=config_error,
    )


def _number(alpha: Tensor | None) -> float | None:
    """What readers take an alpha for; NaN if it is no real number."""
    if alpha is None:
        return None
    return alpha.flatten()[0].double().item() if alpha.numel() and not alpha.is_complex() else math.nan


def _rank_and_alpha(
    name: str, shape: Sequence[int], alpha: float | None, config: Mapping[str, object]
) -> tuple[int, float | None, str]:
    """Return a layer's rank and alpha, from PEFT's config where the tensors do not tell, and what is wrong with it."""
    rank = shape[0] if shape else 0
    try:
        if not shape:
            rank = int(stated_number(config, "r", name, "the config") or 0)
        elif alpha is None and config and config.get("peft_type", "LORA") == "LORA":
            alpha = layer_alpha(config, name, rank, "the config")
    except ValueError as error:
        return rank, alpha, str(error)
    return rank, alpha, ""


def _norm(lora_A: Tensor | None, lora_B: Tensor | None, alpha: float | None) -> float | None:
    """The norm of ``alpha / rank * lora_B @ lora_A``; None if these two are no product."""
    if lora_A is None or lora_B is None or lora_A.is_complex() or lora_B.is_complex():
        return None
    if lora_A.dim() < 2 or lora_B.shape[1:] != (len(lora_A), *(1 for _ in lora_A.shape[2:])) or not len(lora_A):
        return None
    norm = update_norm(*(tensor.double().flatten(1) for tensor in (lora_A, lora_B)))
    norm *= 1.0 if alpha is None else abs(alpha) / len(lora_A)
    return norm if math.isfinite(norm) else None
