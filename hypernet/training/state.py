"""What a training needs to go on after an interruption, in one file that is whole or not there.

The order of people and all noise follow from the step number, so no generator's state is among it.
"""

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypernet.recipe import TrainConfig
from lidb_peft.files import atomic_path

STATE_FILE = "training.pt"
FORMAT_VERSION = 1
# They change how a run is watched or how fast it is, not what is learned.
_FREE = {"log_every", "checkpoint_every", "workers", "gradient_checkpointing", "batch", "accumulation"}


@dataclass
class TrainingState:
    """Everything that changes from step to step.

    Attributes:
        network: whose trainable parameters are saved.
        data: fingerprints of what is trained on, by name.
        parts: what else has ``state_dict`` and ``load_state_dict``, by name: optimizer, schedule, loss scaler.
        step: steps done.
        best: the lowest validation loss so far.
    """

    network: nn.Module
    data: dict[str, str]
    parts: dict[str, Any]
    step: int = 0
    best: float = float("inf")

    def save(self, folder: Path, config: TrainConfig, world: int) -> None:
        """Write the state; the run is described by its config and number of processes."""
        state = {
            "format": FORMAT_VERSION,
            "config": json.dumps(asdict(config)),
            "world": world,
            "data": self.data,
            "step": self.step,
            "best": self.best,
            "network": dict(_trainable(self.network)),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        with atomic_path(folder / STATE_FILE) as temporary:
            torch.save(state, temporary)

    def load(self, folder: Path, config: TrainConfig, world: int) -> None:
        """Take over the state that ``save`` has written.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another config, number of processes, data or hypernetwork.
        """
        path = folder / STATE_FILE
        state = _read(path)
        _check_config(path, json.loads(state["config"]), state["world"], config, world)
        their_data = state.get("data", self.data)  # not noted in the first states
        changed = sorted(name for name in {*their_data, *self.data} if their_data.get(name) != self.data.get(name))
        if changed:
            raise ValueError(f"{path} was trained on other {' and '.join(changed)} than there are now, by their names, "
                             f"sizes or order; resume with the same ones, or train anew")  # fmt: skip
        parameters = dict(_trainable(self.network))
        theirs = {name: tuple(value.shape) for name, value in state["network"].items()}
        ours = {name: tuple(value.shape) for name, value in parameters.items()}
        if theirs != ours:
            names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
            raise ValueError(
                f"{path} is of another hypernetwork: {len(names)} of its weights are missing here or have another "
                f"shape, {names[0]} for one; resume with the hypernetwork in {folder}"
            )
        if set(state["parts"]) != set(self.parts):
            raise ValueError(f"{path} holds {sorted(state['parts'])}; expected {sorted(self.parts)}: resume on the "
                             f"kind of device, and with the precision, that it was written with")  # fmt: skip
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["network"][name])
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.step, self.best = state["step"], state["best"]


def _trainable(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in network.named_parameters() if value.requires_grad]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, so there is no training to resume; check the folder, or train "
                                f"without resuming")  # fmt: skip
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged; go on from the hypernetwork beside it with a new training")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != FORMAT_VERSION:
        raise ValueError(f"{path} is no training state that this version of lidb-peft reads; train anew")
    return state


def _check_config(path: Path, theirs: dict[str, Any], their_world: int, config: TrainConfig, world: int) -> None:
    ours = json.loads(json.dumps(asdict(config)))
    differing = [name for name in ours if name not in _FREE and theirs.get(name) != ours[name]]
    if differing:
        found = ", ".join(f"{name} {theirs.get(name)!r} (here {ours[name]!r})" for name in differing)
        raise ValueError(f"{path} was trained with {found}; resume with its own settings")
    their_people = their_world * theirs["batch"] * theirs["accumulation"]
    if their_people != (people := world * config.batch * config.accumulation):
        raise ValueError(
            f"{path} was trained on {their_people} people a step and processes, batch and accumulation make {people} "
            f"now; let them make as many"
        )
