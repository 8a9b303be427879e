"""The space of personalised weights: the ordered layers of a base model, and theta on them.

What theta's numbers are is :mod:`lidb_peft.layout`'s. HyperDreamBooth (arXiv:2307.06949), section 4.1.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .bases import BasisKey
from .bindings import Bindings, CheckpointRouter, hook_layers
from .config import LiDBConfig
from .layer import LiDBLayer
from .layout import layers_hash, split_theta, starting_theta, theta_mask
from .naming import find_layers
from .relax import LoraFactors
from .stacks import LayerGroups, Stacks, concatenate, prepare


class LiDBSpace:
    """The adapted layers of a base model and the thetas that live on them.

    The models are used as they are: light forward hooks, which do nothing outside of ``apply``, stay on the adapted
    layers as long as the space lives (or until ``detach``). PEFT adapters need not be there; if they are
    and are active, theta adds to them.

    Attributes:
        layer_names: classic names, components in the order of ``models``, inside a component in natural order.
        shapes: ``(in_features, out_features)`` of each layer.
        num_layers: L.
        row_size: r*(a+b).
        mask: bool ``(L, row_size)``, True where a number takes part.
        theta_0: float32 ``(L, row_size)``, the shared starting vector; the identity.
    """

    def __init__(self, models: Mapping[str, nn.Module], config: LiDBConfig) -> None:
        """Find the layers of ``models``: component, as the families name it, -> model.

        Raises:
            ValueError: there is no model, or one without a layer to adapt, or the config has patterns of rank or scale.
        """
        if config.rank_pattern or config.scale_pattern:
            raise ValueError(
                "theta has one rank and scale for all layers, but the config has a rank_pattern or scale_pattern; "
                "leave them out, or fit the adapter through PEFT"
            )
        if not models:
            raise ValueError("LiDBSpace needs at least one model; pass {component: model}, as the pipeline calls them")
        self.models: dict[str, nn.Module] = dict(models)
        self.config = config
        layers: dict[str, nn.Linear] = {}
        for component, model in models.items():
            layers.update(find_layers(component, model, config))
        self.layers = tuple(layers.values())
        self.groups = LayerGroups({name: (layer.in_features, layer.out_features) for name, layer in layers.items()})
        self.layer_names = self.groups.names
        self.shapes = self.groups.shapes
        self.num_layers = len(self.layer_names)
        self.mask = theta_mask(self.shapes, config)
        self.theta_0 = starting_theta(self.shapes, config)
        self.row_size = self.theta_0.shape[1]
        self._bindings = Bindings()
        self._router = CheckpointRouter(list(models.values()), list(self.layers), self._bindings)
        # The hooks hold the bindings, not the router, and so leave the models when it goes: with the space, or with the
        # last graph that may still recompute a block through it.
        handles = hook_layers(list(self.layers), self._bindings)
        self.detach = weakref.finalize(self._router, _remove_all, handles)

    def basis_keys(self, index: int) -> tuple[BasisKey, BasisKey]:
        """Return the keys of layer ``index``'s down and up basis."""
        return self.config.basis_keys(*self.shapes[index])

    @property
    def layers_hash(self) -> str:
        """See `layers_hash`."""
        return layers_hash(self.named_shapes)

    @property
    def named_shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name -> ``(in_features, out_features)``, in the order of the space."""
        return dict(zip(self.layer_names, self.shapes, strict=True))

    def check_theta(self, theta: Tensor) -> None:
        """Raise ValueError unless theta is ``(*batch, L, row_size)``."""
        if theta.dim() < 2 or theta.shape[-2:] != (self.num_layers, self.row_size):
            raise ValueError(
                f"theta has shape {tuple(theta.shape)}; this space takes (..., {self.num_layers}, {self.row_size})"
            )

    def expand(self, theta: Tensor, bases: Mapping[str, Tensor] | None = None) -> Stacks:
        """Expand theta ``(L, row)`` or ``(B, L, row)`` to LoRA factors, stacked by width; differentiable.

        Args:
            bases: learned bases by their key's label, differentiable too; None takes the frozen ones of the config.
        """
        self.check_theta(theta)
        return self.groups.expand(theta, self.config, bases)

    def factors(self, theta: Tensor, bases: Mapping[str, Tensor] | None = None) -> LoraFactors:
        """Expand theta to each layer's ``lora_A`` ``(*batch, r, in)`` and ``lora_B`` ``(*batch, out, r)``, float32."""
        return self.named(self.expand(theta, bases))

    def named(self, stacks: Stacks) -> LoraFactors:
        """Return stacked factors by layer name."""
        return dict(zip(self.layer_names, self.groups.unstack(stacks), strict=True))

    def lora_size(self, rank: int) -> int:
        """Return how many numbers plain LoRA factors of that rank have on these layers."""
        return self.groups.lora_size(rank)

    def init_lora(self, rank: int, generator: torch.Generator) -> Tensor:
        """Return fresh flat LoRA factors ``(lora_size(rank),)``: ``lora_A`` Kaiming-uniform, ``lora_B`` zero."""
        return self.groups.init_lora(rank, generator)

    def split_lora(self, flat: Tensor, rank: int) -> Stacks:
        """View flat LoRA factors ``(*batch, lora_size(rank))`` as stacks for ``apply``; differentiable, no copy."""
        return self.groups.split_lora(flat, rank)

    def lora_factors(self, flat: Tensor, rank: int) -> LoraFactors:
        """View flat LoRA factors by layer name."""
        return self.named(self.split_lora(flat, rank))

    @contextmanager
    def apply(self, *parts: Tensor | Stacks | LoraFactors, scale: float | Tensor = 1.0) -> Iterator[None]:
        """Run the models with a theta, or the sum of several low-rank updates: a frozen theta and a trainable LoRA.

        With B identities the batch is a multiple B*k and sample j uses identity j // k. theta is expanded once, here.
        Differentiable, also under gradient checkpointing and when ``backward()`` runs after the block has closed.
        A pipeline that doubles its batch for classifier-free guidance puts all negative prompts first, but encodes
        prompts one kind at a time: with more than one identity, encode them under theta, and hand the embeddings to the
        pipeline under ``torch.cat([theta, theta])``.

        Args:
            parts: theta ``(L, row)`` for all samples, or ``(B, L, row)``, one per identity, of which a change inside
                the block has no effect; or factors, stacked (``expand``, ``split_lora``) or by layer name, likewise.
                Ranks may differ from part to part.
            scale: multiplies all updates, on top of the config's scale; a number, or one for each identity ``(B,)``.

        A block inside a block replaces the outer one's factors until it closes.

        Raises:
            ValueError: there are no parts, or they do not fit the layers or each other.
        """
        if not parts:
            raise ValueError("apply needs theta or factors; pass a theta, space.expand(theta) or LoRA factors")
        stacks = concatenate([self._stacked(part) for part in parts])
        if len(stacks.batch_shape) > 1:
            raise ValueError(f"the factors have batch shape {tuple(stacks.batch_shape)}; pass one axis of identities")
        stacks = prepare(stacks, self.groups, self._dtypes(), scale)
        bound = dict(enumerate(self.groups.unstack(stacks)))
        with self._router.routed(), self._bindings.bound(bound):
            yield

    def _stacked(self, part: Tensor | Stacks | LoraFactors) -> Stacks:
        if isinstance(part, Tensor):
            return self.expand(part)
        return part if isinstance(part, Stacks) else self.groups.stack(part)

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Return each component's dtype; float32 where its weights are quantised, or are kept in float8."""
        dtypes: dict[str, torch.dtype] = {}
        for name, layer in zip(self.layer_names, self.layers, strict=True):
            dtype = layer.weight.dtype
            is_whole = dtype.is_floating_point and dtype.itemsize > 1
            dtypes.setdefault(name.partition(".")[0], dtype if is_whole else torch.float32)
        return dtypes

    def theta_from_adapters(self, adapter_name: str = "default") -> Tensor:
        """Read theta ``(L, row_size)`` from LiDB adapters that PEFT has put on the models.

        Raises:
            ValueError: a layer has no such adapter, or one of another rank, basis or scale.
        """
        theta = torch.zeros(self.num_layers, self.row_size)
        for row, layer in zip(theta, self._adapters(adapter_name), strict=True):
            down, up = layer.lidb_down[adapter_name].detach(), layer.lidb_up[adapter_name].detach()
            row_down, row_up = split_theta(row, self.config)
            row_down[:, : down.shape[1]] = down
            row_up[: up.shape[0]] = up
        return theta

    @torch.no_grad()
    def load_into_adapters(self, theta: Tensor, adapter_name: str = "default") -> None:
        """Copy theta ``(L, row_size)`` into LiDB adapters that PEFT has put on the models.

        Raises:
            ValueError: theta has another shape, or the adapters do not fit it.
        """
        self.check_theta(theta)
        if theta.dim() != 2:
            raise ValueError(f"theta has shape {tuple(theta.shape)}; pass one identity's, (L, row_size)")
        layers = self._adapters(adapter_name)
        for row, layer in zip(theta.detach().contiguous(), layers, strict=True):
            down, up = layer.lidb_down[adapter_name], layer.lidb_up[adapter_name]
            row_down, row_up = split_theta(row, self.config)
            down.copy_(row_down[:, : down.shape[1]])
            up.copy_(row_up[: up.shape[0]])

    def _adapters(self, adapter_name: str) -> list[LiDBLayer]:
        """Return each layer's adapter, in the order of the space."""
        modules = [module for model in self.models.values() for module in model.modules()]
        wrappers = {m.get_base_layer(): m for m in modules if isinstance(m, LiDBLayer) and adapter_name in m.lidb_keys}
        pairs = list(zip(self.layer_names, self.layers, strict=True))
        missing = [name for name, layer in pairs if layer not in wrappers]
        if missing:
            raise ValueError(
                f"no LiDB adapter called {adapter_name!r} on {missing}; add it to every layer of the space"
            )
        adapters: list[LiDBLayer] = [wrappers[layer] for layer in self.layers]
        for index, adapter in enumerate(adapters):
            found = adapter.lidb_r[adapter_name], adapter.lidb_scale[adapter_name], adapter.lidb_keys[adapter_name]
            expected = self.config.r, self.config.scale, self.basis_keys(index)
            if found != expected:
                raise ValueError(
                    f"the adapter on {self.layer_names[index]} has rank, scale and bases {found}; this space has "
                    f"{expected}"
                )
        return adapters


def _remove_all(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
