"""Layers that another model has as one, their rows below each other: FLUX's fused projections.

One LoRA of such a module is exactly one LoRA of each layer, with ``lora_A`` shared and the rows of ``lora_B``. The
reverse is exact too: layers with one ``lora_A`` are stacked as they are, others block by block, which adds their ranks:

    lora_A = [A_q; A_k; A_v]    lora_B = [B_q 0 0; 0 B_k 0; 0 0 B_v]
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from converters.layer import LoraLayer
from converters.lora import Lora, with_one_alpha


def row_slices(num_rows: int, widths: Sequence[int]) -> list[slice]:
    """Return the rows of each layer of a stack, whose relative numbers of rows are ``widths``.

    Raises:
        ValueError: ``num_rows`` cannot be divided so.
    """
    unit, rest = divmod(num_rows, sum(widths))
    if rest or not unit:
        raise ValueError(f"{num_rows} rows, which {len(widths)} layers of widths {tuple(widths)} cannot share")
    ends = [unit * sum(widths[: index + 1]) for index in range(len(widths))]
    return [slice(end - unit * width, end) for end, width in zip(ends, widths, strict=True)]


def unstack(layer: LoraLayer, widths: Sequence[int]) -> list[LoraLayer | None]:
    """Return the layers that a stack's LoRA is, None for one that it does not change; exact.

    Of one that was stacked block by block, each gets the block that is its own, and its rank.

    Raises:
        ValueError: its rows cannot be divided so.
    """
    if layer.has_input_magnitude:
        raise ValueError(f"DoRA with a magnitude for each input of what is {len(widths)} layers in diffusers")
    slices = row_slices(len(layer.lora_B), widths)
    changed = [layer.magnitude is not None or bool(layer.lora_B[rows].any()) for rows in slices]
    if not any(changed):  # as it was made: all of it waits to be trained
        changed = [True] * len(slices)
    columns = _blocks(layer.lora_B, slices)
    return [_part(layer, rows, own) if is_changed else None
            for rows, own, is_changed in zip(slices, columns, changed, strict=True)]  # fmt: skip


def _part(layer: LoraLayer, rows: slice, columns: slice) -> LoraLayer:
    lora_A, lora_B = layer.lora_A[columns].contiguous(), layer.lora_B[rows, columns].contiguous()
    magnitude = None if layer.magnitude is None else layer.magnitude[rows].contiguous()
    alpha = layer.alpha if len(lora_A) == layer.rank else layer.alpha * len(lora_A) / layer.rank
    return LoraLayer(lora_A, lora_B, alpha, magnitude)


def _blocks(lora_B: Tensor, slices: Sequence[slice]) -> list[slice]:
    """Return the columns that each layer of a stack has to itself; all of them for each if they are shared."""
    rank = lora_B.shape[1]
    whole = [slice(0, rank)] * len(slices)
    used = [lora_B[rows].flatten(1).ne(0).any(0) for rows in slices]
    if rank % len(slices) == 0:
        size = rank // len(slices)
        equal = [slice(index * size, (index + 1) * size) for index in range(len(slices))]
        if all(not _outside(mask, own).any() for mask, own in zip(used, equal, strict=True)):
            return equal if lora_B.any() else whole
    ranges, at = [], 0
    for mask in used:
        columns = mask.nonzero().flatten()
        if not len(columns):
            ranges.append(slice(0, rank))  # of a layer that is left out
            continue
        if int(columns[0]) < at:
            return whole
        ranges.append(slice(at, int(columns[-1]) + 1))
        at = int(columns[-1]) + 1
    kept = [own for mask, own in zip(used, ranges, strict=True) if mask.any()]
    return ranges if len(kept) > 1 and at == rank else whole


def _outside(mask: Tensor, own: slice) -> Tensor:
    return torch.cat([mask[: own.start], mask[own.stop :]])


def stack(layers: Sequence[LoraLayer | None], widths: Sequence[int]) -> LoraLayer:
    """Return the LoRA of a stack of layers, None standing for one that is not changed.

    Its rank is theirs if they share ``lora_A``, and else the sum of theirs.

    Raises:
        ValueError: none is changed, they do not fit each other, or some have DoRA's magnitudes and others not.
    """
    present = [(index, layer) for index, layer in enumerate(layers) if layer is not None]
    first_index, first = present[0]
    unit, rest = divmod(len(first.lora_B), widths[first_index])
    shapes = [(len(layer.lora_B), *layer.lora_A.shape[1:]) for _, layer in present]
    expected = [(unit * widths[index], *first.lora_A.shape[1:]) for index, _ in present]
    if rest or shapes != expected:
        raise ValueError(f"updates of shapes {shapes}, which are no layers of one stack of widths {tuple(widths)}")
    has_magnitude = any(layer.magnitude is not None for _, layer in present)
    if has_magnitude and (len(present) < len(layers) or any(layer.magnitude is None for _, layer in present)):
        raise ValueError("DoRA on some of the layers that are one module there, and not on all; convert to diffusers")
    shared = first.loaded().lora_A
    shares = all(layer.alpha == first.alpha and torch.equal(layer.loaded().lora_A, shared) for _, layer in present)
    if not shares:
        present = _of_one_scale(present)
    alpha = first.alpha if shares else present[0][1].scale * sum(layer.rank for _, layer in present)

    outlines = [(index, replace(layer.later(lambda own: own), compute=None)) for index, layer in present]
    return replace(
        _stacked(outlines, widths, shares, alpha),
        compute=lambda: _stacked([(i, layer.loaded()) for i, layer in present], widths, shares, alpha).tensors(),
    )


def _stacked(present: Sequence[tuple[int, LoraLayer]], widths: Sequence[int], shares: bool, alpha: float) -> LoraLayer:
    """Put layers of one scale below each other, block by block unless they share ``lora_A``."""
    first_index, first = present[0]
    lora_A = first.lora_A if shares else torch.cat([layer.lora_A for _, layer in present])
    dtype = torch.promote_types(lora_A.dtype, first.lora_B.dtype)
    unit = len(first.lora_B) // widths[first_index]
    lora_B = torch.zeros(unit * sum(widths), len(lora_A), dtype=dtype, device=lora_A.device)
    slices, at = row_slices(len(lora_B), widths), 0
    for index, layer in present:
        columns = slice(None) if shares else slice(at, at + layer.rank)
        lora_B[slices[index], columns] = layer.lora_B
        at += layer.rank
    magnitudes = [layer.magnitude for _, layer in present if layer.magnitude is not None]
    return LoraLayer(lora_A, lora_B, alpha, torch.cat(magnitudes) if magnitudes else None)


def _of_one_scale(present: Sequence[tuple[int, LoraLayer]]) -> list[tuple[int, LoraLayer]]:
    """Multiply into each layer what its scale differs by from the first's."""
    lora = Lora({str(index): layer for index, layer in present})
    scaled, _ = with_one_alpha(lora, present[0][1].scale, one_rank=False)
    return [(int(name), layer) for name, layer in scaled.layers.items()]
