"""Gives linear layers low-rank factors for a while, and gives the same ones to a recomputation of them.

Gradient checkpointing runs a block of the model a second time during ``backward()``, perhaps after the ``with`` block
that bound the factors has closed and another has opened. So while factors are bound, the models' checkpointing function
is called with the factors of the block's layers as further inputs, and binds those around every run of the block.
Both kinds of checkpointing then do the rest: the reentrant one, which detaches its inputs and differentiates the block
on its own, returns the factors' gradients with those of the other inputs.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .product import add_low_rank

LayerFactors = dict[int, tuple[Tensor, Tensor]]


class _Frame(NamedTuple):
    factors: LayerFactors
    checkpointed: bool  # bound around one block by the checkpointing function, so valid during backward


class Bindings(threading.local):
    """The factors bound now in this thread, innermost last; autograd recomputes on threads of its own."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []

    @contextmanager
    def bound(self, factors: LayerFactors, checkpointed: bool = False) -> Iterator[None]:
        self.frames.append(_Frame(factors, checkpointed))
        try:
            yield
        finally:
            self.frames.pop()


def hook_layers(layers: list[nn.Linear], bindings: Bindings) -> list[torch.utils.hooks.RemovableHandle]:
    """Make layer i add the update of the factors bound to i, if any; return the handles that undo it."""
    return [layer.register_forward_hook(_make_hook(i, layer, bindings)) for i, layer in enumerate(layers)]


def _make_hook(index: int, layer: nn.Linear, bindings: Bindings) -> Callable:
    ran_bound = False

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        nonlocal ran_bound
        if module is not layer:  # a deep copy of the model brings the hook along
            return None
        frame = bindings.frames[-1] if bindings.frames else None
        in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if in_backward and (frame is None or not frame.checkpointed):
            if not ran_bound:
                return None
            raise RuntimeError(
                "gradient checkpointing recomputes a layer without its factors; enable checkpointing by the model's "
                "own method (enable_gradient_checkpointing of diffusers >= 0.33, gradient_checkpointing_enable of "
                "transformers) before opening the block"
            )
        if not in_backward:
            ran_bound = frame is not None
        if frame is None:
            return None
        return add_low_rank(output, args[0], *frame.factors[index])

    return hook


_CHECKPOINT = "_gradient_checkpointing_func"  # of diffusers' and transformers' modules: their checkpointing function


class CheckpointRouter:
    """Routes the models' checkpointing functions through ``Bindings`` while factors are bound."""

    def __init__(self, models: list[nn.Module], layers: list[nn.Linear], bindings: Bindings) -> None:
        self.bindings = bindings
        self.owners = [m for model in models for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        index = {layer: i for i, layer in enumerate(layers)}
        self.layers_in = {
            module: [index[m] for m in module.modules() if m in index] for model in models for module in model.modules()
        }

    @contextmanager
    def routed(self) -> Iterator[None]:
        """Replace the checkpointing function of every module that has checkpointing switched on."""
        routed = []
        for owner in self.owners:
            original = getattr(owner, _CHECKPOINT, None)
            if owner.gradient_checkpointing and original is not None and not self._is_ours(original):
                setattr(owner, _CHECKPOINT, functools.partial(self._checkpoint, original, owner))
                routed.append((owner, original))
        try:
            yield
        finally:
            for owner, original in routed:
                if self._is_ours(getattr(owner, _CHECKPOINT)):
                    setattr(owner, _CHECKPOINT, original)

    def _is_ours(self, function: Callable) -> bool:
        return isinstance(function, functools.partial) and getattr(function.func, "__self__", None) is self

    def _checkpoint(self, original: Callable, owner: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
        block = _block_of(function)
        indices = self.layers_in.get(owner if block is None else block, [])
        if not self.bindings.frames or not indices:
            return original(function, *args, **kwargs)
        factors = self.bindings.frames[-1].factors
        tensors = [tensor for i in indices for tensor in factors[i]]

        def run(*inputs: Any, **options: Any) -> Any:
            pairs = zip(inputs[: len(tensors) : 2], inputs[1 : len(tensors) : 2], strict=True)
            with self.routed(), self.bindings.bound(dict(zip(indices, pairs, strict=True)), checkpointed=True):
                return function(*inputs[len(tensors) :], **options)

        return original(run, *tensors, *args, **kwargs)


def _block_of(function: Callable) -> nn.Module | None:
    """Return the module that a checkpointed function runs: diffusers passes it, transformers a partial or a method."""
    while isinstance(function, functools.partial):
        if function.args and isinstance(function.args[0], nn.Module):
            return function.args[0]
        function = function.func
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None
