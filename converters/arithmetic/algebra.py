"""LoRA arithmetic: merge, scale, resize, and how far one LoRA is from another.

An update is never formed as the ``(out, in)`` matrix that it is: QR of both factors leaves an r x r core with the same
singular values, which is small however wide the layer. All of it in float64, one layer at a time.
"""

import math
from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from converters.full_update import SumOfUpdates
from converters.lora import Lora, LoraLayer, layer_to_dtype

Parts = Sequence[tuple[Lora, float]]
LayerParts = Sequence[tuple[LoraLayer, float]]
# What is no longer true of a LoRA that was computed from others; readers take its name from the file then.
_STALE_METADATA = frozenset(
    {"ss_output_name", "modelspec.title", "ss_network_dim", "ss_network_alpha", "ss_network_args"}
)


def merge(parts: Parts, rank: int | None = None, dtype: torch.dtype | None = None) -> tuple[Lora, dict[str, float]]:
    """Return the weighted sum of LoRAs, ``[(lora, weight), ...]``, and each layer's error over its norm, 0 to 1.

    Factors are concatenated: a layer's rank is the sum of its ranks, and there is no error, unless it is cut to the
    nearest update of ``rank`` (Eckart-Young). A layer that one part alone has, of weight 1 and narrow enough, keeps its
    bits. Of the metadata stays what all parts agree on.

    Args:
        rank: at most so much; one for all layers, because diffusers loses others.
        dtype: of the result; None takes the widest of the parts. Rounding to it is not part of the error.

    Raises:
        ValueError: no parts, other families or shapes, DoRA in a sum, a weight that is not finite, a rank below 1, a
            value beyond ``dtype``.
    """
    if not parts:
        raise ValueError("there are no LoRAs to merge; pass at least one")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; choose 1 or more")
    families = sorted({lora.family for lora, _ in parts if lora.family})
    if len(families) > 1:
        raise ValueError(f"the LoRAs are for {' and '.join(families)}; merge those of one family of base models")
    dtype = dtype or _widest_dtype(lora for lora, _ in parts)
    layers, errors = {}, {}
    full_updates = _merge_full_updates(parts, rank)
    for name in dict.fromkeys(name for lora, _ in parts for name in lora.layers if name not in full_updates):
        own = [(lora.layers[name], weight) for lora, weight in parts if name in lora.layers]
        layers[name], errors[name] = _merge_layer(name, own, rank, dtype)
    common = set.intersection(*(set(lora.metadata.items()) for lora, _ in parts))
    metadata = {key: value for key, value in sorted(common) if key not in _STALE_METADATA}
    embeddings, notes = _merge_embeddings([lora for lora, _ in parts])
    family = families[0] if families else ""
    return Lora(layers, family, metadata, full_updates, embeddings, notes), errors


def resize(
    lora: Lora, rank: int | None = None, energy: float | None = None, dtype: torch.dtype | None = None
) -> tuple[Lora, dict[str, float]]:
    """Return the nearest LoRA of a lower rank, and each layer's error over its norm; see `merge`. DoRA stays DoRA.

    Args:
        energy: in place of a rank: the lowest one at which every layer keeps this share of its squared norm.

    Raises:
        ValueError: neither or both of rank and energy, one out of range, or a value beyond ``dtype``.
    """
    if (rank is None) == (energy is None):
        raise ValueError("pass either a rank or a share of energy to keep")
    return merge([(lora, 1.0)], find_rank(lora, energy) if rank is None else rank, dtype)


def find_rank(lora: Lora, energy: float) -> int:
    """Return the lowest rank at which every layer keeps ``energy``, above 0 and at most 1, of its squared norm."""
    if not 0 < energy <= 1:
        raise ValueError(f"the energy to keep is {energy}; choose a share above 0 and at most 1")
    rank = 1
    for layer in lora.layers.values():
        kept = singular_values(*matrices(layer)).square().cumsum(0)
        rank = max(rank, 1 + int((kept < energy * kept[-1]).sum()))
    return rank


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
    """Return ``lora_A`` ``(rank, in)``, ``lora_B`` ``(out, rank)`` float64, the scale in ``lora_B``, kernels flat."""
    return layer.lora_A.double().flatten(1), layer.lora_B.double().flatten(1) * layer.scale


def to_layer(
    name: str,
    lora_A: Tensor,
    lora_B: Tensor,
    in_shape: Sequence[int],
    dtype: torch.dtype,
    magnitude: Tensor | None = None,
) -> LoraLayer:
    """Return ``lora_A`` ``(rank, in)`` and ``lora_B`` ``(out, rank)`` as a layer of scale 1.

    Args:
        in_shape: ``(in,)``, or ``(in, height, width)`` of a convolution, whose kernel ``lora_A`` has flattened.

    Raises:
        ValueError: a value that is not finite in ``dtype``.
    """
    lora_A = lora_A.float().unflatten(1, tuple(in_shape))
    lora_B = lora_B.float().reshape(*lora_B.shape, *(1 for _ in in_shape[1:]))
    return layer_to_dtype(name, LoraLayer(lora_A, lora_B, float(len(lora_A)), magnitude), dtype)


