"""What the tensors of an adapter file say, layer by layer."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from converters.arithmetic.algebra import update_norm
from converters.formats.layout import Layout
from converters.formats.lora_config import layer_alpha, stated_number
from lidb_peft.safe_read import Header, iter_tensors

Configs = Mapping[str, Mapping[str, object]]
_PIECE = 1 << 22
_BLOCK = re.compile(r"(down|up|input|output)_blocks[._]\d+|mid_block|middle_block")


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
    """Return the Frobenius norm of the updates of each text encoder and each block of a UNet; to see where it acts."""
    norms: dict[str, float] = {}
    for module in modules:
        if module.norm is not None:
            found = _BLOCK.search(module.name)
            block = f"{module.component} {found[0].replace('.', '_')}" if found else module.component
            norms[block] = math.hypot(norms.get(block, 0.0), module.norm)
    return {block: norm for block, norm in norms.items() if math.isfinite(norm)}


def gather_facts(file: Path, header: Header, layout: Layout, configs: Configs) -> list[ModuleFacts]:
    """Read every tensor once, one at a time, and say what each layer's tensors hold."""
    non_finite, zero, alphas = set(), set(), {}
    alpha_names = {name for module in layout.modules.values() for name in module.parts.get("alpha", ())}
    for name, tensor in iter_tensors(file):
        if name in alpha_names:
            is_real = tensor.numel() and not tensor.is_complex()
            alphas[name] = tensor.flatten()[0].double().item() if is_real else math.nan
        elif not is_finite(tensor):
            non_finite.add(name)
        elif not tensor.any():
            zero.add(name)
    facts = []
    for module in layout.modules.values():
        alpha_name = next(iter(module.parts.get("alpha", ())), None)
        down, up = (next(iter(module.parts.get(role, ())), None) for role in ("down", "up"))
        shape = header.tensors[down].shape if down else ()
        config = configs.get(module.component, configs.get("", {}))
        rank, alpha, config_error = _rank_and_alpha(module.name, shape, alphas.get(alpha_name), config)
        names = [name for part in module.parts.values() for name in part]
        factors = [name for role in ("down", "up", "lidb") for name in module.parts.get(role, ())]
        facts.append(
            ModuleFacts(
                name=module.name,
                component=module.component,
                rank=rank,
                in_features=shape[1] if len(shape) > 1 else 0,
                alpha=alpha,
                alpha_is_scalar=alpha_name is None or header.tensors[alpha_name].shape == (),
                has_non_finite=not non_finite.isdisjoint(names),
                is_zero=not zero.isdisjoint(factors),
                is_complete=(down is None) == (up is None),
                norm=_norm(file, header, down, up, alpha) if non_finite.isdisjoint(names) else None,
                config_error=config_error,
            )
        )
    return facts


def _rank_and_alpha(
    name: str, down_shape: Sequence[int], alpha: float | None, config: Mapping[str, object]
) -> tuple[int, float | None, str]:
    """Return a layer's rank and alpha, from PEFT's config where the tensors do not tell, and what is wrong with it."""
    rank = down_shape[0] if down_shape else 0
    try:
        if not down_shape:
            rank = int(stated_number(config, "r", name, "the config") or 0)
        elif alpha is None and config and config.get("peft_type", "LORA") == "LORA":
            alpha = layer_alpha(config, name, rank, "the config")
    except ValueError as error:
        return rank, alpha, str(error)
    return rank, alpha, ""


def _norm(file: Path, header: Header, down: str | None, up: str | None, alpha: float | None) -> float | None:
    """The norm of ``alpha / rank * up @ down``; None if these two are no product."""
    if down is None or up is None:
        return None
    down_shape, up_shape = header.tensors[down].shape, header.tensors[up].shape
    if "C64" in (header.tensors[down].dtype, header.tensors[up].dtype):
        return None
    if len(down_shape) < 2 or up_shape[1:] != (down_shape[0], *(1 for _ in down_shape[2:])) or not down_shape[0]:
        return None
    with safe_open(file, framework="pt") as stored:
        norm = update_norm(*(stored.get_tensor(name).double().flatten(1) for name in (down, up)))
    norm *= 1.0 if alpha is None else abs(alpha) / down_shape[0]
    return norm if math.isfinite(norm) else None


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype, float8 too, holds neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    pieces = tensor.flatten().split(_PIECE)  # torch.isfinite makes copies, and knows no float8
    return all(bool(torch.isfinite(piece.float() if piece.element_size() == 1 else piece).all()) for piece in pieces)
