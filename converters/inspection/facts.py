"""What the tensors of an adapter file say, layer by layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from converters.arithmetic.algebra import matrices, update_norm
from converters.formats.layout import AdapterModule
from converters.formats.lora_config import layer_alpha, stated_number
from converters.formats.module import Module, read_module
from converters.formats.reading import Source, known_place
from converters.key_maps import block_name
from converters.layer import is_finite
from converters.shapes import has_layer
from lidb_peft.families import COMPONENTS, DENOISERS, FAMILIES

Configs = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class ModuleFacts:
    """What one adapted layer's tensors say; ``rank`` and ``in_features`` are 0 where they cannot be told.

    ``layer`` is our name, "" of a module of another model. ``norm`` is the Frobenius norm of the update, None of broken
    layers and of what is not read; ``num_weights`` how many numbers of the model it changes, ``num_dims`` those of
    lora_A. ``config_error`` says how PEFT's config is at odds with the tensors.
    """

    name: str
    layer: str
    component: str
    rank: int
    in_features: int
    alpha: float | None
    alpha_is_scalar: bool
    has_non_finite: bool
    is_zero: bool
    is_complete: bool
    norm: float | None
    num_weights: int = 1
    num_dims: int = 0
    config_error: str = ""


@dataclass(frozen=True)
class LayerStatistics:
    """What one adapted layer does.

    Args:
        name: the module's, in the file.
        block: what block weights call the part of the model that it is in, after its component: ``unet IN04``.
        rank: 0 where it cannot be told.
        alpha: None where nothing says it.
        norm: Frobenius norm of its update; None of broken layers and of what is not read.
        rms: root of the mean square of what it adds to a number of the weight.
    """

    name: str
    block: str
    rank: int
    alpha: float | None
    norm: float | None
    rms: float | None


@dataclass(frozen=True)
class BlockStatistics:
    """What the layers of one block do together; see `LayerStatistics`."""

    num_layers: int
    ranks: tuple[int, ...]
    norm: float
    rms: float


def layer_statistics(modules: Sequence[ModuleFacts], base: str) -> tuple[LayerStatistics, ...]:
    """Return what each module of an adapter for the family ``base`` does; of another model's, by component."""
    return tuple(
        LayerStatistics(
            module.name,
            _block(module, base),
            module.rank,
            module.alpha,
            module.norm,
            None if module.norm is None else module.norm / math.sqrt(module.num_weights),
        )
        for module in modules
    )


def block_statistics(layers: Sequence[LayerStatistics]) -> dict[str, BlockStatistics]:
    """Return block -> what it does, in the order of the model; layers without a norm are left out."""
    blocks: dict[str, list[LayerStatistics]] = {}
    for layer in layers:
        if layer.norm:
            blocks.setdefault(layer.block, []).append(layer)
    found = {}
    for block, own in sorted(blocks.items(), key=lambda item: _place_of(item[0])):
        norm = math.hypot(*(layer.norm for layer in own if layer.norm))
        num_weights = sum((layer.norm / layer.rms) ** 2 for layer in own if layer.norm and layer.rms)
        if math.isfinite(norm) and num_weights:
            ranks = tuple(sorted({layer.rank for layer in own if layer.rank}))
            found[block] = BlockStatistics(len(own), ranks, norm, norm / math.sqrt(num_weights))
    return found


def _block(module: ModuleFacts, base: str) -> str:
    fitting = [base] if base in FAMILIES else [name for name in FAMILIES if has_layer(module.layer, name)]
    block = block_name(module.layer, fitting[0]) if module.layer and fitting else ""
    return f"{module.component} {block}" if block and module.component in DENOISERS else module.component


def _place_of(block: str) -> tuple[int, int, str]:
    """Where a block stands: in lists of block weights, which go through the model, behind its component."""
    component, _, name = block.partition(" ")
    order = list(dict.fromkeys(name for family in FAMILIES.values() for name in family.block_lists[-1]))
    position = COMPONENTS.index(component) if component in COMPONENTS else len(COMPONENTS)
    return position, order.index(name) if name in order else -1, block


