"""A fit while it runs: its step and loss, the weights so far, and everything that it needs to go on later."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lidb_peft.sealed import same_kind

_RECENT = 10  # steps; the loss of one tells little, for it depends on its timestep


class RunningFit:
    """A fit of N identities between two of its steps.

    Attributes:
        steps: in all.
        losses: of the steps that are done, each ``(N,)`` on the device.
    """

    def __init__(
        self,
        parameters: Tensor,
        optimizer: torch.optim.Optimizer,
        generators: Sequence[torch.Generator],
        steps: int,
    ) -> None:
        self._parameters, self._optimizer, self._generators = parameters, optimizer, generators
        self.steps = steps
        self.losses: list[Tensor] = []

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def loss(self) -> float:
        """The mean of the last steps; reading it waits for the device."""
        return float(torch.stack(self.losses[-_RECENT:]).mean())

    def all_losses(self) -> Tensor:
        """``(steps done, N)`` on the CPU."""
        return torch.stack(self.losses).cpu() if self.losses else torch.empty(0, len(self._parameters))

    def weights(self) -> Tensor:
        """A copy of the parameters ``(N, ...)`` on the CPU."""
        return self._parameters.detach().to("cpu", copy=True)

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, as `lidb_peft.sealed.write_tree` writes it; copies on the CPU."""
        return {
            "weights": self.weights(),
            "optimizer": _copied(self._optimizer.state_dict()["state"]),
            "noise": [generator.get_state() for generator in self._generators],
            "losses": self.all_losses(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, to the very numbers of a fit that did not stop.

        Raises:
            ValueError: it is of other weights, or of more steps than there are.
        """
        ours = {"weights": self._parameters, "noise": [generator.get_state() for generator in self._generators]}
        if not same_kind(ours, {name: state.get(name) for name in ours}) or len(state["losses"]) > self.steps:
            raise ValueError("the fit to resume is of other photos, layers, rank or steps; resume it as it was begun")
        with torch.no_grad():
            self._parameters.copy_(state["weights"])
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        for generator, own in zip(self._generators, state["noise"], strict=True):
            generator.set_state(own)
        self.losses = list(state["losses"].to(self._parameters.device).unbind())


Observer = Callable[[RunningFit], bool | None]
"""Called after each step; True ends the fit."""


def _copied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    return {key: _copied(value) for key, value in state.items()} if isinstance(state, dict) else state
