"""The PEFT tuner: puts ``LiDBLinear`` in place of the target layers, and saves and loads the adapters.

Besides each layer's ``down`` and ``up``, a checkpoint holds one small record per distinct basis: the fingerprint of its
integers and a few of its values. They are checked at load, so that a basis which another machine builds differently is
an error and never a silent garbage adapter. With ``save_projection`` the bases themselves are stored instead.
"""

import dataclasses
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    get_quantization_kwargs,
)
from torch import Tensor, nn

from .bases import BasisKey, basis_fingerprint, basis_probes, check_basis, get_basis, store_basis
from .config import LiDBConfig
from .layer import LiDBLayer, LiDBLinear, is_linear
from .naming import clean_module_name, default_target_modules

_WEIGHTS = ("lidb_down", "lidb_up")
_RECORD = "lidb_basis."


class LiDBModel(BaseTuner):
    """Adapts a model with LiDB (arXiv:2307.06949, section 4.1); made by ``get_peft_model(model, LiDBConfig())``.

    It keeps no state of its own, so ``inject_adapter_in_model`` and diffusers' ``add_adapter`` work too.
    """

    prefix = "lidb_"
    tuner_layer_cls = LiDBLayer
    # PEFT's own tuners have this too, which is wider than what their base class says.
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    # PEFT calls a tuner with configs of its own kind, which its base class cannot say: hence what is ignored below.
    def _prepare_adapter_config(self, peft_config: LiDBConfig, model_config: dict) -> PeftConfig:  # type: ignore[override]
        if model_config.get("model_type") in self.target_module_mapping:
            return super()._prepare_adapter_config(peft_config, model_config)
        if peft_config.target_modules is None:
            peft_config.target_modules = default_target_modules(self.model)
        return peft_config

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: LiDBConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, LiDBLayer):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not is_linear(base_layer):
            raise TypeError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (optionally quantized) "
                "and `transformers.pytorch_utils.Conv1D` are supported."
            )
        new_module = LiDBLinear(target, adapter_name, peft_config, current_key, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an additional adapter is not trainable until it is made active
        self._replace_module(parent, target_name, new_module, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)
            return
        for module in self.model.modules():
            if isinstance(module, LiDBLayer):
                BaseTunerLayer._move_adapter_to_device_of_base_layer(module, adapter_name)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add the weighted sum of adapters as a new, inactive one; exact, because the bases are shared and ranks add.

        A whole module that one of them trains (``modules_to_save``) is copied as it is.

        Raises:
            ValueError: a name is unknown or taken, there are not as many weights as names, the adapters have different
                bases or train the same whole module, or the ranks add to more than a basis has vectors.
        """
        if not adapters or not set(adapters) <= set(self.peft_config) or adapter_name in self.peft_config:
            raise ValueError(
                f"the sum of {list(adapters)} cannot be added as {adapter_name!r}: the model has the adapters "
                f"{sorted(self.peft_config)}; name some of them, and a new one"
            )
        if len(adapters) != len(weights):
            raise ValueError(f"there are {len(weights)} weights for {len(adapters)} adapters; pass one for each")
        parts = dict.fromkeys(adapters, 0.0)
        for name, weight in zip(adapters, weights, strict=True):
            parts[name] += weight
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, LiDBLayer) and not parts.keys().isdisjoint(module.lidb_down)
        }
        wrappers = [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]
        wholes = [(whole, [name for name in parts if name in whole.modules_to_save]) for whole in wrappers]
        if any(len(names) > 1 for _, names in wholes):
            raise ValueError(f"{list(adapters)} train the same whole module, which has no sum; add one of them at most")
        self.peft_config[adapter_name] = _config_of_sum(
            [cast(LiDBConfig, self.peft_config[name]) for name in parts], layers, parts
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in layers.values():
            layer.set_to_sum(adapter_name, parts)
        for whole, names in wholes:
            for name in names:
                whole.modules_to_save[adapter_name].load_state_dict(whole.modules_to_save[name].state_dict())

    def use_bases(self, bases: Mapping[str, Tensor], adapter_name: str = "default") -> None:
        """Put bases from outside, such as learned ones, in the place of an adapter's; checkpoints then store them.

        Args:
            bases: by label ("down:320:100", "up:320:50"): ``(dim, width)`` on the down side, ``(width, dim)`` on the up
                side; one for every width and side that the adapter uses. They need not be orthonormal.

        Raises:
            ValueError: a basis is missing, of another shape, or not finite.
        """
        keys = _keys_in_use(self.model, adapter_name)
        missing = sorted(key.label for key in keys if key.label not in bases)
        if missing:
            raise ValueError(f"there is no basis for {missing}; pass one for every width and side of the adapter")
        _replace_bases(self.model, adapter_name, {key: store_basis(key, bases[key.label]) for key in keys})

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names``, one per sample, from the model's forward to every layer of it, in this thread."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, (LiDBLayer, AuxiliaryTrainingWrapper))]
        known = {name for layer in layers if isinstance(layer, LiDBLayer) for name in layer.lidb_down}
        unknown = set(adapter_names) - known - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        hook = partial(_pass_adapter_names, adapter_names=adapter_names, thread=threading.get_ident())
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: LiDBConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for key in sorted(_keys_in_use(model, adapter_name)):
            if config.save_projection or key.kind != config.basis:
                selected[f"{_RECORD}{key.label}.values"] = get_basis(key, torch.device("cpu"))
            else:
                selected[f"{_RECORD}{key.label}.record"] = _basis_record(key)
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: LiDBConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Give the file's keys the model's names, whichever of the two namings of CLIP's modules each has.

        Raises:
            ValueError: an adapter key is missing or unexpected, or the file's bases are not the ones built here.
        """
        wanted = {
            _canonical(f"{name}.{attribute}"): f"{name}.{attribute}.{adapter_name}"
            for name, module in model.named_modules()
            if isinstance(module, LiDBLayer)
            for attribute in _WEIGHTS
            if adapter_name in getattr(module, attribute)
        }
        # Biases and whole modules are saved too; with bias="all" PEFT saves the latter's without the adapter's name.
        whole = f".modules_to_save.{adapter_name}."
        names = {_canonical(name): name for name in model.state_dict()}
        shortened = {name.replace(whole, ".modules_to_save."): full for name, full in names.items()}
        known = shortened | names | wanted
        loaded: dict[str, Tensor] = {}
        records: dict[str, Tensor] = {}
        unexpected = []
        for name, value in state_dict.items():
            canonical = _canonical(name)
            if canonical.startswith(_RECORD):
                records[canonical] = value
            elif canonical in known:
                loaded[known[canonical]] = value
            else:
                unexpected.append(name)
        missing = sorted(set(wanted.values()) - set(loaded))
        if missing or unexpected:
            raise ValueError(
                f"the LiDB checkpoint does not fit this model: missing keys {missing}, unexpected keys {unexpected}"
            )
        _use_recorded_bases(model, config, adapter_name, records)
        return loaded


def _config_of_sum(
    configs: Sequence[LiDBConfig], layers: Mapping[str, LiDBLayer], parts: Mapping[str, float]
) -> LiDBConfig:
    """Return the config of the sum of adapters: on every layer that has one of them, with the sum of their ranks."""
    for name, layer in layers.items():
        if len({layer.lidb_keys[part] for part in parts if part in layer.lidb_keys}) > 1:
            raise ValueError(f"{list(parts)} have different bases on {name}; add adapters of one seed and dimensions")
    ranks = {name: sum(layer.lidb_r.get(part, 0) for part in parts) for name, layer in layers.items()}
    rank = max(ranks.values())
    whole_modules = {module for config in configs for module in config.modules_to_save or ()}
    return dataclasses.replace(
        configs[0],
        r=rank,
        scale=1.0,
        rank_pattern={f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank},
        scale_pattern={},
        target_modules="|".join(re.escape(name) for name in ranks),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=sorted(whole_modules) or None,
    )


def _pass_adapter_names(
    module: nn.Module, args: tuple, kwargs: dict | None = None, *, adapter_names: list[str], thread: int
) -> tuple[tuple, dict] | None:
    """Forward pre-hook; hooks are the module's, and so those of other threads' calls are run here too."""
    if threading.get_ident() != thread or kwargs is None:  # torch leaves kwargs out while another thread takes its away
        return None
    return args, kwargs | {"adapter_names": adapter_names}


def _canonical(name: str) -> str:
    return clean_module_name(name).removeprefix("text_model.")


def _keys_in_use(model: nn.Module, adapter_name: str) -> set[BasisKey]:
    layers = [m for m in model.modules() if isinstance(m, LiDBLayer) and adapter_name in m.lidb_keys]
    return {key for layer in layers for key in layer.lidb_keys[adapter_name]}


def _basis_record(key: BasisKey) -> Tensor:
    """Return a float32 vector: the fingerprint's 8 bytes, then probe values of the basis."""
    fingerprint = torch.tensor(list(bytes.fromhex(basis_fingerprint(key))), dtype=torch.float32)
    return torch.cat([fingerprint, basis_probes(get_basis(key, torch.device("cpu")))])


def _use_recorded_bases(model: nn.Module, config: LiDBConfig, adapter_name: str, records: dict[str, Tensor]) -> None:
    """Check the rebuilt bases against the checkpoint's records, or use the bases that it stores."""
    recorded: dict[BasisKey, BasisKey] = {}
    for key in _keys_in_use(model, adapter_name):
        rebuilt = key._replace(kind=config.basis)  # the adapter that is replaced may have used others
        values, record = (records.get(f"{_RECORD}{key.label}.{kind}") for kind in ("values", "record"))
        if values is not None:
            recorded[key] = store_basis(rebuilt, values)
        elif record is None or record.shape != _basis_record(rebuilt).shape:
            raise ValueError(f"the LiDB checkpoint has no record of its {key.label} basis; save the adapter again")
        else:
            fingerprint = bytes(int(value) & 255 for value in record[:8].tolist()).hex()
            check_basis(rebuilt, fingerprint, record[8:], "the LiDB checkpoint")
            recorded[key] = rebuilt
    _replace_bases(model, adapter_name, recorded)


def _replace_bases(model: nn.Module, adapter_name: str, replaced: Mapping[BasisKey, BasisKey]) -> None:
    for module in model.modules():
        if isinstance(module, LiDBLayer) and adapter_name in module.lidb_keys:
            down, up = module.lidb_keys[adapter_name]
            module.use_bases(adapter_name, (replaced[down], replaced[up]))
