"""The layout of theta: one row for each adapted layer, and what its numbers are.

theta is float32 ``(L, r*(a+b))``: per layer ``down`` ``(r, a)``, then ``up`` ``(b, r)``, both flattened. A layer that
is narrower than a basis uses the first columns of ``down`` or rows of ``up``; the rest is zero and gets no gradient.
HyperDreamBooth (arXiv:2307.06949), section 4.1; the paper's figure 4 calls one row the weights of one layer.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .bases import BasisKey, starting_down
from .config import LiDBConfig


def row_size(config: LiDBConfig) -> int:
    """Return r*(a+b), the length of a row."""
    return config.r * (config.down_dim + config.up_dim)


def distinct_basis_keys(shapes: Sequence[tuple[int, int]], config: LiDBConfig) -> list[BasisKey]:
    """Return the key of every basis that layers of these ``(in_features, out_features)`` use, each once, sorted."""
    return sorted({key for shape in shapes for key in config.basis_keys(*shape)})


def layers_hash(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return 16 hex digits that change with the layers' names, order or ``(in_features, out_features)``."""
    lines = [f"{name} {shape[0]} {shape[1]}" for name, shape in shapes.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def split_theta(theta: Tensor, config: LiDBConfig) -> tuple[Tensor, Tensor]:
    """View theta ``(*batch, r*(a+b))`` as its ``down`` ``(*batch, r, a)`` and ``up`` ``(*batch, b, r)``, padded."""
    r, a, b = config.r, config.down_dim, config.up_dim
    return theta[..., : r * a].unflatten(-1, (r, a)), theta[..., r * a :].unflatten(-1, (b, r))


def theta_mask(shapes: Sequence[tuple[int, int]], config: LiDBConfig) -> Tensor:
    """Return bool ``(L, r*(a+b))`` for layers of these shapes: True where a number takes part, False in the padding."""
    mask = torch.zeros(len(shapes), row_size(config), dtype=torch.bool)
    for row, shape in zip(mask, shapes, strict=True):
        (down, up), (down_key, up_key) = split_theta(row, config), config.basis_keys(*shape)
        down[:, : down_key.dim] = True
        up[: up_key.dim] = True
    return mask


def starting_theta(shapes: Sequence[tuple[int, int]], config: LiDBConfig) -> Tensor:
    """Return theta_0, float32 ``(L, r*(a+b))``: every fit and every prediction starts there; the identity."""
    theta = torch.zeros(len(shapes), row_size(config))
    for row, shape in zip(theta, shapes, strict=True):
        dim = config.basis_keys(*shape)[0].dim
        split_theta(row, config)[0][:, :dim] = starting_down(config.r, dim, config.seed)
    return theta
