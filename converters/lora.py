"""A LoRA in memory: what every file format is read into and written from; its alphas, and its dtype."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from converters.full_update import FullUpdate, SumOfUpdates
from converters.layer import LoraLayer, is_finite, is_power_of_two
from lidb_peft.families import DENOISERS
from lidb_peft.relax import LoraFactors
from lidb_peft.safe_read import count

BECOMES_FLOAT32 = "its numbers become float32, because halves cannot hold them with alpha folded in"
"""A note of folding alphas."""


@dataclass(frozen=True)
class Lora:
    """An adapter of a base model.

    Args:
        layers: layer name, as in ``lidb_peft.naming``, -> its update.
        family: name of one of ``lidb_peft.families``; "" where the file does not tell.
        metadata: what the file says about itself, text to text, without what its format needs for itself.
        full_updates: layer name -> an update that is no LoRA; a bias goes by its layer's name and ``.bias``.
        embeddings: tensors of textual inversions that came in the same file, by their names in it.
        notes: a sentence on each thing that reading the file took.
    """

    layers: dict[str, LoraLayer]
    family: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    full_updates: Mapping[str, FullUpdate | SumOfUpdates] = field(default_factory=dict)
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def factors(self) -> LoraFactors:
        """Return plain float32 factors, ``alpha / rank`` folded into ``lora_B``; 1x1 convolutions become matrices.

        Raises:
            ValueError: a layer is DoRA or a larger convolution, which are no product of two matrices.
        """
        for name, layer in self.layers.items():
            if layer.magnitude is not None or layer.is_convolution:
                what = "a convolution" if layer.is_convolution else "DoRA"
                raise ValueError(f"layer {name} is {what}, which is not a product of two matrices; leave the layer out")
        return {
            name: (layer.lora_A.float().flatten(1), layer.lora_B.float().flatten(1) * layer.scale)
            for name, layer in self.layers.items()
        }


def with_one_alpha(lora: Lora, scale: float | None = None, one_rank: bool = True) -> tuple[Lora, list[str]]:
    """Give all layers one rank and one alpha, which diffusers needs, and leave every update as it is.

    Narrower layers are padded with zeros; what their scale differs by is multiplied into ``lora_B``. Where halves
    cannot hold that to the last bit, as among float16's subnormals, all becomes float32.

    Args:
        scale: of all layers; None takes that of the first of the widest layers.
        one_rank: False leaves every layer its rank, and gives all one scale only.

    Returns:
        the LoRA, and a sentence on each thing that was done to it.
    """
    rank = max(layer.rank for layer in lora.layers.values())
    widest = next(layer for layer in lora.layers.values() if layer.rank == rank)
    alpha = widest.alpha if scale is None else scale * rank
    # Products before the division: 1 / 49 * 49 is not 1.
    ratios = {name: (layer.alpha * rank) / (layer.rank * alpha) for name, layer in lora.layers.items()}
    folded, notes = _fold_alphas(lora, ratios)
    layers = {}
    for name, layer in folded.layers.items():
        if one_rank:
            padded = layer if layer.rank == rank else layer.later(partial(_padded, rank=rank))
            layers[name] = padded.with_alpha(alpha)
        else:
            layers[name] = layer if ratios[name] == 1 else layer.with_alpha(alpha * layer.rank / rank)
    num_padded = sum(layer.rank < rank for layer in lora.layers.values())
    if num_padded and one_rank:
        padding = f"{num_padded} layers are padded with zeros to rank {rank}"
        notes.insert(len(notes) - any(ratio != 1 for ratio in ratios.values()), padding)
    return replace(folded, layers=layers), notes


def has_alpha_of_its_own(name: str) -> bool:
    """Whether diffusers heeds the alpha of a layer in a kohya file (0.42, run); of others it takes the commonest."""
    return name.partition(".")[0] in DENOISERS and ".attn" not in name


def with_shared_alphas(lora: Lora) -> tuple[Lora, list[str]]:
    """Give layers whose alpha diffusers does not heed that of most layers of their component; ranks stay.

    Updates stay as they are; see `with_one_alpha`, which gives all layers one rank and one alpha.
    """
    shared: dict[str, float] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in lora.layers):
        own = {name: layer.alpha for name, layer in lora.layers.items() if name.startswith(f"{component}.")}
        unheeded = {name: alpha for name, alpha in own.items() if not has_alpha_of_its_own(name)}
        if not unheeded:
            continue
        ((alpha, _),) = Counter(unheeded.values()).most_common(1)
        after = Counter(alpha if name in unheeded else value for name, value in own.items())
        is_commonest = all(after[alpha] > num for value, num in after.items() if value != alpha)
        shared |= dict.fromkeys(unheeded if is_commonest else own, alpha)
    ratios = {name: layer.alpha / shared.get(name, layer.alpha) for name, layer in lora.layers.items()}
    folded, notes = _fold_alphas(lora, ratios)
    layers = {name: layer.with_alpha(shared.get(name, layer.alpha)) for name, layer in folded.layers.items()}
    return replace(folded, layers=layers), notes


def _fold_alphas(lora: Lora, ratios: Mapping[str, float]) -> tuple[Lora, list[str]]:
    """Multiply each layer's ``lora_B`` by its ratio, alphas left as they are; and say what that took."""
    folded = [name for name, ratio in ratios.items() if ratio != 1]
    inexact = [name for name in folded if not _is_exact_product(lora.layers[name].loaded().lora_B, ratios[name])]
    needs_float32 = any(lora.layers[name].lora_B.dtype != torch.float32 for name in inexact)
    layers, error = dict(lora.layers), 0.0
    if needs_float32:
        layers = {name: layer.widened(torch.float32) for name, layer in layers.items()}
    for name in inexact:
        error = max(error, _rounding_error(name, layers[name].loaded().lora_B, ratios[name]))
    for name in folded:
        layers[name] = layers[name].later(partial(_folded, name=name, ratio=ratios[name]))
    notes = []
    if needs_float32:
        notes.append(BECOMES_FLOAT32)
    if folded:
        exactness = f"rounded by up to {error:.1e} of the largest number" if error else "which is exact"
        notes.append(f"the alphas of {count(folded, 'layer')} are folded into lora_up, {exactness}")
    return replace(lora, layers=layers), notes


