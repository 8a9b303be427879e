"""LoRAs from other updates, that is LoHa, LoKr and whole differences, by truncated SVD."""

from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from converters.arithmetic.algebra import to_layer
from converters.arithmetic.checkpoint import leading_columns
from converters.full_update import FullUpdate, SumOfUpdates
from converters.layer import LoraLayer, held
from converters.lora import Lora
from converters.shapes import kernel_side
from lidb_peft.safe_read import count, examples


def to_low_rank(lora: Lora, rank: int, dtype: torch.dtype | None = None) -> Lora:
    """Return a LoRA whose full updates are replaced by their nearest ones of ``rank``; its notes report the errors.

    One layer's update is in memory at a time. Norms and biases, which no LoRA holds, are left out and named.

    Args:
        dtype: dtype of the new layers; None uses that of the original numbers.

    Raises:
        ValueError: a layer has both a LoRA and another update, a rank below 1, or a value beyond ``dtype``.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; choose 1 or more")
    layers, errors, left_out = dict(lora.layers), {}, []
    for name, update in lora.full_updates.items():
        if name in layers:
            raise ValueError(f"layer {name} has a LoRA and a {update.algorithm}; hdb merge --into adds both to a model")
        delta = update.delta()
        if delta.dim() < 2:
            left_out.append(name)
            continue
        matrix = delta.flatten(1)
        left, errors[name] = leading_columns(matrix, min(rank, *matrix.shape))
        dtype_of_layer = dtype or _dtype(update)
        layers[name] = to_layer(name, left.mT @ matrix, left, _in_shape(name, delta), dtype_of_layer, alpha=float(rank))
    notes = list(lora.notes)
    if errors:
        algorithms = " and ".join(sorted({lora.full_updates[name].algorithm for name in errors}))
        worst = max(errors, key=errors.__getitem__)
        notes.append(
            f"{algorithms} of {count(list(errors), 'layer')} becomes LoRA of rank {rank}: layers miss"
            f" {median(errors.values()):.1%} of their norm in the median, {errors[worst]:.1%} at most ({worst})"
        )
    if left_out:
        notes.append(f"{count(left_out, 'difference')} of norms and biases, which no LoRA holds, left out:"
                     f" {examples(left_out)}")  # fmt: skip
    if not layers:
        raise ValueError(
            "it holds differences of norms and biases only, which no LoRA holds; hdb merge --into adds them"
        )
    return replace(lora, layers=layers, full_updates={}, notes=tuple(notes))


def _in_shape(layer: str, delta: Tensor) -> tuple[int, ...]:
    """The input shape of a layer's ``lora_A``; LyCORIS flattens a convolution's kernel."""
    side = kernel_side(layer) or 0
    if delta.dim() == 2 and side > 1 and delta.shape[1] % side**2 == 0:
        return delta.shape[1] // side**2, side, side
    return tuple(delta.shape[1:])


def _tensors(update: LoraLayer | FullUpdate | SumOfUpdates) -> list[Tensor]:
    if isinstance(update, SumOfUpdates):
        return [tensor for term, _ in update.terms for tensor in _tensors(term)]
    return list(update.parts.values() if isinstance(update, FullUpdate) else update.tensors())


def _dtype(update: FullUpdate | SumOfUpdates) -> torch.dtype:
    """The widest dtype of an update's tensors, float8 being held as float16."""
    widest = torch.float16
    for index, tensor in enumerate(_tensors(update)):
        dtype = held(tensor).dtype
        widest = torch.promote_types(widest, dtype) if index else dtype
    return widest
