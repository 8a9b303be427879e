"""Updates that are no product of two narrow matrices: LoHa, LoKr, and differences of whole weights.

Their numbers stay as they are in the file; the difference that they stand for is computed when it is needed, one layer
at a time. LyCORIS, arXiv:2309.14859, section 3, as its readers compute it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converters.layer import LoraLayer, NotFiniteError, is_finite

# More than any layer of a model has; what a few small factors could claim is refused before it takes the memory.
_MAX_NUMBERS = 2**28


@dataclass(frozen=True)
class FullUpdate:
    """One layer's update, of a rank that is not known.

    Args:
        algorithm: ``LoHa``, ``LoKr`` or ``full difference``.
        parts: the file's tensors by the ends of their names, ``hada_w1_a``.
        alpha: None where the file has none.

    Raises:
        ValueError: parts that are missing or do not fit, more numbers than any layer has, NaN or infinity.
    """

    algorithm: str
    parts: Mapping[str, Tensor]
    alpha: float | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.parts.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name} of {tensor.dtype}; only floating-point numbers are held")
            if not is_finite(tensor):
                raise NotFiniteError
        # What does not fit together is found here, and not in the middle of a merge.
        if not 0 < self.shape.numel() <= _MAX_NUMBERS:
            raise ValueError(f"an update of shape {tuple(self.shape)}, which is that of no layer")

    @property
    def shape(self) -> torch.Size:
        """The shape of the update."""
        return self._compute({name: tensor.to("meta") for name, tensor in self.parts.items()}).shape

    def delta(self) -> Tensor:
        """Return the update, float64 ``(out, in)``; of a convolution ``(out, in, height, width)``, perhaps flattened.

        Of a norm or a bias, ``(out,)``.
        """
        return self._compute({name: tensor.double() for name, tensor in self.parts.items()})

    def _compute(self, parts: Mapping[str, Tensor]) -> Tensor:
        try:
            return _ALGORITHMS[self.algorithm](parts, self.alpha)
        except KeyError as error:
            raise ValueError(f"no {error.args[0]}; the file is incomplete") from error
        except (RuntimeError, IndexError, TypeError) as error:  # torch's, for shapes and numbers of dimensions
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parts.items())
            raise ValueError(f"shapes that do not fit together: {shapes}") from error


@dataclass(frozen=True)
class SumOfUpdates:
    """A weighted sum of one layer's updates, of which at least one is full.

    Raises:
        ValueError: one of them is DoRA.
    """

    terms: tuple[tuple["LoraLayer | FullUpdate | SumOfUpdates", float], ...]
    algorithm: str = "sum"

    def __post_init__(self) -> None:
        if any(isinstance(layer, LoraLayer) and layer.magnitude is not None for layer, _ in self.terms):
            raise ValueError("it is DoRA, whose update needs the base model; take it whole and alone")

    def delta(self) -> Tensor:
        """Return the update, as `FullUpdate.delta`, in the shape of the first."""
        first, *others = (_delta_of(layer) * weight for layer, weight in self.terms)
        return sum((other.reshape(first.shape) for other in others), first)


def _delta_of(layer: LoraLayer | FullUpdate | SumOfUpdates) -> Tensor:
    if not isinstance(layer, LoraLayer):
        return layer.delta()
    delta = layer.lora_B.double().flatten(1) @ layer.lora_A.double().flatten(1) * layer.scale
    return delta.unflatten(1, layer.lora_A.shape[1:])


def _loha(parts: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    first, second = (_product(parts, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
    rank = len(parts["hada_w1_b"])
    return first * second * (1.0 if alpha is None else alpha / rank)


def _lokr(parts: Mapping[str, Tensor], alpha: float | None) -> Tensor:
    factors, rank = [], 0
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            factors.append(parts[name])
        else:
            factors.append(_product(parts, f"{name}_a", f"{name}_b", name.replace("_w", "_t")))
            rank = len(parts[f"{name}_b"])
    first, second = factors
    if second.dim() == 4 and first.dim() == 2:
        first = first[:, :, None, None]
    if first.numel() * second.numel() > _MAX_NUMBERS:
        raise ValueError("an update of more numbers than any layer has")
    # Whole factors have no rank to divide by, and readers leave alpha out.
    return torch.kron(first, second) * (1.0 if alpha is None or not rank else alpha / rank)


def _product(parts: Mapping[str, Tensor], left: str, right: str, core: str) -> Tensor:
    """``left @ right``, or Tucker's product of both with a core ``(rank, rank, height, width)``."""
    if core not in parts:
        return parts[left].flatten(1) @ parts[right].flatten(1)
    return torch.einsum("ijkl,jr,ip->prkl", parts[core], parts[right], parts[left])


def _difference(parts: Mapping[str, Tensor], _: float | None) -> Tensor:
    (difference,) = parts.values()
    return difference * 1.0


_ALGORITHMS: Mapping[str, Callable[[Mapping[str, Tensor], float | None], Tensor]] = {
    "LoHa": _loha,
    "LoKr": _lokr,
    "full difference": _difference,
}
