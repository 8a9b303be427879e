"""LiDB as a network module of kohya's sd-scripts: ``--network_module lidb_peft.kohya``.

``train_network.py`` and ``sdxl_train_network.py`` import the module that ``--network_module`` names, call its
`create_network` and drive the object they get; what they call decides the names here. Hooks on the adapted layers add
the updates, so the base model is left as it is, and with it what sd-scripts does to it: casting, fp8, checkpointing.

Layers go by diffusers' names whatever sd-scripts calls them, so that a theta trained there is a theta anywhere.
"""

import argparse
import dataclasses
import functools
import itertools
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from converters.formats.kohya import load_kohya, lora_tensors, write_tensors
from converters.key_maps import from_kohya_name

from .bases import get_basis
from .config import LiDBConfig
from .distance import squared_distance
from .families import FAMILIES, Component, Family
from .layout import split_theta
from .product import add_low_rank, lidb_to_lora
from .projection import project_lora
from .record import base_fingerprint, check_record, from_metadata, record_config, space_record, to_metadata
from .safe_read import read_header
from .space import LiDBSpace
from .theta import load_theta, save_theta

logger = logging.getLogger(__name__)

# What rounding a LoRA to bfloat16 may take from an update; bases of another seed take more than half of it.
_ROUNDING = 0.01
# Block weights by name, as functions of the block's place, 0 (first) to 1 (last).
_PRESETS: dict[str, Callable[[float], float]] = {
    "sine": lambda place: math.sin(math.pi / 2 * place),
    "cosine": lambda place: math.sin(math.pi / 2 * (1 - place)),
    "linear": lambda place: place,
    "reverse_linear": lambda place: 1 - place,
    "zeros": lambda place: 0.0,
}

# What --network_args may hold, and what each text is to be read as.
_SETTINGS: dict[str, type] = {"down_dim": int, "up_dim": int, "seed": int}
_OPTIONS: dict[str, type] = {
    "save_theta": bool,
    "down_lr_weight": str,
    "mid_lr_weight": str,
    "up_lr_weight": str,
    "block_lr_zero_threshold": float,
}
_KINDS = {int: "a whole number", float: "a number", bool: "True or False"}
_BOOLEANS = {"True": True, "False": False}

BlockWeights = dict[str, list[float]]


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: nn.Module | list[nn.Module],
    unet: nn.Module,
    neuron_dropout: float | None = None,
    dropout: float | None = None,
    **network_args: str,
) -> "LiDBNetwork":
    """Return a fresh network, which changes nothing yet.

    Args:
        multiplier: strength of the update.
        network_dim: rank; None means 1.
        network_alpha: the update is multiplied by alpha / rank, as kohya's LoRA is; None means 1, 0 means the rank.
        neuron_dropout, dropout: sd-scripts' ``--network_dropout``, under both names; the config's ``lidb_dropout``.
        network_args: ``down_dim``, ``up_dim``, ``seed`` of `LiDBConfig`; ``save_theta=True`` writes theta beside every
            LoRA; ``down_lr_weight``, ``mid_lr_weight``, ``up_lr_weight`` and ``block_lr_zero_threshold`` as in kohya's
            LoRA.

    Raises:
        ValueError: an argument is unknown or has no such value.
    """
    rank = 1 if network_dim is None else network_dim
    alpha = 1.0 if network_alpha is None else network_alpha or rank
    values = _parse(network_args, _SETTINGS | _OPTIONS)
    settings = {name: values.pop(name) for name in _SETTINGS if name in values}
    config = LiDBConfig(r=rank, lidb_dropout=neuron_dropout or dropout or 0.0, **settings)
    return LiDBNetwork(text_encoder, unet, dataclasses.replace(config, scale=alpha / rank), multiplier, **values)


