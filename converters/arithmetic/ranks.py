"""The rank of a layer: a fixed one, or the lowest that keeps enough of its update.

The measures are those of kohya's ``resize_lora.py``, whose ``sv_fro`` is the square root of the energy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _lowest(kept: Tensor, share: float) -> int:
    """The first count at which the running sum ``kept`` reaches ``share`` of its end."""
    return 1 + int((kept < share * kept[-1]).sum())


# Measure -> the lowest rank that keeps an amount of singular values ``(k,)`` descending.
_LOWEST_RANK: dict[str, Callable[[Tensor, float], int]] = {
    "energy": lambda singular, amount: _lowest(singular.square().cumsum(0), amount),
    "sv_fro": lambda singular, amount: _lowest(singular.square().cumsum(0), amount**2),
    "sv_cumulative": lambda singular, amount: _lowest(singular.cumsum(0), amount),
    "sv_ratio": lambda singular, amount: int((singular > singular[0] / amount).sum()),
}
MEASURES = tuple(_LOWEST_RANK)


@dataclass(frozen=True)
class RankRule:
    """The rank of each layer: no more than allowed, and no more than it needs.

    Args:
        rank: largest rank.
        conv_rank: largest rank of kernels larger than 1x1; None is ``rank``.
        measure: one of ``MEASURES``: the share of the squared norm (``energy``), of the norm (``sv_fro``) or of the sum
            of the singular values (``sv_cumulative``) that every layer keeps; or the largest singular value over the
            smallest that is kept (``sv_ratio``). "" uses the highest rank allowed.
        amount: value of the measure: a fraction above 0 and at most 1, or a ratio of 1 or more.

    Raises:
        ValueError: no option is given, or a number is out of range.
    """

    rank: int | None = None
    conv_rank: int | None = None
    measure: str = ""
    amount: float = 0.0

    def __post_init__(self) -> None:
        if self.rank is None and self.conv_rank is None and not self.measure:
            raise ValueError("pass a rank, or what every layer is to keep, such as a share of energy")
        for name, rank in (("rank", self.rank), ("conv_rank", self.conv_rank)):
            if rank is not None and rank < 1:
                raise ValueError(f"{name} is {rank}; choose 1 or more")
        if self.measure and self.measure not in MEASURES:
            raise ValueError(f"the measure is {self.measure!r}; choose one of {', '.join(MEASURES)}")
        if self.measure == "sv_ratio" and not 1 <= self.amount < math.inf:
            raise ValueError(f"the ratio to keep is {self.amount}; choose a number of 1 or more")
        if self.measure not in ("", "sv_ratio") and not 0 < self.amount <= 1:
            raise ValueError(f"the {self.measure} to keep is {self.amount}; choose a share above 0 and at most 1")

    def highest(self, is_convolution: bool) -> float:
        """The highest rank that a layer may have; infinite if there is no limit."""
        own = self.conv_rank if is_convolution and self.conv_rank is not None else self.rank
        return math.inf if own is None else own

    def choose(self, singular: Tensor, is_convolution: bool) -> int:
        """Return the rank of a layer whose update has the singular values ``(k,)``, descending; 1 of one of zeros."""
        lowest = len(singular)
        if self.measure:
            lowest = _LOWEST_RANK[self.measure](singular, self.amount) if singular[0] > 0 else 1
        return int(max(1, min(lowest, self.highest(is_convolution), len(singular))))
