"""Low-rank factors of many layers, stacked by width, so that few kernels serve all layers.

A step expands theta once: one matrix product for each distinct width of each component (9 for SD1.5's 352 factors)
instead of one for each factor, which at batch 1 on a GPU would cost more in launches than in arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .bases import find_basis
from .config import LiDBConfig
from .layout import split_theta
from .naming import natural_key
from .product import expand_down, expand_up
from .relax import LoraFactors


@dataclass(frozen=True)
class Group:
    """Layers of one component that share a width on one side."""

    component: str
    width: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Stacks:
    """Factors of all layers of ``LayerGroups``.

    ``lora_A[g]`` is ``(layers in group g, *batch, r, width)`` and ``lora_B[g]`` ``(layers in group g, *batch, width,
    r)``, where the groups of the two sides differ.
    """

    lora_A: tuple[Tensor, ...]
    lora_B: tuple[Tensor, ...]

    @property
    def batch_shape(self) -> torch.Size:
        return self.lora_A[0].shape[1:-2]


class LayerGroups:
    """The ordered layers of a space, by name and shape, and how a flat vector of LoRA factors maps onto them."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Take ``shapes``: layer name -> ``(in_features, out_features)``, in the order of the space."""
        self.names = tuple(shapes)
        self.shapes = tuple(shapes.values())
        self.in_groups = self._groups(0)
        self.out_groups = self._groups(1)
        self._orders: dict[tuple[str, torch.device], Tensor] = {}

    def _groups(self, side: int) -> tuple[Group, ...]:
        members: dict[tuple[str, int], list[int]] = {}
        for index, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True)):
            members.setdefault((name.partition(".")[0], shape[side]), []).append(index)
        ordered = sorted(members, key=lambda group: (natural_key(group[0]), group[1]))
        return tuple(Group(*group, tuple(members[group])) for group in ordered)

    def _order(self, side: str, device: torch.device) -> Tensor:
        if (side, device) not in self._orders:
            groups = self.in_groups if side == "in" else self.out_groups
            order = [index for group in groups for index in group.layers]
            self._orders[side, device] = torch.tensor(order, device=device)
        return self._orders[side, device]

    def expand(self, theta: Tensor, config: LiDBConfig, bases: Mapping[str, Tensor] | None = None) -> Stacks:
        """Expand theta ``(*batch, L, r*(a+b))`` to float32 LoRA factors, the config's scale folded into ``lora_B``.

        Args:
            bases: by label, in place of the frozen ones.
        """
        down, up = split_theta(theta.float(), config)
        # One gather per side puts the layers of a group side by side; the rest are views and matrix products.
        down = down.index_select(-3, self._order("in", theta.device))
        up = up.index_select(-3, self._order("out", theta.device))
        lora_A, lora_B = [], []
        for group, rows in zip(self.in_groups, self._split(down, self.in_groups), strict=True):
            basis = find_basis(config.basis_keys(group.width, group.width)[0], theta.device, bases)
            lora_A.append(expand_down(rows[..., : basis.shape[0]], basis).movedim(-3, 0))
        for group, rows in zip(self.out_groups, self._split(up, self.out_groups), strict=True):
            basis = find_basis(config.basis_keys(group.width, group.width)[1], theta.device, bases)
            lora_B.append(expand_up(rows[..., : basis.shape[1], :], basis, config.scale).movedim(-3, 0))
        return Stacks(tuple(lora_A), tuple(lora_B))

    @staticmethod
    def _split(rows: Tensor, groups: tuple[Group, ...]) -> tuple[Tensor, ...]:
        return rows.split([len(group.layers) for group in groups], dim=-3)

    def lora_size(self, rank: int) -> int:
        """Return how many numbers the LoRA factors of that rank have, over all layers."""
        return rank * sum(in_features + out_features for in_features, out_features in self.shapes)

    def split_lora(self, flat: Tensor, rank: int) -> Stacks:
        """View flat LoRA factors ``(*batch, lora_size(rank))`` as stacks; no copy, differentiable.

        Raises:
            ValueError: the length is not ``lora_size(rank)``.
        """
        if flat.shape[-1] != self.lora_size(rank):
            raise ValueError(
                f"the flat LoRA has {flat.shape[-1]} numbers; rank {rank} on these {len(self.names)} layers "
                f"needs {self.lora_size(rank)}"
            )
        groups = self.in_groups + self.out_groups
        pieces = flat.split([len(group.layers) * rank * group.width for group in groups], dim=-1)
        count = len(self.in_groups)
        lora_A = [
            piece.unflatten(-1, (len(group.layers), rank, group.width)).movedim(-3, 0)
            for group, piece in zip(self.in_groups, pieces[:count], strict=True)
        ]
        lora_B = [
            piece.unflatten(-1, (len(group.layers), group.width, rank)).movedim(-3, 0)
            for group, piece in zip(self.out_groups, pieces[count:], strict=True)
        ]
        return Stacks(tuple(lora_A), tuple(lora_B))

    def init_lora(self, rank: int, generator: torch.Generator) -> Tensor:
        """Return flat float32 LoRA factors ``(lora_size(rank),)``: ``lora_A`` as PEFT's (Kaiming), ``lora_B`` zero."""
        pieces = [
            (2 * torch.rand(len(group.layers) * rank * group.width, generator=generator) - 1) * group.width**-0.5
            for group in self.in_groups
        ]
        return torch.cat([*pieces, torch.zeros(rank * sum(out_features for _, out_features in self.shapes))])

    def stack(self, factors: LoraFactors) -> Stacks:
        """Stack per-layer factors ``(*batch, r, in)``, ``(*batch, out, r)``, all of one rank and batch shape.

        Raises:
            ValueError: the layers are others, or a shape does not fit.
        """
        missing, unexpected = set(self.names) - set(factors), set(factors) - set(self.names)
        if missing or unexpected:
            raise ValueError(
                f"the factors are not of this model's layers: missing {sorted(missing)}, unexpected "
                f"{sorted(unexpected)}"
            )
        first_A = factors[self.names[0]][0]
        batch, rank = first_A.shape[:-2], first_A.shape[-2]
        for name, (in_features, out_features) in zip(self.names, self.shapes, strict=True):
            shapes = tuple(tensor.shape for tensor in factors[name])
            if shapes != ((*batch, rank, in_features), (*batch, out_features, rank)):
                raise ValueError(
                    f"the factors of {name} have shapes {[tuple(shape) for shape in shapes]}; expected "
                    f"{(*batch, rank, in_features)} and {(*batch, out_features, rank)}, one rank for all layers"
                )
        lora_A = [torch.stack([factors[self.names[i]][0] for i in group.layers]) for group in self.in_groups]
        lora_B = [torch.stack([factors[self.names[i]][1] for i in group.layers]) for group in self.out_groups]
        return Stacks(tuple(lora_A), tuple(lora_B))

    def unstack(self, stacks: Stacks) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's ``lora_A`` ``(*batch, r, in)``, ``lora_B`` ``(*batch, out, r)``, in the layers' order."""
        lora_A: dict[int, Tensor] = {}
        lora_B: dict[int, Tensor] = {}
        for found, groups, tensors in (
            (lora_A, self.in_groups, stacks.lora_A),
            (lora_B, self.out_groups, stacks.lora_B),
        ):
            for group, tensor in zip(groups, tensors, strict=True):
                # unbind, unlike indexing, has one backward node for all layers of the group
                found.update(zip(group.layers, tensor.unbind(0), strict=True))
        return [(lora_A[i], lora_B[i]) for i in range(len(self.names))]


def concatenate(parts: list[Stacks]) -> Stacks:
    """Join factors along the rank: the sum of the updates, exactly. Parts without batch serve every identity."""
    if len(parts) == 1:
        return parts[0]
    batch = torch.broadcast_shapes(*(part.batch_shape for part in parts))

    def join(tensors: tuple[Tensor, ...], dim: int) -> Tensor:
        spread = [
            tensor.reshape(tensor.shape[0], *[1] * (len(batch) - tensor.dim() + 3), *tensor.shape[1:]).expand(
                tensor.shape[0], *batch, *tensor.shape[-2:]
            )
            for tensor in tensors
        ]
        return torch.cat(spread, dim=dim)

    lora_A = tuple(join(tensors, -2) for tensors in zip(*(part.lora_A for part in parts), strict=True))
    lora_B = tuple(join(tensors, -1) for tensors in zip(*(part.lora_B for part in parts), strict=True))
    return Stacks(lora_A, lora_B)


def prepare(stacks: Stacks, groups: LayerGroups, dtypes: dict[str, torch.dtype], scale: float | Tensor) -> Stacks:
    """Scale the updates and cast the factors to each component's dtype, a whole group at a time."""
    if isinstance(scale, Tensor):
        lora_B = [tensor * scale.reshape((*scale.shape, 1, 1)).to(tensor.device) for tensor in stacks.lora_B]
    else:
        lora_B = [tensor if scale == 1.0 else tensor * scale for tensor in stacks.lora_B]
    lora_A = [tensor.to(dtypes[group.component]) for tensor, group in zip(stacks.lora_A, groups.in_groups, strict=True)]
    lora_B = [tensor.to(dtypes[group.component]) for tensor, group in zip(lora_B, groups.out_groups, strict=True)]
    return Stacks(tuple(lora_A), tuple(lora_B))
