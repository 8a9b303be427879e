"""The PEFT layer: a linear layer with LiDB adapters beside it."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .bases import BasisKey, get_basis, given_bases, remember_bases, starting_down
from .config import LiDBConfig
from .product import add_low_rank, lidb_to_lora


def is_linear(layer: nn.Module) -> bool:
    """Tell whether LiDB fits a base layer: linear, GPT-2's transposed kind, or a quantised one that PEFT knows."""
    if isinstance(layer, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(layer)
    return backend is not None and backend.layer_type == "linear"


def _widths(layer: nn.Module) -> tuple[int, int]:
    """``(in_features, out_features)`` of a layer for which `is_linear`."""
    in_features, out_features = _get_in_out_features(layer)
    assert in_features is not None, layer
    assert out_features is not None, layer
    return in_features, out_features


class AdapterWeights(nn.ParameterDict):
    """Weights by adapter; called for one, so that whoever moves a module's weights in for its call moves these too.

    accelerate's sequential offloading does so, and a weight that is merely looked up is then on the meta device.
    """

    __call__ = nn.Module.__call__  # ParameterDict refuses calls

    def forward(self, adapter_name: str) -> Tensor:
        return self[adapter_name]


class LiDBLayer(BaseTunerLayer):
    """Holds the adapters of one layer: ``down`` ``(r, a)`` and ``up`` ``(b, r)`` of each, and which bases they use.

    The bases are neither parameters nor buffers: they are looked up by key, shared by all layers of a shape, follow
    the device of the weights, and stay float32 whatever dtype the model is cast to.
    """

    adapter_layer_names = ("lidb_down", "lidb_up")
    other_param_names = ("lidb_dropout", "lidb_r", "lidb_scale", "lidb_scaling", "lidb_keys", "lidb_aux")

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        self.base_layer = base_layer
        self.lidb_down = AdapterWeights()
        self.lidb_up = AdapterWeights()
        self.lidb_dropout = nn.ModuleDict({})
        self.lidb_r: dict[str, int] = {}
        self.lidb_scale: dict[str, float] = {}
        self.lidb_scaling: dict[str, float] = {}
        self.lidb_keys: dict[str, tuple[BasisKey, BasisKey]] = {}
        self.lidb_aux: dict[str, tuple[Tensor, Tensor]] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._unmerged_weight: Tensor | None = None
        self._merged_factors: list[tuple[Tensor, Tensor]] = []
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **quantization)
        self.fan_in_fan_out = isinstance(base, Conv1D)  # its weight is (in, out)
        self.in_features, self.out_features = _widths(base)

    def update_layer(self, adapter_name: str, config: LiDBConfig, layer_name: str) -> None:
        """Add an adapter, at the shared starting vector unless ``config.init_weights`` is False."""
        rank, scale = config.rank_and_scale(layer_name)
        keys = config.basis_keys(self.in_features, self.out_features)
        self.lidb_r[adapter_name] = rank
        self.lidb_scale[adapter_name] = self.lidb_scaling[adapter_name] = scale
        self.lidb_keys[adapter_name] = keys
        self.lidb_dropout[adapter_name] = nn.Dropout(config.lidb_dropout) if config.lidb_dropout else nn.Identity()
        self.lidb_down[adapter_name] = nn.Parameter(torch.zeros(rank, keys[0].dim))
        self.lidb_up[adapter_name] = nn.Parameter(torch.zeros(keys[1].dim, rank))
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Set an adapter to the starting vector (the identity), or to random values."""
        down, up = self.lidb_down[adapter_name], self.lidb_up[adapter_name]
        if init_weights:
            down.copy_(starting_down(*down.shape, self.lidb_keys[adapter_name][0].seed))
            up.zero_()
        else:
            nn.init.normal_(down, std=down.shape[1] ** -0.5)
            nn.init.normal_(up, std=up.shape[0] ** -0.5)

    @torch.no_grad()
    def set_to_sum(self, adapter_name: str, parts: Mapping[str, float]) -> None:
        """Make an adapter the weighted sum of others, ``parts``: name -> weight; its rank is the sum of theirs."""
        parts = {name: weight for name, weight in parts.items() if name in self.lidb_down}
        down = torch.cat([self.lidb_down[name] for name in parts])
        up = torch.cat([self.lidb_up[name] * (weight * self.lidb_scaling[name]) for name, weight in parts.items()], 1)
        self.lidb_down[adapter_name].copy_(down)
        self.lidb_up[adapter_name].copy_(up)
        self.use_bases(adapter_name, self.lidb_keys[next(iter(parts))])

    def use_bases(self, adapter_name: str, keys: tuple[BasisKey, BasisKey]) -> None:
        """Use other bases of the same shape, such as those stored in a checkpoint."""
        self.lidb_keys[adapter_name] = keys
        self.lidb_aux.pop(adapter_name, None)
        self._bases(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Unlike PEFT's, this keeps the adapter in float32 beside a half-precision base, as it is cast where it is used.
        device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0] if device is None else device
        for parameters in (self.lidb_down, self.lidb_up):
            if adapter_name in parameters and parameters[adapter_name].device.type != "meta":
                parameters[adapter_name] = parameters[adapter_name].to(device)
        self._bases(adapter_name)

    def _bases(self, adapter_name: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return ``down_aux`` and ``up_aux``, if nothing else is said on the device of the adapter's weights.

        Whatever moves the weights calls this too, so that ``torch.compile`` never sees the look-up.
        """
        device = self.lidb_down[adapter_name].device if device is None else device
        aux = self.lidb_aux.get(adapter_name)
        if aux is None or aux[0].device != device:
            down_key, up_key = self.lidb_keys[adapter_name]
            aux = self.lidb_aux[adapter_name] = get_basis(down_key, device), get_basis(up_key, device)
        return aux

    @property
    def r(self) -> dict[str, int]:
        """Rank by adapter; diffusers counts a layer's adapters by this name to find one for the next."""
        return self.lidb_r

    @property
    def lora_A(self) -> dict[str, nn.Module]:  # noqa: N802 - the name that is asked for
        """Nothing: diffusers' ``set_lora_device`` asks it of every layer, and LiDB stays where its layer is."""
        return {}

    def get_lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return float32 ``lora_A`` ``(r, in_features)`` and ``lora_B`` ``(out_features, r)``, the scale folded in."""
        down, up = self.lidb_down(adapter_name), self.lidb_up(adapter_name)
        aux = self._bases(adapter_name, down.device)
        return lidb_to_lora(down.float(), up.float(), *aux, scale=self.lidb_scaling[adapter_name])

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the update, shaped as the base weight is (``(out_features, in_features)``), in the adapter's dtype."""
        lora_A, lora_B = self.get_lora_factors(adapter_name)
        delta = (lora_B @ lora_A).to(self.lidb_down[adapter_name].dtype)
        return delta.T if self.fan_in_fan_out else delta

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the strength of an adapter relative to its config's scale."""
        if adapter_name in self.lidb_scaling:
            self.lidb_scaling[adapter_name] = scale * self.lidb_scale[adapter_name]

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for name in self.active_adapters:
            if name in self.lidb_scaling:
                self.lidb_scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters, or, without a number, bring the config's scale back."""
        for name in self.active_adapters:
            if name in self.lidb_scaling:
                self.lidb_scaling[name] = self.lidb_scale[name] if scale is None else self.lidb_scaling[name] / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class LiDBLinear(nn.Module, LiDBLayer):
    """A linear layer with LiDB adapters: ``base(x) + dropout(x) lora_A^T lora_B^T`` for every active one."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LiDBConfig, layer_name: str, **quantization: Any
    ) -> None:
        super().__init__()
        LiDBLayer.__init__(self, base_layer, **quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, layer_name)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight, in float32, rounded once to its dtype.

        The weight as it was is kept until `unmerge`, because subtracting would not bring back what was rounded away.

        Raises:
            ValueError: with ``safe_merge``, the merged weight is not finite; the base weight is left as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lidb_down]
        if not names:
            return
        weight = self.get_base_weight()
        parts = {name: self.get_lora_factors(name) for name in names}
        lora_A = torch.cat([part[0] for part in parts.values()])
        lora_B = torch.cat([part[1] for part in parts.values()], dim=1)
        merged = self._add_update(weight, lora_A, lora_B)
        if safe_merge and not torch.isfinite(merged).all():
            broken = [name for name, part in parts.items() if not torch.isfinite(self._add_update(weight, *part)).all()]
            culprits = ", ".join(broken or names)
            raise ValueError(f"NaNs detected in the merged weights. The adapter {culprits} seems to be broken")
        if not self.merged:
            self._unmerged_weight = weight
        self.set_base_weight(merged)
        self._merged_factors.append((lora_A, lora_B))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge.

        If another method's adapter on the same layer has been merged or unmerged since, the updates are subtracted.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight, unmerged = self.get_base_weight(), self._unmerged_weight
        assert unmerged is not None, "merged without the weight before"
        ours = unmerged
        for lora_A, lora_B in self._merged_factors:
            ours = self._add_update(ours, lora_A, lora_B)
        is_ours = torch.allclose(weight, ours.to(weight), rtol=0, atol=0, equal_nan=True)
        if is_ours or self.quantization_backend is not None:
            weight = unmerged.to(weight)
        else:
            for lora_A, lora_B in self._merged_factors:
                weight = self._add_update(weight, lora_A, -lora_B)
        self.set_base_weight(weight)
        self._unmerged_weight = None
        self._merged_factors.clear()
        self.merged_adapters.clear()

    def _add_update(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Return a base weight with an update added in float32, rounded once to its dtype."""
        update = (lora_B @ lora_A).to(weight.device)
        return (weight.float() + (update.T if self.fan_in_fan_out else update)).to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.lidb_down:
                result = add_low_rank(result, self.lidb_dropout[name](x), *self.get_lora_factors(name))
        return result

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Give sample i of the batch the adapter that ``adapter_names[i]`` names, none for "__base__".

        Raises:
            ValueError: there are not as many names as samples, or an adapter is merged.
        """
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        factors = {name: self.get_lora_factors(name) for name in set(adapter_names) if name in self.lidb_down}
        parts = [
            add_low_rank(part, x[i], *factors[name]) if name in factors else part
            for i, (name, part) in enumerate(zip(adapter_names, result.unbind(0), strict=True))
        ]
        return torch.stack(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LiDBLinear":
        super()._apply(fn, recurse)
        for name in self.lidb_down:
            self._bases(name)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Without the bases, so that copies share them; those that cannot be rebuilt travel by themselves.
        keys = [key for pair in self.lidb_keys.values() for key in pair]
        return self.__dict__ | {"lidb_aux": {}, "given_bases": given_bases(keys)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        remember_bases(state.pop("given_bases"))
        super().__setstate__(state)
        for name in self.lidb_down:
            self._bases(name)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "lidb." + super().__repr__()
