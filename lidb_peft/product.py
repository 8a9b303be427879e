"""The LiDB product: a linear layer's update held in a frozen random basis.

HyperDreamBooth (arXiv:2307.06949), section 4.1: dW = A_aux A_train B_train B_aux with y = xW. Here everything is
transposed, because torch keeps W as (out, in).
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def expand_down(down: Tensor, down_aux: Tensor) -> Tensor:
    """Return ``lora_A`` ``(*batch, r, in_features)`` of ``down`` ``(*batch, r, a)`` and ``down_aux`` ``(a, in)``."""
    if down.shape[-1] != down_aux.shape[0]:
        raise ValueError(f"down has {down.shape[-1]} columns but down_aux has {down_aux.shape[0]} rows; use its basis")
    return down @ down_aux


def expand_up(up: Tensor, up_aux: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale * lora_B`` ``(*batch, out_features, r)`` of ``up`` ``(*batch, b, r)``, ``up_aux`` ``(out, b)``."""
    if up.shape[-2] != up_aux.shape[1]:
        raise ValueError(f"up has {up.shape[-2]} rows but up_aux has {up_aux.shape[1]} columns; use its basis")
    # Transposed, any batch folds into one matrix product; up_aux @ up would be one small product per sample.
    lora_B = (up.mT @ up_aux.mT).mT
    return lora_B if scale == 1.0 else lora_B * scale


def lidb_to_lora(
    down: Tensor, up: Tensor, down_aux: Tensor, up_aux: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Expand LiDB weights into the LoRA factors of the same update; exact, no SVD.

    Args:
        down: A_train^T, ``(*batch, r, a)``.
        up: B_train^T, ``(*batch, b, r)``.
        down_aux: A_aux^T, ``(a, in_features)``, frozen, orthonormal rows.
        up_aux: B_aux^T, ``(out_features, b)``, frozen, orthonormal columns.
        scale: multiplies the update; folded into ``lora_B``.

    Returns:
        ``lora_A`` ``(*batch, r, in_features)``, ``lora_B`` ``(*batch, out_features, r)``.

    Raises:
        ValueError: the ranks differ, or a factor does not fit its basis.
    """
    if down.shape[-2] != up.shape[-1]:
        raise ValueError(f"down has rank {down.shape[-2]} but up has rank {up.shape[-1]}; pass one adapter's weights")
    return expand_down(down, down_aux), expand_up(up, up_aux, scale)


def add_low_rank(output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Add the low-rank update's part to a linear layer's output: ``output + x lora_A^T lora_B^T``.

    The factors are cast to the dtype of ``output`` and never applied through the bases token by token: expanding them
    costs r*a*in_features once, projecting x first would cost a*in_features per token.

    Args:
        output: what the base layer returned for ``x``, ``(*leading, out_features)``.
        x: the layer's input, ``(*leading, in_features)``.
        lora_A: ``(r, in_features)`` for all samples, or ``(B, r, in_features)``, one per identity.
        lora_B: ``(out_features, r)`` or ``(B, out_features, r)``.

    With a batch axis on the factors, the first axis of ``x`` is a multiple k of B and sample j uses identity j // k.

    Raises:
        ValueError: the batch is not a multiple of B.
    """
    dtype = output.dtype
    x, lora_A, lora_B = x.to(dtype), lora_A.to(dtype), lora_B.to(dtype)
    if lora_A.dim() == 2:
        return output + linear(linear(x, lora_A), lora_B)
    identities = lora_A.shape[0]
    if x.shape[0] % identities:
        raise ValueError(
            f"the batch has {x.shape[0]} samples for {identities} identities; pass the same number for each identity"
        )
    # The k samples of an identity are neighbours, so they join its tokens.
    x = x.reshape(identities, -1, x.shape[-1])
    base = output.reshape(identities, -1, output.shape[-1])
    return torch.baddbmm(base, torch.bmm(x, lora_A.mT), lora_B.mT).reshape(output.shape)
