"""LoRA arithmetic: merge, scale, resize, and how far one LoRA is from another.

An update is never formed as the ``(out, in)`` matrix that it is: QR of both factors leaves an r x r core with the same
singular values, which is small however wide the layer. All of it in float64, one layer at a time.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from .lora import Lora, LoraLayer, to_dtype

Parts = Sequence[tuple[Lora, float]]
# What is no longer true of a LoRA that was computed from others; readers take its name from the file then.
_STALE_METADATA = frozenset(
    {"ss_output_name", "modelspec.title", "ss_network_dim", "ss_network_alpha", "ss_network_args"}
)


def merge(parts: Parts, dtype: torch.dtype | None = None) -> Lora:
    """Return the weighted sum of LoRAs, ``[(lora, weight), ...]``, by concatenating their factors; no SVD.

    A layer's rank is the sum of its ranks, and only rounding to ``dtype`` (None: the widest of theirs) is lost. One
    part is scaled. A layer that some parts lack is that of the others. Of the metadata stays what all parts agree on.

    Raises:
        ValueError: no parts, other families or shapes, DoRA, a weight that is not finite, a sum beyond ``dtype``.
    """
    if not parts:
        raise ValueError("there are no LoRAs to merge; pass at least one")
    families = sorted({lora.family for lora, _ in parts if lora.family})
    if len(families) > 1:
        raise ValueError(f"the LoRAs are for {' and '.join(families)}; merge those of one family of base models")
    dtype = dtype or _widest_dtype(lora for lora, _ in parts)
    layers = {}
    for name in dict.fromkeys(name for lora, _ in parts for name in lora.layers):
        own = [(lora.layers[name], weight) for lora, weight in parts if name in lora.layers]
        first = own[0][0]
        layers[name] = to_layer(name, *_concatenate(name, own), first.down.shape[1:], dtype, first.magnitude)
    common = set.intersection(*(set(lora.metadata.items()) for lora, _ in parts))
    return Lora(layers, families[0] if families else "", _fresh_metadata(dict(sorted(common))))


def resize(
    lora: Lora, rank: int | None = None, energy: float | None = None, dtype: torch.dtype | None = None
) -> tuple[Lora, dict[str, float]]:
    """Return the nearest LoRA of a lower rank (Eckart-Young), and each layer's error over its norm, 0 to 1.

    Layers of that rank or less keep their bits, and DoRA its magnitudes. It is one rank for all layers, because
    diffusers loses others.

    Args:
        rank: the new rank.
        energy: in place of a rank: the lowest one at which every layer keeps this share of its squared norm.
        dtype: of the result; None takes the file's. Rounding to it is not part of the error.

    Raises:
        ValueError: neither or both of rank and energy, one out of range, or a value beyond ``dtype``.
    """
    if (rank is None) == (energy is None):
        raise ValueError("pass either a rank or a share of energy to keep")
    rank = find_rank(lora, energy) if rank is None else rank
    if rank < 1:
        raise ValueError(f"rank is {rank}; choose 1 or more")
    dtype = dtype or _widest_dtype([lora])
    layers, errors = {}, {}
    for name, layer in lora.layers.items():
        if layer.rank <= rank:
            layers[name], errors[name] = _in_dtype(name, layer, dtype), 0.0
            continue
        left, singular, right = factor_svd(*matrices(layer))
        root = singular[:rank].sqrt()
        down, up = right[:rank] * root[:, None], left[:, :rank] * root
        layers[name] = to_layer(name, down, up, layer.down.shape[1:], dtype, layer.magnitude)
        errors[name] = _share(singular[rank:].norm().item(), singular.norm().item())
    return replace(lora, layers=layers, metadata=_fresh_metadata(lora.metadata)), errors


def find_rank(lora: Lora, energy: float) -> int:
    """Return the lowest rank at which every layer keeps ``energy``, above 0 and at most 1, of its squared norm."""
    if not 0 < energy <= 1:
        raise ValueError(f"the energy to keep is {energy}; choose a share above 0 and at most 1")
    rank = 1
    for layer in lora.layers.values():
        kept = singular_values(*matrices(layer)).square().cumsum(0)
        rank = max(rank, 1 + int((kept < energy * kept[-1]).sum()))
    return rank


def update_norms(lora: Lora) -> dict[str, float]:
    """Return the Frobenius norm of each layer's update."""
    return {name: update_norm(*matrices(layer)) for name, layer in lora.layers.items()}


