"""The best theta for a given LoRA: the inverse of `lidb_to_lora`, which loses what lies outside the bases.

What is sought is the update of rank r inside ``span(up_aux) x span(down_aux)`` that is nearest to ``lora_B @ lora_A``
in the Frobenius norm. The bases split the distance into two orthogonal parts, what no theta reaches and the distance of
the ``(b, a)`` core to rank r, so that the truncated SVD of the core (Eckart-Young) is the answer, in closed form.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .bases import find_basis
from .config import LiDBConfig
from .layout import split_theta, starting_theta
from .relax import LoraFactors

_EXACT_ZERO = 1e-14  # singular values below this share of the largest are float64's rounding


@torch.no_grad()
def project_lora(
    shapes: Mapping[str, tuple[int, int]],
    config: LiDBConfig,
    factors: LoraFactors,
    bases: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the theta whose update is nearest to that of a LoRA of any rank, and the error that remains.

    The two halves get the same norms and, of the two signs, the one nearer to theta_0, so that equal updates give equal
    thetas. Where there is no update, or one of a lower rank, theta stays theta_0, whose gradient is not dead. Computed
    in float64.

    Args:
        shapes: layer name -> ``(in_features, out_features)``, in theta's order, such as ``space.named_shapes``.
        factors: layer name -> ``lora_A`` ``(k, in_features)``, ``lora_B`` ``(out_features, k)``; k may differ.
        bases: learned bases by label, not necessarily orthonormal, in place of the frozen ones.

    Returns:
        theta float32 ``(L, r*(a+b))``, and float32 ``(L,)``: per layer the norm of the error over that of the LoRA's
        update, 0 (all of it is kept) to 1.

    Raises:
        ValueError: factors of a layer that has no row, of another shape or not finite; the config's scale is 0.
    """
    if config.scale == 0:
        raise ValueError("the config's scale is 0, which makes every theta the identity; choose another")
    unexpected = sorted(set(factors) - set(shapes))
    if unexpected:
        raise ValueError(f"theta has no row for {unexpected}; leave out these layers or adapt them too")
    theta, residuals = starting_theta(list(shapes.values()), config), torch.zeros(len(shapes))
    for index, (name, shape) in enumerate(shapes.items()):
        if name in factors:
            lora_A, lora_B = (factor.detach().to("cpu", torch.float64) for factor in factors[name])
            _check_factors(name, shape, lora_A, lora_B)
            keys = config.basis_keys(*shape)
            aux_down, aux_up = (find_basis(key, torch.device("cpu"), bases).double() for key in keys)
            down, up, residuals[index] = _project(lora_A, lora_B / config.scale, aux_down, aux_up, config.r)
            row_down, row_up = split_theta(theta[index], config)
            start = row_down[: len(down), : keys[0].dim]
            signs = torch.where((down * start).sum(dim=1) < 0, -1.0, 1.0)
            start.copy_(down * signs[:, None])
            row_up[: keys[1].dim, : len(down)] = up * signs
    return theta, residuals


def _check_factors(name: str, shape: tuple[int, int], lora_A: Tensor, lora_B: Tensor) -> None:
    found = [tuple(lora_A.shape), tuple(lora_B.shape)]
    rank = lora_A.shape[0]
    if found != [(rank, shape[0]), (shape[1], rank)]:
        raise ValueError(f"the factors of {name} have shapes {found}; expected (k, {shape[0]}) and ({shape[1]}, k)")
    if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
        raise ValueError(f"the factors of {name} hold values that are not finite; the LoRA is broken")


def _project(lora_A: Tensor, lora_B: Tensor, down_aux: Tensor, up_aux: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``down`` ``(n, a)`` and ``up`` ``(b, n)`` of equal norms, n <= r, and the relative error."""
    down_q, down_r = torch.linalg.qr(down_aux.mT)  # learned bases are not orthonormal
    up_q, up_r = torch.linalg.qr(up_aux)
    left, singular, right = torch.linalg.svd((up_q.mT @ lora_B) @ (lora_A @ down_q), full_matrices=False)
    kept = min(r, int((singular > _EXACT_ZERO * singular[:1]).sum()))
    root = singular[:kept].sqrt()
    down = torch.linalg.solve_triangular(down_r, right[:kept].mT * root, upper=True).mT
    up = torch.linalg.solve_triangular(up_r, left[:, :kept] * root, upper=True)
    energy = ((lora_B.mT @ lora_B) * (lora_A @ lora_A.mT)).sum()  # ||lora_B @ lora_A||^2
    lost = (energy - singular[:kept].square().sum()).clamp(min=0.0)
    return down, up, (lost / energy).sqrt() if energy > 0 else energy