def _is_exact_product(tensor: Tensor, ratio: float) -> bool:
    """Whether the dtype of ``tensor`` loses no bit when it is multiplied by ``ratio``: powers of two, no subnormals."""
    return (is_power_of_two(ratio) or not tensor.any()) and torch.equal(tensor * ratio / ratio, tensor)


def _folded(layer: LoraLayer, name: str, ratio: float) -> LoraLayer:
    # By a power of two float64 and the dtype itself round alike.
    lora_B = (
        layer.lora_B * ratio
        if is_power_of_two(ratio)
        else round_to(name, layer.lora_B.double() * ratio, layer.lora_B.dtype)
    )
    return replace(layer, lora_B=lora_B)


def _rounding_error(name: str, lora_B: Tensor, ratio: float) -> float:
    """The largest error of `_folded`, as a part of the largest entry."""
    exact = lora_B.double() * ratio
    largest = exact.abs().max()
    return ((round_to(name, exact, lora_B.dtype).double() - exact).abs().max() / largest).item() if largest else 0.0


def _padded(layer: LoraLayer, rank: int) -> LoraLayer:
    return replace(layer, lora_A=_pad(layer.lora_A, 0, rank), lora_B=_pad(layer.lora_B, 1, rank))


def _pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    missing = list(tensor.shape)
    missing[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim) if missing[dim] else tensor


def to_dtype(lora: Lora, dtype: torch.dtype) -> Lora:
    """Return ``lora`` in ``dtype``, whose layers are rounded when they are loaded; see `layer_to_dtype`."""
    layers = dict(lora.layers)
    for name, layer in lora.layers.items():
        if any(tensor.dtype != dtype for tensor in layer.tensors()):
            _check_range(name, layer, dtype)
            layers[name] = layer.later(partial(_rounded, name=name, dtype=dtype))
    return replace(lora, layers=layers)


def _check_range(name: str, layer: LoraLayer, dtype: torch.dtype) -> None:
    """Raise now what `layer_to_dtype` would raise."""
    limit = torch.finfo(dtype).max
    if all(torch.finfo(tensor.dtype).max <= limit for tensor in layer.tensors()):
        return
    loaded = layer.loaded()
    # Balancing brings what is large and what is small together, and nothing far beyond the larger.
    if any(abs(extreme) > limit / 4 for tensor in loaded.tensors() for extreme in torch.aminmax(tensor)):
        layer_to_dtype(name, loaded, dtype)


def _rounded(layer: LoraLayer, name: str, dtype: torch.dtype) -> LoraLayer:
    return layer_to_dtype(name, layer, dtype)


def layer_to_dtype(name: str, layer: LoraLayer, dtype: torch.dtype) -> LoraLayer:
    """Return layer ``name`` in ``dtype``; if this rounds it, the norms of lora_A and lora_B are balanced first.

    Raises:
        ValueError: a value is beyond ``dtype``.
    """
    lora_A, lora_B, magnitude = layer.lora_A, layer.lora_B, layer.magnitude
    is_outline = lora_A.is_meta
    if not is_outline and not all(
        torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in (lora_A, lora_B)
    ):
        lora_A, lora_B = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (lora_A, lora_B))
        lora_A, lora_B = balance(lora_A, lora_B)
    magnitude = None if magnitude is None else round_to(name, magnitude, dtype)
    return LoraLayer(round_to(name, lora_A, dtype), round_to(name, lora_B, dtype), layer.alpha, magnitude)


def balance(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Bring each row of ``lora_A`` (r, in) and column of ``lora_B`` (out, r) to the same size; their product stays.

    Only powers of two are moved from one to the other, so float32 loses nothing; the largest entries of the two then
    differ by less than a factor of 4, far inside float16's range for any LoRA that does something.
    """
    A_max = lora_A.abs().flatten(1).amax(1).tolist()
    B_max = lora_B.abs().transpose(0, 1).flatten(1).amax(1).tolist()
    steps = [
        min(max((math.frexp(above)[1] - math.frexp(below)[1]) // 2, -126), 126) if above and below else 0
        for below, above in zip(A_max, B_max, strict=True)
    ]
    # torch.ldexp computes a power in floating point; math.ldexp is exact.
    scale = torch.tensor([math.ldexp(1.0, step) for step in steps], dtype=torch.float32)
    kernel = (1,) * (lora_A.dim() - 2)
    return lora_A * scale.view(-1, 1, *kernel), lora_B / scale.view(1, -1, *kernel)


def round_to(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of layer ``name`` in ``dtype``.

    Raises:
        ValueError: a value is beyond ``dtype``.
    """
    rounded = tensor.to(dtype).contiguous()
    if not is_finite(rounded):
        raise ValueError(
            f"layer {name} reaches {tensor.abs().max().item():.3g}, beyond {torch.finfo(dtype).max:.3g}, the largest"
            f" {str(dtype).removeprefix('torch.')}; write it as float32 or bfloat16"
        )
    return rounded