def relative_errors(lora: Lora, reference: Lora) -> dict[str, float]:
    """Return, for each layer of either, the norm of the difference of the two updates over that of the reference's.

    It is infinite for a layer that changes nothing in the reference.
    """
    errors = {}
    for name in dict.fromkeys([*reference.layers, *lora.layers]):
        own = [(part.layers[name], sign) for part, sign in ((reference, 1.0), (lora, -1.0)) if name in part.layers]
        norm = singular_values(*_concatenate(name, own[:1])).norm().item() if name in reference.layers else 0.0
        errors[name] = _share(singular_values(*_concatenate(name, own)).norm().item(), norm)
    return errors


def matrices(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """Return ``down`` ``(rank, in)`` and ``up`` ``(out, rank)`` in float64, the scale in ``up``, kernels flattened."""
    return layer.down.double().flatten(1), layer.up.double().flatten(1) * layer.scale


def to_layer(
    name: str, down: Tensor, up: Tensor, in_shape: Sequence[int], dtype: torch.dtype, magnitude: Tensor | None = None
) -> LoraLayer:
    """Return ``down`` ``(rank, in)`` and ``up`` ``(out, rank)`` as a layer of scale 1.

    Args:
        in_shape: ``(in,)``, or ``(in, height, width)`` of a convolution, whose kernel ``down`` has flattened.

    Raises:
        ValueError: a value that is not finite in ``dtype``.
    """
    down = down.float().unflatten(1, tuple(in_shape))
    up = up.float().reshape(*up.shape, *(1 for _ in in_shape[1:]))
    return _in_dtype(name, LoraLayer(down, up, float(len(down)), magnitude), dtype)


def update_norm(down: Tensor, up: Tensor) -> float:
    """Return the Frobenius norm of ``up @ down`` by the factors' Gram matrices; to 1e-8 of the norm if they cancel."""
    return ((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0).sqrt().item()


def factor_svd(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of ``up @ down``: ``(out, k)``, ``(k,)`` descending, ``(k, in)``; k is at most the rank."""
    down_q, down_r = torch.linalg.qr(down.mT)
    up_q, up_r = torch.linalg.qr(up)
    left, singular, right = torch.linalg.svd(up_r @ down_r.mT, full_matrices=False)
    return up_q @ left, singular, right @ down_q.mT


def singular_values(down: Tensor, up: Tensor) -> Tensor:
    """Return the singular values of ``up @ down``, ``(k,)`` descending; k is at most the rank."""
    down_r, up_r = (torch.linalg.qr(tensor, mode="r").R for tensor in (down.mT, up))
    return torch.linalg.svdvals(up_r @ down_r.mT)


def _concatenate(name: str, parts: Sequence[tuple[LoraLayer, float]]) -> tuple[Tensor, Tensor]:
    """Return ``down`` and ``up`` of the weighted sum of one layer's updates, float64."""
    downs, ups = [], []
    for layer, weight in parts:
        if layer.magnitude is not None and (weight != 1 or len(parts) > 1):
            raise ValueError(f"layer {name} is DoRA, whose update needs the base model; take it whole and alone")
        if not math.isfinite(weight):
            raise ValueError(f"a LoRA has the weight {weight}; choose a finite number")
        down, up = matrices(layer)
        downs.append(down)
        ups.append(up * weight)
    shapes = {(up.shape[0], down.shape[1]) for down, up in zip(downs, ups, strict=True)}
    if len(shapes) > 1:
        raise ValueError(f"the updates of {name} have shapes {sorted(shapes)}; take LoRAs of one base model")
    return torch.cat(downs), torch.cat(ups, dim=1)


def _fresh_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key not in _STALE_METADATA}


def _in_dtype(name: str, layer: LoraLayer, dtype: torch.dtype) -> LoraLayer:
    return to_dtype(Lora({name: layer}), dtype).layers[name]


def _widest_dtype(loras: Iterable[Lora]) -> torch.dtype:
    dtypes = (tensor.dtype for lora in loras for layer in lora.layers.values() for tensor in layer.tensors())
    return reduce(torch.promote_types, dtypes)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0
