"""One adapted module of a file, from its tensors: a LoRA layer, or another algorithm's update."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.full_update import FullUpdate
from converters.layer import LoraLayer, held

# Prefix of roles in layout.ENDINGS -> their algorithm.
_FULL = {"hada": "LoHa", "lokr": "LoKr"}
# Whole differences: role -> suffix of the layer's name.
_DIFFERENCES = {"diff": "", "w_norm": "", "diff_b": ".bias", "b_norm": ".bias"}


@dataclass(frozen=True)
class Module:
    """The update held by a module's tensors.

    Args:
        layer: its LoRA; None if it has another update, or one of rank 0.
        full_updates: suffix of the layer's name, "" or ``.bias`` -> an update that is not a LoRA.
        is_tucker: a core was multiplied into the layer, which is therefore float32.
        was_float8: the layer was float8, and is therefore float16.
    """

    layer: LoraLayer | None
    full_updates: Mapping[str, FullUpdate]
    is_tucker: bool = False
    was_float8: bool = False


def read_module(parts: Mapping[str, Tensor], magnitude_is_kohyas: bool, config_alpha: float | None) -> Module:
    """Return a module's update.

    Args:
        parts: role, as in ``layout.ENDINGS``, -> tensor.
        magnitude_is_kohyas: DoRA's magnitudes have the shape of kohya's ``dora_scale``, not of PEFT's.
        config_alpha: alpha if no tensor holds it; None if it is unknown.

    Raises:
        ValueError: the parts are incomplete, do not fit together, or hold invalid values.
    """
    alpha = _stated_alpha(parts.get("alpha"), config_alpha)
    full = {end: FullUpdate("full difference", {role: parts[role]}) for role, end in _DIFFERENCES.items()
            if role in parts}  # fmt: skip
    for start, algorithm in _FULL.items():
        own = {role: tensor for role, tensor in parts.items() if role.startswith(start)}
        if own:
            if "dora" in parts:
                raise ValueError(f"{algorithm} with DoRA's magnitudes, whose update needs the base model")
            full[""] = FullUpdate(algorithm, own, alpha)
    if not {"lora_A", "lora_B", "mid"} & parts.keys() and full:
        return Module(None, full)
    missing = [role for role in ("lora_A", "lora_B") if role not in parts]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)}; the file is incomplete")
    lora_A, lora_B = _of_one_kind(held(parts["lora_A"]), held(parts["lora_B"]))
    if lora_A.dim() > 1 and lora_B.dim() > 1 and len(lora_A) == lora_B.shape[1] == 0:
        return Module(None, full)
    alpha = float(len(lora_A) if lora_A.dim() else 0) if alpha is None else alpha
    if "mid" in parts:
        lora_A, lora_B, alpha = _without_core(lora_A, lora_B, held(parts["mid"]), alpha)
    magnitude = _magnitude(parts["dora"], magnitude_is_kohyas, lora_A, lora_B) if "dora" in parts else None
    layer = LoraLayer(lora_A, lora_B, alpha, magnitude)
    was_float8 = any(held(parts[role]) is not parts[role] for role in ("lora_A", "lora_B"))
    return Module(layer, full, is_tucker="mid" in parts, was_float8=was_float8)


def _stated_alpha(alpha: Tensor | None, config_alpha: float | None) -> float | None:
    if alpha is None:
        return config_alpha
    if alpha.numel() != 1 or alpha.is_complex():
        raise ValueError(f"an alpha of {alpha.dtype} and shape {tuple(alpha.shape)}; it must be one real number")
    return alpha.double().item()


def _of_one_kind(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Give both factors the dimensions of a convolution if one has them, as A1111 and ComfyUI expect."""
    if (lora_A.dim(), lora_B.dim()) == (4, 2):
        return lora_A, lora_B[:, :, None, None]
    if (lora_A.dim(), lora_B.dim()) == (2, 4) and lora_B.shape[2:] == (1, 1):
        return lora_A[:, :, None, None], lora_B
    return lora_A, lora_B


def _without_core(lora_A: Tensor, lora_B: Tensor, core: Tensor, alpha: float) -> tuple[Tensor, Tensor, float]:
    """Multiply Tucker's core ``(rank, rank, height, width)`` into ``lora_A``, in float32; the update stays the same."""
    are_factors = all(factor.dim() in (2, 4) and factor.shape[2:].numel() == 1 for factor in (lora_A, lora_B))
    is_core = core.dim() in (2, 4) and core.numel() > 0 and core.is_floating_point()
    if not (are_factors and is_core and core.shape[:2] == (lora_B.shape[1], len(lora_A))):
        raise ValueError(
            f"a lora_mid of shape {tuple(core.shape)}, which does not fit lora_A {tuple(lora_A.shape)} and lora_B"
            f" {tuple(lora_B.shape)}"
        )
    core = core if core.dim() == 4 else core[:, :, None, None]
    folded = torch.einsum("mnhw,ni->mihw", core.double(), lora_A.double().flatten(1)).float()
    # Programs divide by the rank of the original lora_A.
    return folded, lora_B.float().reshape(*lora_B.shape[:2], 1, 1), alpha * len(folded) / len(lora_A)


def _magnitude(magnitude: Tensor, is_kohyas: bool, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """DoRA's magnitudes as ``(out,)`` or ``(1, in)``; PEFT stores a convolution's on axis 1 of ``(1, out, 1, 1)``.

    kohya's ``dora_scale`` has the axis of the outputs or, from LyCORIS, of the inputs in its place.
    """
    if not is_kohyas or magnitude.shape[:1] == lora_B.shape[:1]:
        return held(magnitude.flatten())
    num_inputs = lora_A.shape[1] if lora_A.dim() > 1 else 0
    if magnitude.shape[:2] == (1, num_inputs) and magnitude.numel() == num_inputs:
        return held(magnitude.reshape(1, -1))
    raise ValueError(f"DoRA magnitudes of shape {tuple(magnitude.shape)}, neither of its outputs nor of its inputs")