def create_network_from_weights(
    multiplier: float,
    file: str,
    vae: nn.Module | None,
    text_encoder: nn.Module | list[nn.Module],
    unet: nn.Module,
    for_inference: bool = False,
    **network_args: str,
) -> tuple["LiDBNetwork", dict[str, Tensor]]:
    """Return a network with the settings of ``file``, still fresh, and the file's weights as its state dict.

    Args:
        file: a theta file, or a LoRA that this module has saved.
        for_inference: makes no difference.
        network_args: as in `create_network`, but for what the file says itself.

    Raises:
        ValueError: the file does not say what its weights belong to, or does not fit the model.
    """
    record = from_metadata(read_header(file).metadata)
    if not record:
        raise ValueError(
            f"{file} does not say which bases its weights lie in; name a theta file, or a LoRA that this module saved"
        )
    config = record_config(record, file)
    network = LiDBNetwork(text_encoder, unet, config, multiplier, **_parse(network_args, _OPTIONS))
    theta = _read_theta(file, network.space)
    return network, {f"rows.{index}": row for index, row in enumerate(theta)}


class LiDBNetwork(nn.Module):
    """Theta on the UNet and the text encoders of a model of sd-scripts.

    Attributes:
        space: the adapted layers.
        rows: theta, one parameter ``(row_size,)`` for each layer of the space, as optimizers want them.
        applied: indices of the layers that `apply_to` has put the network on; the others stay at the identity.
    """

    def __init__(
        self,
        text_encoder: nn.Module | list[nn.Module],
        unet: nn.Module,
        config: LiDBConfig,
        multiplier: float = 1.0,
        save_theta: bool = False,
        **block_options: Any,
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.save_theta = save_theta
        self.family = _family_of(unet)
        self.block_weights = _block_weights(self.family, **block_options)
        encoders = text_encoder if isinstance(text_encoder, list) else [text_encoder]
        names = [component.name for component in self.family.text_encoders][: len(encoders)]
        denoiser = self.family.denoiser
        named_unet = _with_diffusers_names(unet, denoiser) if denoiser.kohya_uses_originals else unet
        models = {denoiser.name: named_unet, **dict(zip(names, encoders, strict=True))}
        self.space = LiDBSpace(models, config)
        self.space.detach()  # its hooks serve updates that are bound for a while; these here stay
        self.base_fingerprint = base_fingerprint(models)  # now, because sd-scripts may cast the weights to fp8 later
        self.rows = nn.ParameterList(row.clone() for row in self.space.theta_0)
        self.applied: list[int] = []
        logger.info(
            f"LiDB on {self.space.num_layers} layers, {int(self.space.mask.sum())} numbers: rank {config.r}, "
            f"down_dim {config.down_dim}, up_dim {config.up_dim}, scale {config.scale}, seed {config.seed}"
        )

    @property
    def theta(self) -> Tensor:
        """theta float32 ``(L, row_size)``, on the CPU and detached."""
        return torch.stack([row.detach() for row in self.rows]).to("cpu", torch.float32)

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of the update."""
        self.multiplier = multiplier

    def prepare_network(self, args: argparse.Namespace) -> None:
        """Refuse, before anything is trained, what could not be saved.

        Raises:
            ValueError: the files are not to be safetensors.
        """
        if args.save_model_as != "safetensors":
            raise ValueError(f"save_model_as is {args.save_model_as}; LoRA files are written as safetensors only")

    def apply_to(
        self,
        text_encoder: nn.Module | list[nn.Module],
        unet: nn.Module,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Put the updates on the UNet's layers, the text encoders', or both; once."""
        for index, name in enumerate(self.space.layer_names):
            if apply_unet if name.partition(".")[0] == self.family.denoiser.name else apply_text_encoder:
                self.applied.append(index)
                self.space.layers[index].register_forward_hook(functools.partial(self._add_update, index))

    def _add_update(self, index: int, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        lora_A, lora_B = self._factors(index)
        x = nn.functional.dropout(args[0], self.space.config.lidb_dropout, self.training)
        return add_low_rank(output, x, lora_A, lora_B * self.multiplier)

    def _factors(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one layer's ``lora_A`` ``(r, in)`` and ``lora_B`` ``(out, r)``, float32, differentiable.

        One at a time and where it is used, so that checkpointing recomputes it with its block.
        """
        row = self.rows[index]
        down_aux, up_aux = (get_basis(key, row.device) for key in self.space.basis_keys(index))
        with torch.autocast(row.device.type, enabled=False):  # it would round the bases to half precision
            down, up = split_theta(row.float(), self.space.config)
            down, up = down[:, : down_aux.shape[0]], up[: up_aux.shape[1]]
            return lidb_to_lora(down, up, down_aux, up_aux, self.space.config.scale)

    def load_weights(self, file: str) -> str:
        """Continue from a theta file, or from a LoRA whose updates lie in this network's bases; say what was loaded.

        A LoRA gives back its updates but not theta itself: the two halves of a row come out with equal norms.

        Raises:
            ValueError: it belongs to other bases or layers, or changes layers that the network is not applied to.
        """
        theta = _read_theta(file, self.space)
        changed = {i for i, row in enumerate(theta) if split_theta(row, self.space.config)[1].any()}
        left_out = [self.space.layer_names[index] for index in sorted(changed - set(self.applied))]
        if left_out:
            raise ValueError(
                f"{file} changes {len(left_out)} layers that are not trained now, such as {left_out[0]}; train the "
                "text encoder and the UNet as in the run it came from, or merge it with --base_weights"
            )
        self.load_state_dict({f"rows.{index}": row for index, row in enumerate(theta)})
        return f"updates of {len(changed)} layers"

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: float | list[float] | None, unet_lr: float | None, default_lr: float
    ) -> tuple[list[dict], list[str]]:
        """Return the optimizer's parameter groups and a name for each; what has a rate of 0 is frozen.

        Args:
            text_encoder_lr: one for all text encoders or one for each; None or an empty list means ``default_lr``.

        Raises:
            ValueError: there are several rates and another number of text encoders.
        """
        rates = self._learning_rates(text_encoder_lr, unet_lr, default_lr)
        groups: dict[tuple[str, float], list[nn.Parameter]] = {}
        for index in self.applied:
            name = self.space.layer_names[index]
            label = name.partition(".")[0]
            rate = rates[label]
            if self.block_weights and label == self.family.denoiser.name:
                side, position = _block_of(name, self.family)
                label, rate = f"{label}_{side}_{position}", rate * self.block_weights[side][position]
            groups.setdefault((label, rate), []).append(self.rows[index])
        self.requires_grad_(False)
        trained = {group: rows for group, rows in groups.items() if group[1]}
        for row in itertools.chain.from_iterable(trained.values()):
            row.requires_grad_(True)
        return [{"params": rows, "lr": rate} for (_, rate), rows in trained.items()], [label for label, _ in trained]

    # Versions of sd-scripts before multiple text encoder rates call it so, with one rate.
    prepare_optimizer_params = prepare_optimizer_params_with_multiple_te_lrs

    def _learning_rates(
        self, text_encoder_lr: float | list[float] | None, unet_lr: float | None, default_lr: float
    ) -> dict[str, float]:
        denoiser = self.family.denoiser.name
        encoders = [component for component in self.space.models if component != denoiser]
        given_rates = text_encoder_lr if isinstance(text_encoder_lr, list) else [text_encoder_lr]
        rates: list[float | None] = [*given_rates] or [None]
        if len(rates) == 1:
            rates = rates * len(encoders)
        if len(rates) != len(encoders):
            raise ValueError(f"text_encoder_lr has {len(rates)} rates for {len(encoders)} text encoders; give one each")
        given = {denoiser: unet_lr, **dict(zip(encoders, rates, strict=True))}
        return {component: default_lr if rate is None else rate for component, rate in given.items()}

    def enable_gradient_checkpointing(self) -> None:
        """Do nothing: checkpointed blocks of the base model recompute their updates anyway."""

    def prepare_grad_etc(self, text_encoder: nn.Module | list[nn.Module], unet: nn.Module) -> None:
        """Do nothing: making the optimizer's groups has decided what is trained."""

    def on_epoch_start(self, text_encoder: nn.Module | list[nn.Module], unet: nn.Module) -> None:
        """Go to training mode."""
        self.train()

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """Yield the parameters whose gradients are to be clipped."""
        return (row for row in self.rows if row.requires_grad)

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm_value: float, device: torch.device) -> tuple[int, float, float]:
        """Shrink every update whose Frobenius norm is larger; return how many, and the mean and largest norm left."""
        norms = squared_distance(self.space, self.theta, self.space.theta_0).clamp(min=0.0).sqrt()[self.applied]
        limited = norms.clamp(max=max_norm_value)
        for index, norm, limit in zip(self.applied, norms, limited, strict=True):
            if limit < norm:
                self.rows[index].mul_(math.sqrt(limit / norm))  # a row holds both factors
        return int((limited < norms).sum()), limited.mean().item(), limited.max().item()

    def is_mergeable(self) -> bool:
        """Return True: `merge_to` serves."""
        return True

    @torch.no_grad()
    def merge_to(
        self,
        text_encoder: nn.Module | list[nn.Module],
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Add the updates of ``weights_sd``, from `create_network_from_weights`, to the base model's weights.

        Added in float32 and rounded once, to the dtype of the weights; ``dtype`` and ``device`` are not needed.
        """
        self.load_state_dict(weights_sd)
        for index, layer in enumerate(self.space.layers):
            lora_A, lora_B = (factor.to(layer.weight.device) for factor in self._factors(index))
            layer.weight.copy_(torch.addmm(layer.weight.float(), lora_B, lora_A, alpha=self.multiplier))

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write a standard LoRA of the layers applied to, and with ``save_theta`` theta as ``NAME-theta.safetensors``.

        sd-scripts' metadata stays, with the rank and alpha that the file has, and the record of what theta belongs to.

        Args:
            dtype: float16, bfloat16 or float32; None means float32.

        Raises:
            ValueError: values that are not finite, or not in ``dtype``; or a file that is no safetensors.
        """
        dtype, metadata, theta = dtype or torch.float32, dict(metadata or {}), self.theta
        factors = self.space.factors(theta)
        names = [self.space.layer_names[index] for index in self.applied]
        tensors, rank = lora_tensors({name: factors[name] for name in names}, self.family.name, dtype)
        base_name = metadata.get("ss_sd_model_name", "")
        record = space_record(self.space, base_name, self.base_fingerprint)
        own = {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
        write_tensors(file, tensors, metadata | own | to_metadata(record))
        if self.save_theta:
            path = Path(file).with_stem(f"{Path(file).stem}-theta")
            save_theta(path, theta, self.space, base_name, self.base_fingerprint, dtype)


def _family_of(unet: nn.Module) -> Family:
    """Return the first family whose denoiser sd-scripts has as ``unet``'s class; SD2's has SD1's names.

    Raises:
        ValueError: none has.
    """
    for family in FAMILIES.values():
        if family.kohya_blocks and hasattr(unet, family.denoiser.kohya_attribute):
            return family
    known = ", ".join(family.title for family in FAMILIES.values() if family.kohya_blocks)
    raise ValueError(f"this network module trains {known}, not a {type(unet).__name__}; choose another network_module")


def _with_diffusers_names(unet: nn.Module, component: Component) -> nn.Module:
    """Return a model that holds the layers of sd-scripts' model, which have the original names, under diffusers'."""
    renamed = nn.Module()
    for path in dict.fromkeys(name.rpartition(".")[0] for name, _ in unet.named_parameters()):
        *parents, last = from_kohya_name(component.kohya_prefixes[0] + path.replace(".", "_")).split(".")[1:]
        parent = renamed
        for name in parents:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = getattr(parent, name)
        parent.add_module(last, unet.get_submodule(path))
    return renamed


def _read_theta(file: str | os.PathLike, space: LiDBSpace) -> Tensor:
    """Return theta ``(L, row_size)`` of a theta file, or the one whose updates a LoRA holds.

    Raises:
        ValueError: other settings or layers, or a LoRA whose updates do not lie in the bases of ``space``.
    """
    header = read_header(file)
    if "theta" in header.tensors:
        return load_theta(file, space).theta
    record = from_metadata(header.metadata)
    if record:
        check_record(record, space, str(file))
    theta, residuals = project_lora(space.named_shapes, space.config, load_kohya(file)[0])
    worst = int(residuals.argmax())
    if residuals[worst] > _ROUNDING:
        raise ValueError(
            f"{file} is not a LoRA of these bases: theta loses {residuals[worst]:.0%} of its update of "
            f"{space.layer_names[worst]}; name a theta file, or a LoRA saved with this seed, down_dim and up_dim"
        )
    return theta


def _kohya_blocks(family: Family) -> tuple[int, int]:
    """The family's, which every family that sd-scripts trains here has."""
    assert family.kohya_blocks is not None, family.name
    return family.kohya_blocks


def _block_of(layer: str, family: Family) -> tuple[str, int]:
    """Return the side ("down", "mid", "up") of the UNet that a layer is on, and the place of its block there."""
    block = re.match(r"[^.]+\.(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", layer)
    if block is None:
        return "mid", _kohya_blocks(family)[1] // 2
    position = 3 * int(block[2]) + int(block[3])
    return block[1], position + (block[1] == "down")  # the first block going down is conv_in


def _block_weights(
    family: Family,
    down_lr_weight: str | None = None,
    mid_lr_weight: str | None = None,
    up_lr_weight: str | None = None,
    block_lr_zero_threshold: float = 0.0,
) -> BlockWeights:
    """Return what multiplies the learning rate of each block, by side; {} where nothing is given."""
    given = {"down": down_lr_weight, "mid": mid_lr_weight, "up": up_lr_weight}
    if not any(given.values()):
        return {}
    weights = {}
    for side, text in given.items():
        count = _kohya_blocks(family)[side == "mid"]
        weights[side] = [1.0] * count
        if text:
            values = _weights_of(f"{side}_lr_weight", text, count)
            weights[side] = [value if value > block_lr_zero_threshold else 0.0 for value in values]
    return weights


def _weights_of(name: str, text: str, count: int) -> list[float]:
    """Return the ``count`` numbers of a list "1,0.5,..." or of a preset, "sine" or "sine+0.1"."""
    preset, _, base = text.partition("+")
    try:
        if preset in _PRESETS and name != "mid_lr_weight":
            return [_PRESETS[preset](place / (count - 1)) + float(base or 0) for place in range(count)]
        weights = [float(number or 0) for number in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count:
        presets = "" if name == "mid_lr_weight" else f", or one of {', '.join(_PRESETS)}"
        raise ValueError(f"{name} is {text!r}; it takes a list of {count}, with commas between{presets}")
    return weights


def _parse(network_args: Mapping[str, str], known: Mapping[str, type]) -> dict[str, Any]:
    """Return the values of ``--network_args``, which come as text.

    Raises:
        ValueError: a name that is not among ``known``, or a value of another kind.
    """
    unknown = sorted(set(network_args) - set(known))
    if unknown:
        raise ValueError(f"network_args has {', '.join(unknown)}; here it takes {', '.join(known)}")
    values = {}
    for name, text in network_args.items():
        kind = known[name]
        try:
            values[name] = _BOOLEANS[str(text)] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            raise ValueError(f"network_args has {name}={text}; give {_KINDS[kind]}") from error
    return values
