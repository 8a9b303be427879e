"""Weights of a LoRA by part and by block, in the syntax of A1111's prompts and kohya's merge scripts.

A1111 writes ``0.8:te=0.5:unet=1:lbw=1,0,0,...`` after a LoRA's name: ``te`` and ``unet`` replace the weight of the
whole, and weights of blocks are multiplied with it. Lists of blocks are those of sd-webui-lora-block-weight and
of kohya's ``svd_merge_lora.py``.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from converters.key_maps import block_name
from converters.lora import Lora
from lidb_peft.families import FAMILIES, Family
from lidb_peft.safe_read import printable

_LIST = "lbw"
_MIDDLE = ("MID", "M00")  # kohya's name -> everybody else's


@dataclass(frozen=True)
class LoraWeight:
    """The weight of a LoRA's layers: that of its part, or else of the whole, times that of its block.

    Args:
        whole: weight of layers whose part has none of its own.
        parts: ``te`` for all text encoders, ``unet`` for the denoiser, or a component's name -> weight.
        blocks: a block (``IN04``) or a prefix of several (``OUT``) -> factor; if two match, the later counts.
        block_list: a factor for each block of one of the family's ``block_lists``; ``blocks`` count more.

    Raises:
        ValueError: a number that is not finite.
    """

    whole: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)
    blocks: Mapping[str, float] = field(default_factory=dict)
    block_list: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.whole, *self.parts.values(), *self.blocks.values(), *self.block_list)
        odd = [number for number in numbers if not math.isfinite(number)]
        if odd:
            raise ValueError(f"a LoRA has the weight {odd[0]}; choose a finite number")

    @classmethod
    def parse(cls, text: str) -> "LoraWeight":
        """Read ``0.8``, ``0.8:te=0.5:IN04=0``, or ``lbw=1,0,...``; the pieces between colons may be in any order.

        Raises:
            ValueError: a piece that is none of these.
        """
        whole, named = 1.0, {}
        block_list: tuple[float, ...] = ()
        for position, piece in enumerate(text.split(":")):
            name, sign, value = piece.partition("=")
            if not sign and position == 0:
                whole = _number(piece)
            elif name == _LIST:
                block_list = tuple(_number(number) for number in value.split(","))
            elif not sign or not name:
                raise ValueError(
                    f"{printable(repr(piece))} is not a weight; write te=0.5, unet=1, IN04=0 or lbw=1,0,..."
                )
            else:
                named[name] = _number(value)
        parts = {name.lower(): number for name, number in named.items() if name.lower() in _PARTS}
        blocks = {_block(name): number for name, number in named.items() if name.lower() not in _PARTS}
        return cls(whole, parts, blocks, block_list)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have one weight."""
        return not (self.parts or self.blocks or self.block_list)

    def of_layer(self, layer: str, family: str) -> float:
        """Return the weight of a layer, by our name, of a LoRA for ``family``.

        Raises:
            ValueError: a block or a list of blocks that the family does not have.
        """
        return self._part(layer, FAMILIES[family]) * self._factors(FAMILIES[family]).get(block_name(layer, family), 1.0)

    def _part(self, layer: str, family: Family) -> float:
        component = family.component(layer.partition(".")[0])
        names = component.short_names if component else ()  # its own before that of all of its role
        return next((self.parts[name] for name in names if name in self.parts), self.whole)

    def _factors(self, family: Family) -> dict[str, float]:
        """Block -> factor."""
        known = dict.fromkeys(name for blocks in family.block_lists for name in blocks)
        factors: dict[str, float] = {}
        if self.block_list:
            fitting = [blocks for blocks in family.block_lists if len(blocks) == len(self.block_list)]
            if not fitting:
                lengths = " or ".join(str(len(blocks)) for blocks in family.block_lists)
                raise ValueError(f"{_LIST} has {len(self.block_list)} numbers; for {family.title} it has {lengths}")
            factors |= dict(zip(fitting[0], self.block_list, strict=True))
        for name, number in self.blocks.items():
            meant = (
                [name] if name in known else [block for block in known if re.fullmatch(rf"{re.escape(name)}\d+", block)]
            )
            if not meant:
                raise ValueError(f"{printable(repr(name))} is neither a part nor a block of {family.title}; choose from"
                                 f" te, unet, {', '.join(_shortened(known))}")  # fmt: skip
            factors |= dict.fromkeys(meant, number)
        return factors


_PARTS = frozenset(name for family in FAMILIES.values() for part in family.components for name in part.short_names)


def weigh(lora: Lora, weight: LoraWeight, family: str = "") -> list[tuple[Lora, float]]:
    """Return a LoRA as parts for `merge`, each of one weight; layers of weight 0 are left out.

    Args:
        family: the LoRA's family, if it cannot be detected.

    Raises:
        ValueError: the family is not known and needed, the weight does not fit it, or leaves nothing.
    """
    if weight.is_uniform:
        return [(lora, weight.whole)]
    family = lora.family or family
    if not family:
        raise ValueError(f"blocks have weights, but its layers do not show its model family; pass --family"
                         f" {', '.join(FAMILIES)}")  # fmt: skip
    names = [*lora.layers, *lora.full_updates]
    weights = {name: weight.of_layer(name, family) for name in names}
    parts = [
        (
            replace(
                lora,
                layers=_chosen(lora.layers, weights, number),
                full_updates=_chosen(lora.full_updates, weights, number),
            ),
            number,
        )
        for number in dict.fromkeys(weights.values())
        if number
    ]
    if not parts:
        raise ValueError("all of its layers have weight 0; leave it out")
    return parts


def _chosen(layers: Mapping[str, object], weights: Mapping[str, float], number: float) -> dict:
    return {name: layer for name, layer in layers.items() if weights[name] == number}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{printable(repr(text))} is not a weight; write a number such as 0.8") from error


def _block(name: str) -> str:
    name = name.upper()
    return _MIDDLE[1] if name == _MIDDLE[0] else name


def _shortened(names: Iterable[str]) -> list[str]:
    """Blocks by number as a range: ``IN00 to IN11``."""
    runs: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (name.rstrip("0123456789"), name)):
        runs.setdefault(name.rstrip("0123456789"), []).append(name)
    return [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs.values()]