def gather_facts(source: Source, tensors: Mapping[str, Tensor], configs: Configs) -> list[ModuleFacts]:
    """Say what each layer's tensors, of all those of a file, hold."""
    return [_facts(source, module, tensors, configs) for module in source.layout.modules.values()]


def _facts(source: Source, module: AdapterModule, tensors: Mapping[str, Tensor], configs: Configs) -> ModuleFacts:
    place = known_place(source, module)
    layer = place.layers[0] if place else ""
    component = layer.partition(".")[0] or module.component
    config = configs.get(component, configs.get("", {}))
    parts = {role: tensors[names[0]] for role, names in module.parts.items()}
    lora_A, lora_B, stored_alpha = (parts.get(role) for role in ("lora_A", "lora_B", "alpha"))
    shape = () if lora_A is None else lora_A.shape
    path = layer.partition(".")[2] or module.name
    rank, alpha, config_error = _rank_and_alpha(path, shape, _number(stored_alpha), config)
    read = _read(parts, module, alpha)
    full = next(iter(read.full_updates.values()), None) if read else None
    is_sound = all(is_finite(tensor) for role, tensor in parts.items() if role != "alpha")
    factors = [tensor for role in ("lora_A", "lora_B", "lidb") for tensor in _all(module, role, tensors)]
    return ModuleFacts(
        name=module.name,
        layer=layer,
        component=component,
        rank=rank,
        in_features=_width(shape if full is None else full.shape),
        alpha=alpha,
        alpha_is_scalar=stored_alpha is None or stored_alpha.dim() == 0,
        has_non_finite=not is_sound,
        is_zero=any(not tensor.any() for tensor in factors),
        is_complete=(lora_A is None) == (lora_B is None),
        norm=_norm(read) if read else None,
        num_weights=_num_weights(read) if read else 1,
        num_dims=len(shape),
        config_error=config_error,
    )


def _all(module: AdapterModule, role: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in module.parts.get(role, ())]


def _width(shape: Sequence[int]) -> int:
    return shape[1] if len(shape) > 1 else 0


def _read(parts: Mapping[str, Tensor], module: AdapterModule, alpha: float | None) -> Module | None:
    """Return the update that our commands would read; None if they would not."""
    is_kohyas = any(name.endswith(".dora_scale") for name in module.parts.get("dora", ()))
    try:
        return read_module(parts, is_kohyas, alpha)
    except ValueError:
        return None


def _number(alpha: Tensor | None) -> float | None:
    """What readers take an alpha for; NaN if it is no real number."""
    if alpha is None:
        return None
    return alpha.flatten()[0].double().item() if alpha.numel() and not alpha.is_complex() else math.nan


def _rank_and_alpha(
    name: str, shape: Sequence[int], alpha: float | None, config: Mapping[str, object]
) -> tuple[int, float | None, str]:
    """Return a layer's rank and alpha, from PEFT's config where the tensors do not tell, and what is wrong with it."""
    rank = shape[0] if shape else 0
    try:
        if not shape:
            rank = int(stated_number(config, "r", name, "the config") or 0)
        elif alpha is None and config and config.get("peft_type", "LORA") == "LORA":
            alpha = layer_alpha(config, name, rank, "the config")
    except ValueError as error:
        return rank, alpha, str(error)
    return rank, alpha, ""


def _norm(read: Module) -> float | None:
    """The norm of an update, as it is added to a weight; DoRA's as that of the LoRA in it."""
    norms = [update.delta().norm().item() for update in read.full_updates.values()]
    if read.layer is not None:
        norms.append(update_norm(*matrices(read.layer)))
    norm = math.hypot(*norms)
    return norm if norms and math.isfinite(norm) else None


def _num_weights(read: Module) -> int:
    layer = read.layer
    sizes = [update.shape.numel() for update in read.full_updates.values()]
    return max([*sizes, *([] if layer is None else [len(layer.lora_B) * layer.lora_A[0].numel()])], default=1)
