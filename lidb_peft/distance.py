"""How far apart two thetas' updates are, without forming the updates.

theta itself has a gauge: (c * down, up / c) is the same update. ||dW - dW'||_F^2 does not see it, and costs about as
much as comparing the numbers: with orthonormal bases and r = 1 it is |d|^2|u|^2 + |d'|^2|u'|^2 - 2 (d.d')(u.u').
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from .bases import find_basis
from .layout import split_theta
from .space import LiDBSpace

Bases = Mapping[str, Tensor]


def squared_distance(
    space: LiDBSpace, theta: Tensor, other: Tensor, bases: Bases | None = None, other_bases: Bases | None = None
) -> Tensor:
    """Return each layer's squared Frobenius distance between two updates, ``(*batch, L)``; differentiable.

    A layer's squared norm is its distance to ``space.theta_0``. Rounding leaves an error of about 1e-7 of the two
    squared norms, of either sign.

    Args:
        theta, other: ``(*batch, L, row)``; the batches broadcast.
        bases: the learned bases of ``theta``, by label; None means the frozen ones.
        other_bases: those of ``other``.

    Raises:
        ValueError: a theta or a basis does not fit the space.
    """
    space.check_theta(theta)
    space.check_theta(other)
    theta, other = theta.float() * space.mask.to(theta.device), other.float() * space.mask.to(other.device)
    own = _inner_product(space, theta, theta, bases, bases)
    others = _inner_product(space, other, other, other_bases, other_bases)
    return own + others - 2 * _inner_product(space, theta, other, bases, other_bases)


def _inner_product(
    space: LiDBSpace, first: Tensor, second: Tensor, first_bases: Bases | None, second_bases: Bases | None
) -> Tensor:
    """Return <dW, dW'> of each layer: the sum of (V V'^T) * (U^T U') with dW = U V, ``(*batch, L)``."""
    down, up = split_theta(first, space.config)
    other_down, other_up = split_theta(second, space.config)
    if first_bases is not None or second_bases is not None:
        down = torch.einsum("...lri,lij->...lrj", down, _grams(space, 0, first_bases, second_bases, first.device))
        up = torch.einsum("...lir,lij->...ljr", up, _grams(space, 1, first_bases, second_bases, first.device))
    products = (down @ other_down.mT) * (up.mT @ other_up)
    return space.config.scale**2 * products.sum(dim=(-2, -1))


def _grams(space: LiDBSpace, side: int, bases: Bases | None, others: Bases | None, device: torch.device) -> Tensor:
    """Return each layer's products of the vectors of two bases of its down (0) or up (1) side, ``(L, dim, dim)``."""
    size = (space.config.down_dim, space.config.up_dim)[side]
    keys = [space.basis_keys(index)[side] for index in range(space.num_layers)]
    grams = {}
    for key in set(keys):
        basis, other = find_basis(key, device, bases), find_basis(key, device, others)
        gram = basis @ other.mT if side == 0 else basis.mT @ other
        grams[key] = pad(gram, (0, size - key.dim, 0, size - key.dim))
    return torch.stack([grams[key] for key in keys])