def update_norm(lora_A: Tensor, lora_B: Tensor) -> float:
    """Return the Frobenius norm of ``lora_B @ lora_A`` by Gram matrices; to 1e-8 of the norm if they cancel."""
    return ((lora_B.mT @ lora_B) * (lora_A @ lora_A.mT)).sum().clamp(min=0).sqrt().item()


def factor_svd(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of ``lora_B @ lora_A``: ``(out, k)``, ``(k,)`` descending, ``(k, in)``; k <= rank."""
    A_q, A_r = torch.linalg.qr(lora_A.mT)
    B_q, B_r = torch.linalg.qr(lora_B)
    left, singular, right = torch.linalg.svd(B_r @ A_r.mT, full_matrices=False)
    return B_q @ left, singular, right @ A_q.mT


def singular_values(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Return the singular values of ``lora_B @ lora_A``, ``(k,)`` descending; k is at most the rank."""
    A_r, B_r = (torch.linalg.qr(tensor, mode="r").R for tensor in (lora_A.mT, lora_B))
    return torch.linalg.svdvals(B_r @ A_r.mT)


def _merge_full_updates(parts: Parts, rank: int | None) -> dict[str, SumOfUpdates]:
    """Return the sums on layers where some part has an update that is no LoRA."""
    sums = {}
    for name in dict.fromkeys(name for lora, _ in parts for name in lora.full_updates):
        if rank is not None:
            raise ValueError(f"the update of {name} is no LoRA, and keeps its rank; hdb convert --rank makes one of it")
        terms = [(updates[name], weight) for lora, weight in parts for updates in (lora.layers, lora.full_updates)
                 if name in updates]  # fmt: skip
        try:
            sums[name] = SumOfUpdates(tuple(terms))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
    return sums


def _merge_embeddings(loras: Sequence[Lora]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the embeddings that come with any of the LoRAs, and what reading those and this took."""
    embeddings: dict[str, Tensor] = {}
    notes = [note for lora in loras for note in lora.notes]
    for lora in loras:
        for name, tensor in lora.embeddings.items():
            if not torch.equal(embeddings.setdefault(name, tensor), tensor):
                notes.append(f"{name} left out, of which the first LoRA that has it has another")
    return embeddings, tuple(dict.fromkeys(notes))


def _merge_layer(name: str, parts: LayerParts, rank: int | None, dtype: torch.dtype) -> tuple[LoraLayer, float]:
    first, weight = parts[0]
    if len(parts) == 1 and weight == 1 and (rank is None or first.rank <= rank):
        return layer_to_dtype(name, first, dtype), 0.0
    lora_A, lora_B = _concatenate(name, parts)
    error = 0.0
    if rank is not None and len(lora_A) > rank:
        left, singular, right = factor_svd(lora_A, lora_B)
        root = singular[:rank].sqrt()
        lora_A, lora_B = right[:rank] * root[:, None], left[:, :rank] * root
        error = _share(singular[rank:].norm().item(), singular.norm().item())
    return to_layer(name, lora_A, lora_B, first.lora_A.shape[1:], dtype, first.magnitude), error


def _concatenate(name: str, parts: LayerParts) -> tuple[Tensor, Tensor]:
    """Return ``lora_A`` and ``lora_B`` of the weighted sum of one layer's updates, float64."""
    lora_As, lora_Bs = [], []
    for layer, weight in parts:
        if layer.magnitude is not None and (weight != 1 or len(parts) > 1):
            raise ValueError(f"layer {name} is DoRA, whose update needs the base model; take it whole and alone")
        if not math.isfinite(weight):
            raise ValueError(f"a LoRA has the weight {weight}; choose a finite number")
        lora_A, lora_B = matrices(layer)
        lora_As.append(lora_A)
        lora_Bs.append(lora_B * weight)
    shapes = {(lora_B.shape[0], lora_A.shape[1]) for lora_A, lora_B in zip(lora_As, lora_Bs, strict=True)}
    if len(shapes) > 1:
        raise ValueError(f"the updates of {name} have shapes {sorted(shapes)}; take LoRAs of one base model")
    return torch.cat(lora_As), torch.cat(lora_Bs, dim=1)


def _widest_dtype(loras: Iterable[Lora]) -> torch.dtype:
    dtypes = (tensor.dtype for lora in loras for layer in lora.layers.values() for tensor in layer.tensors())
    return reduce(torch.promote_types, dtypes)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0
