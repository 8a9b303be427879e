"""The state that resumes an interrupted training, in one file that is either complete or absent.

The order of people and all noise follow from the step number, so it contains no generator state.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypernet.errors import differing_names, differing_shapes
from hypernet.recipe import TrainConfig
from lidb_peft.safe_read import printable
from lidb_peft.sealed import read_tree, same_kind, write_tree

STATE_FILE = "training.safetensors"
FORMAT_VERSION = 2
_EARLIER_FILE = "training.pt"  # of format 1, a pickle
# They change how a run is monitored or how fast it is, not what is learned.
_FREE = {
    "log_every", "checkpoint_every", "num_workers", "gradient_checkpointing", "batch_size",
    "gradient_accumulation_steps", "cache",
}  # fmt: skip
# Fields that states omitted while they had only one possible value.
_EARLIER: dict[str, Any] = {"face_detector": "cascade", "face": "largest", "ema_decay": 0.0}
# Older names of fields -> current ones.
_RENAMED = {
    "batch": "batch_size", "accumulation": "gradient_accumulation_steps", "schedule": "lr_scheduler",
    "workers": "num_workers", "weights": "target_distance",
}  # fmt: skip


@dataclass
class TrainingState:
    """Everything that changes from step to step.

    Attributes:
        network: its trainable parameters are saved.
        data: name -> fingerprint of the training data.
        parts: name -> other objects with ``state_dict`` and ``load_state_dict``: optimizer, schedule, loss scaler, EMA.
        step: steps done.
        best: the lowest validation loss so far.
    """

    network: nn.Module
    data: dict[str, str]
    parts: dict[str, Any]
    step: int = 0
    best: float = float("inf")

    def save(self, folder: Path, config: TrainConfig, world: int) -> None:
        """Write the state; config and number of processes identify the run."""
        state = {
            "format": FORMAT_VERSION,
            "config": asdict(config),
            "world": world,
            "data": self.data,
            "step": self.step,
            "best": self.best,
            "network": dict(_trainable(self.network)),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        write_tree(folder / STATE_FILE, state)

    def load(self, folder: Path, config: TrainConfig, world: int) -> None:
        """Restore the state that ``save`` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another config, number of processes, data or hypernetwork.
        """
        path = folder / STATE_FILE
        state = _read(path)
        _check_config(path, state["config"], state["world"], config, world)
        changed = differing_names(state["data"], self.data)
        if changed:
            raise ValueError(f"{path} was trained on other {printable(' and '.join(changed))} than there are now, by "
                             f"their names, photos or order; resume with the same ones, or train again")  # fmt: skip
        parameters = dict(_trainable(self.network))
        names = differing_shapes(state["network"], parameters)
        if names:
            raise ValueError(
                f"{path} is of another hypernetwork: {len(names)} of its weights are missing here or have another "
                f"shape, e.g. {printable(names[0])}; resume with the hypernetwork in {folder}"
            )
        if set(state["parts"]) != set(self.parts):
            found = printable(str(list(state["parts"])))
            raise ValueError(f"{path} holds {found}; expected {sorted(self.parts)}: resume on the kind "
                             f"of device, and with the precision, that it was written with")  # fmt: skip
        for name, part in self.parts.items():
            _load_part(path, part, state["parts"][name])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["network"][name])
        self.step, self.best = state["step"], state["best"]


def _trainable(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in network.named_parameters() if value.requires_grad]


def has_state(folder: Path) -> bool:
    """Return whether there is a training in ``folder``, even in an earlier format."""
    return any((folder / name).exists() for name in (STATE_FILE, _EARLIER_FILE))


def _read(path: Path) -> dict[str, Any]:
    remedy = "start a new training from the hypernetwork beside it with --hypernet"
    earlier = path.with_name(_EARLIER_FILE)
    if not path.is_file() and earlier.is_file():
        raise ValueError(f"{earlier} is a training state of format 1, a pickle, which is not read any more; {remedy}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, so there is no training to resume; check the folder, or train "
                                f"without resuming")  # fmt: skip
    try:
        state = read_tree(path)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} ").removeprefix("is damaged: ")
        raise ValueError(f"{path} is damaged: {reason}; {remedy}") from error
    if state.get("format") != FORMAT_VERSION:
        found = printable(repr(state.get("format")))
        raise ValueError(f"{path} has format {found}, and this version of lidb-peft reads {FORMAT_VERSION}; {remedy}")
    kinds = {"config": dict, "world": int, "data": dict, "step": int, "best": float, "network": dict, "parts": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    wrong += [] if all(isinstance(value, Tensor) for value in (state.get("network") or {}).values()) else ["network"]
    if wrong or state["step"] < 0:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(wrong) or 'a step'}; {remedy}")
    return state


def _load_part(path: Path, part: Any, theirs: Any) -> None:
    """Load one of the parts; except for optimizer states, it must have the same structure as the current one."""
    ours = part.state_dict()
    fixed = [{key: value for key, value in own.items() if key != "state"} if isinstance(own, dict) else own
             for own in (ours, theirs)]  # fmt: skip
    try:
        if not same_kind(*fixed):
            raise ValueError("it has other settings")
        part.load_state_dict(theirs)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged: its {type(part).__name__} cannot be loaded ({printable(str(error))}); train again"
        ) from error


def _check_config(path: Path, theirs: dict[str, Any], their_world: int, config: TrainConfig, world: int) -> None:
    ours = json.loads(json.dumps(asdict(config)))
    theirs = _EARLIER | {_RENAMED.get(name, name): value for name, value in theirs.items()}
    missing = [name for name in ("batch_size", "gradient_accumulation_steps") if not isinstance(theirs.get(name), int)]
    if missing:
        raise ValueError(f"{path} is damaged: its config lacks {missing[0]}; train again")
    free = _FREE if config.crop else _FREE | {"face_detector", "face"}
    differing = [name for name in ours if name not in free and theirs.get(name) != ours[name]]
    if differing:
        found = ", ".join(f"{name} {printable(repr(theirs.get(name)))} (here {ours[name]!r})" for name in differing)
        raise ValueError(f"{path} was trained with {found}; resume with its own settings")
    their_people = their_world * theirs["batch_size"] * theirs["gradient_accumulation_steps"]
    if their_people != (people := world * config.batch_size * config.gradient_accumulation_steps):
        raise ValueError(
            f"{path} was trained on {their_people} people a step, and processes, batch_size and "
            f"gradient_accumulation_steps make {people} now; let them make as many"
        )
