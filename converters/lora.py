"""A LoRA in memory: what every file format is read into and written from.

Tensors are those of the file, bits and dtype; what a format says elsewhere (alpha in a tensor, in a config, or nowhere)
is a number of the layer here.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lidb_peft.relax import LoraFactors

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class LoraLayer:
    """One layer's update, ``scale * up @ down`` with ``scale = alpha / rank``.

    Args:
        down: ``lora_A``, ``(rank, in)``; of a convolution ``(rank, in, height, width)``.
        up: ``lora_B``, ``(out, rank)``; of a convolution ``(out, rank, 1, 1)``.
        alpha: finite and not 0.
        magnitude: DoRA's, ``(out,)``: the norms of the rows of the updated weight; None in a plain LoRA.

    Raises:
        ValueError: shapes that are of no one rank, another dtype than ``DTYPES``, NaN or infinity.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        down, up = self.down, self.up
        one_by_one = up.shape[2:] in ((), (1, 1))
        if down.dim() not in (2, 4) or down.dim() != up.dim() or not one_by_one or down.shape[0] != up.shape[1]:
            raise ValueError(f"down {tuple(down.shape)} and up {tuple(up.shape)} are of no one rank")
        if 0 in (*down.shape, *up.shape):
            raise ValueError(f"down {tuple(down.shape)} and up {tuple(up.shape)} are empty")
        if self.magnitude is not None and self.magnitude.shape != up.shape[:1]:
            raise ValueError(
                f"DoRA magnitudes of shape {tuple(self.magnitude.shape)}, which are not one for each of {len(up)} outputs"
            )
        if self.alpha == 0 or not math.isfinite(self.alpha):
            raise ValueError(f"alpha {self.alpha}, which readers take differently; set it to the rank")
        for tensor in self.tensors():
            if tensor.dtype not in DTYPES:
                raise ValueError(
                    f"a tensor of {tensor.dtype}; only {', '.join(str(dtype) for dtype in DTYPES)} are held"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError("NaN or infinity; its training diverged")

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what the layer holds besides alpha."""
        return (self.down, self.up) if self.magnitude is None else (self.down, self.up, self.magnitude)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def is_convolution(self) -> bool:
        """Whether it is more than a matrix: a convolution with a kernel larger than 1x1."""
        return math.prod(self.down.shape[2:]) > 1


@dataclass(frozen=True)
class Lora:
    """An adapter of a Stable Diffusion model.

    Args:
        layers: layer name, as in ``lidb_peft.naming``, -> its update.
        family: ``sd1``, ``sd2`` or ``sdxl``; "" where the file does not tell.
        metadata: what the file says about itself, text to text, without what its format needs for itself.
    """

    layers: dict[str, LoraLayer]
    family: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    def factors(self) -> LoraFactors:
        """Return plain float32 factors, ``alpha / rank`` folded into ``lora_B``; 1x1 convolutions become matrices.

        Raises:
            ValueError: a layer is DoRA or a larger convolution, which are no product of two matrices.
        """
        for name, layer in self.layers.items():
            if layer.magnitude is not None or layer.is_convolution:
                what = "a convolution" if layer.is_convolution else "DoRA"
                raise ValueError(f"layer {name} is {what}, which is no product of two matrices; leave the layer out")
        return {
            name: (layer.down.float().flatten(1), layer.up.float().flatten(1) * layer.scale)
            for name, layer in self.layers.items()
        }
