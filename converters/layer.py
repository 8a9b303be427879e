"""One layer's LoRA in memory.

Tensors are those of the file, bits and dtype; what a format says elsewhere (alpha in a tensor, in a config, or nowhere)
is a number of the layer here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from lidb_peft.files import LazyTensor

# Written to LoRA files; float64 is read too, but nobody else reads it.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HELD_DTYPES = (*DTYPES, torch.float64)
# Their numbers are all among float16's.
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


class NotFiniteError(ValueError):
    """NaN or infinity among an update's numbers."""

    def __init__(self) -> None:
        super().__init__("NaN or infinity; its training diverged")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype, float8 too, holds neither NaN nor infinity.

    Twenty times as fast as ``isfinite().all()``, as NaN spreads, and without its copies.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def held(tensor: Tensor) -> Tensor:
    """Return a float8 tensor in float16, which is exact; any other as it is."""
    return tensor.half() if tensor.dtype in _FLOAT8 else tensor


def is_power_of_two(number: float) -> bool:
    """Whether floating point multiplies by ``number``, of either sign, without rounding."""
    return abs(math.frexp(number)[0]) == 0.5


@dataclass(frozen=True)
class LoraLayer:
    """One layer's update, ``scale * lora_B @ lora_A`` with ``scale = alpha / rank``.

    Args:
        lora_A: ``(rank, in)``; of a convolution ``(rank, in, height, width)``.
        lora_B: ``(out, rank)``; of a convolution ``(out, rank, 1, 1)``.
        alpha: finite and not 0.
        magnitude: DoRA's, ``(out,)``: the norms of the rows of the updated weight; or LyCORIS's ``(1, in)``: of its
            columns, kernels included. None in a plain LoRA.
        compute: of a layer that is computed when it is needed: what returns its tensors, which are on the meta device
            here; see `loaded`.

    Raises:
        ValueError: shapes that have different ranks, a dtype that is none of floating point, NaN or infinity.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    magnitude: Tensor | None = None
    compute: Callable[[], tuple[Tensor, ...]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        lora_A, lora_B = self.lora_A, self.lora_B
        assert (self.compute is not None) <= lora_A.is_meta, "numbers beside those that are computed"
        are_factors = lora_A.dim() == lora_B.dim() in (2, 4) and lora_B.shape[2:] in ((), (1, 1))
        if not are_factors or lora_A.shape[0] != lora_B.shape[1]:
            raise ValueError(f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} have different ranks")
        if 0 in (*lora_A.shape, *lora_B.shape):
            raise ValueError(f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} are empty")
        shapes = (lora_B.shape[:1], (1, lora_A.shape[1]))
        if self.magnitude is not None and self.magnitude.shape not in shapes:
            raise ValueError(
                f"DoRA magnitudes of shape {tuple(self.magnitude.shape)}, not one for each of its {len(lora_B)} outputs"
                f" or {lora_A.shape[1]} inputs"
            )
        if self.alpha == 0 or not math.isfinite(self.alpha):
            raise ValueError(f"alpha {self.alpha}, which readers take differently; set it to the rank")
        for tensor in self.tensors():
            if tensor.dtype not in _HELD_DTYPES:
                raise ValueError(
                    f"a tensor of {tensor.dtype}; only {', '.join(str(dtype) for dtype in _HELD_DTYPES)} are held"
                )
            if not is_finite(tensor):
                raise NotFiniteError

    def loaded(self) -> "LoraLayer":
        """Return the layer with its numbers, computed anew if they are not there."""
        if self.compute is None:
            return self
        return _of_tensors(self.compute(), self.alpha)

    def later(self, change: "Callable[[LoraLayer], LoraLayer]") -> "LoraLayer":
        """Return what ``change`` makes of the layer, computed when it is loaded.

        Args:
            change: takes a layer on the meta device too, and gives it the shapes and dtypes that it will have.
        """
        outline = change(_of_tensors([tensor.to("meta") for tensor in self.tensors()], self.alpha))
        return replace(outline, compute=lambda: change(self.loaded()).tensors())

    def with_alpha(self, alpha: float) -> "LoraLayer":
        """Return the same numbers with another alpha."""
        return self if alpha == self.alpha else replace(self, alpha=alpha)

    def widened(self, dtype: torch.dtype) -> "LoraLayer":
        """Return the layer in dtypes that hold both what it has and what ``dtype`` can; exact."""
        dtypes = [torch.promote_types(tensor.dtype, dtype) for tensor in self.tensors()]
        if all(tensor.dtype == dtype for tensor, dtype in zip(self.tensors(), dtypes, strict=True)):
            return self
        return self.later(partial(_in_dtypes, dtypes=dtypes))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what the layer holds besides alpha."""
        return (self.lora_A, self.lora_B) if self.magnitude is None else (self.lora_A, self.lora_B, self.magnitude)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def has_input_magnitude(self) -> bool:
        """Whether its DoRA is LyCORIS's, with a magnitude for each input, which diffusers and PEFT do not have."""
        return self.magnitude is not None and self.magnitude.dim() == 2

    @property
    def is_convolution(self) -> bool:
        """Whether it is more than a matrix: a convolution with a kernel larger than 1x1."""
        return math.prod(self.lora_A.shape[2:]) > 1


def _of_tensors(tensors: Sequence[Tensor], alpha: float) -> LoraLayer:
    """The layer whose `LoraLayer.tensors` they are."""
    lora_A, lora_B, *magnitude = tensors
    return LoraLayer(lora_A, lora_B, alpha, magnitude[0] if magnitude else None)


def _in_dtypes(layer: LoraLayer, dtypes: Sequence[torch.dtype]) -> LoraLayer:
    tensors = [tensor.to(dtype) for tensor, dtype in zip(layer.tensors(), dtypes, strict=True)]
    return _of_tensors(tensors, layer.alpha)


class Loader:
    """Gives layers' tensors to a writer, which takes those of one layer one after the other: one layer is in memory."""

    def __init__(self) -> None:
        self._layer: LoraLayer | None = None
        self._tensors: tuple[Tensor, ...] = ()

    def tensors(self, layer: LoraLayer) -> tuple[Tensor | LazyTensor, ...]:
        """Return what `LoraLayer.tensors` does, to be computed when it is written if the layer is."""
        if layer.compute is None:
            return layer.tensors()
        return tuple(
            LazyTensor(tensor.dtype, tuple(tensor.shape), partial(self._load, layer, index))
            for index, tensor in enumerate(layer.tensors())
        )

    def _load(self, layer: LoraLayer, index: int) -> Tensor:
        if self._layer is not layer:
            self._layer, self._tensors = layer, ()  # the other layer's make room first
            self._tensors = layer.loaded().tensors()
        return self._tensors[index]
