"""LoRA arithmetic: merge, scale, resize, and how far one LoRA is from another.

An update is never formed as a full ``(out, in)`` matrix: QR of both factors leaves an r x r core with the same singular
values, which is small however wide the layer. Everything is computed in float64, one layer at a time.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from converters.arithmetic.ranks import RankRule
from converters.full_update import SumOfUpdates
from converters.layer import LoraLayer
from converters.lora import Lora, has_alpha_of_its_own, layer_to_dtype

Parts = Sequence[tuple[Lora, float]]
LayerParts = Sequence[tuple[LoraLayer, float]]
# Metadata that no longer hold for a computed LoRA; programs then use its file name.
_STALE_METADATA = frozenset(
    {"ss_output_name", "modelspec.title", "ss_network_dim", "ss_network_alpha", "ss_network_args"}
)


def merge(
    parts: Parts, rank: RankRule | int | None = None, dtype: torch.dtype | None = None
) -> tuple[Lora, dict[str, float]]:
    """Return the weighted sum of LoRAs, ``[(lora, weight), ...]``, and each layer's error over its norm, 0 to 1.

    Factors are concatenated: a layer's rank is the sum of its ranks, and there is no error, unless it is cut to the
    nearest update of a rank (Eckart-Young). A layer that only one part has, with weight 1 and low enough rank, stays
    identical bit by bit. Alphas are those of the parts if programs heed them, else the most common one. Metadata are
    kept if all parts agree on them.

    Args:
        rank: largest rank of a layer, or a rule for each.
        dtype: dtype of the result; None uses the widest of the parts. Rounding to it is not part of the error.

    Raises:
        ValueError: no parts, differing families or shapes, DoRA in a sum, a weight that is not finite, a rank below 1,
            or a value beyond ``dtype``.
    """
    if not parts:
        raise ValueError("there are no LoRAs to merge; pass at least one")
    rule = RankRule(rank) if isinstance(rank, int) else rank
    families = sorted({lora.family for lora, _ in parts if lora.family})
    if len(families) > 1:
        raise ValueError(f"the LoRAs are for {' and '.join(families)}; merge those of one family of base models")
    dtype = dtype or _widest_dtype(lora for lora, _ in parts)
    layers, errors = {}, {}
    full_updates = _merge_full_updates(parts, rule)
    alphas = Counter(layer.alpha for lora, _ in parts for layer in lora.layers.values())
    common_alpha = alphas.most_common(1)[0][0] if len(parts) > 1 and alphas else None
    for name in dict.fromkeys(name for lora, _ in parts for name in lora.layers if name not in full_updates):
        own = [(lora.layers[name], weight) for lora, weight in parts if name in lora.layers]
        layers[name], errors[name] = _merge_layer(name, own, rule, dtype, common_alpha)
    common = set.intersection(*(set(lora.metadata.items()) for lora, _ in parts))
    metadata = {key: value for key, value in sorted(common) if key not in _STALE_METADATA}
    embeddings, notes = _merge_embeddings([lora for lora, _ in parts])
    family = families[0] if families else ""
    return Lora(layers, family, metadata, full_updates, embeddings, notes), errors


def resize(lora: Lora, rank: RankRule | int, dtype: torch.dtype | None = None) -> tuple[Lora, dict[str, float]]:
    """Return the nearest LoRA of lower ranks, and each layer's error over its norm; see `merge`. DoRA stays DoRA.

    Layers keep their alphas, and those of low enough rank stay identical bit by bit.

    Raises:
        ValueError: a rank below 1, or a value beyond ``dtype``.
    """
    return merge([(lora, 1.0)], rank, dtype)


def relative_errors(lora: Lora, reference: Lora) -> dict[str, float]:
    """Return, for each layer of either, the norm of the difference of the two updates over that of the reference's.

    It is infinite for a layer without an update in the reference.
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
    alpha: float | None = None,
) -> LoraLayer:
    """Return ``lora_A`` ``(rank, in)`` and ``lora_B`` ``(out, rank)`` as a layer.

    Args:
        alpha: of the layer, whose scale ``lora_B`` is divided by; None is the rank.
        in_shape: ``(in,)``, or ``(in, height, width)`` of a convolution, whose kernel ``lora_A`` has flattened.

    Raises:
        ValueError: a value that is not finite in ``dtype``.
    """
    alpha = float(len(lora_A)) if alpha is None else alpha
    lora_A = lora_A.float().unflatten(1, tuple(in_shape))
    lora_B = (lora_B * (len(lora_A) / alpha)).float().reshape(*lora_B.shape, *(1 for _ in in_shape[1:]))
    return layer_to_dtype(name, LoraLayer(lora_A, lora_B, alpha, magnitude), dtype)


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


def _merge_full_updates(parts: Parts, rule: RankRule | None) -> dict[str, SumOfUpdates]:
    """Return the sums for layers where some part has an update other than a LoRA."""
    sums = {}
    for name in dict.fromkeys(name for lora, _ in parts for name in lora.full_updates):
        if rule is not None:
            raise ValueError(
                f"the update of {name} is not a LoRA, and keeps its rank; hdb convert --rank makes one of it"
            )
        terms = [(updates[name], weight) for lora, weight in parts for updates in (lora.layers, lora.full_updates)
                 if name in updates]  # fmt: skip
        try:
            sums[name] = SumOfUpdates(tuple(terms))
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
    return sums


def _merge_embeddings(loras: Sequence[Lora]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the embeddings bundled with any of the LoRAs, and the notes of reading and merging."""
    embeddings: dict[str, Tensor] = {}
    notes = [note for lora in loras for note in lora.notes]
    for lora in loras:
        for name, tensor in lora.embeddings.items():
            if not torch.equal(embeddings.setdefault(name, tensor), tensor):
                notes.append(f"{name} left out, of which the first LoRA that has it has another")
    return embeddings, tuple(dict.fromkeys(notes))


def _merge_layer(
    name: str, parts: LayerParts, rule: RankRule | None, dtype: torch.dtype, common_alpha: float | None
) -> tuple[LoraLayer, float]:
    """Return one layer of the sum, and its error; ``common_alpha`` is that of layers whose own readers do not heed."""
    first, weight = parts[0]
    keeps_alpha = common_alpha is None or (len(parts) == 1 and has_alpha_of_its_own(name))
    alpha = first.alpha if keeps_alpha else common_alpha
    is_first_alone = len(parts) == 1 and weight == 1 and alpha == first.alpha
    highest = math.inf if rule is None else rule.highest(first.is_convolution)
    is_measured = rule is not None and rule.measure != ""
    if is_first_alone and first.rank <= highest and not is_measured:
        return layer_to_dtype(name, first, dtype), 0.0
    lora_A, lora_B = _concatenate(name, parts)
    error = 0.0
    if rule is not None and (is_measured or len(lora_A) > highest):
        left, singular, right = factor_svd(lora_A, lora_B)
        rank = rule.choose(singular, first.is_convolution)
        if is_first_alone and rank >= first.rank:
            return layer_to_dtype(name, first, dtype), 0.0
        root = singular[:rank].sqrt()
        lora_A, lora_B = right[:rank] * root[:, None], left[:, :rank] * root
        error = _share(singular[rank:].norm().item(), singular.norm().item())
    return to_layer(name, lora_A, lora_B, first.lora_A.shape[1:], dtype, first.magnitude, alpha), error


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
    dtypes = [tensor.dtype for lora in loras for layer in lora.layers.values() for tensor in layer.tensors()]
    return reduce(torch.promote_types, dtypes or [torch.float32])  # there may be none but updates that are no LoRA


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0
