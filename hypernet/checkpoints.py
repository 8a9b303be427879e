"""What a fit writes while it runs: intermediate LoRAs, sample pictures, and a state to resume from.

Files are written by a thread of their own, one after the other, while the fit goes on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from converters import KohyaMetadata, write_lora
from converters.sidecar import write_our_picture
from hypernet.fitting.running import RunningFit
from hypernet.recipe import PersonalizeConfig
from lidb_peft import LoraFactors
from lidb_peft.sealed import read_tree, write_tree

FORMAT_VERSION = 1
_IN_QUEUE = 4  # files; each holds its numbers in memory
STATE_SUFFIX = ".hdb-state"
# They change how fast a fit is or how it is cropped and drawn, not its numbers; photos are told by their own digest.
_FREE = {"gradient_checkpointing", "guidance", "crop", "face_detector", "face"}


def step_path(out: Path, step: int, suffix: str = ".safetensors") -> Path:
    """Where the LoRA of an intermediate step goes: ``me-000020.safetensors``, as kohya names them."""
    return out.with_name(f"{out.stem}-{step:06d}{suffix}")


def state_path(out: Path) -> Path:
    """Where the state of the fit of the LoRA ``out`` goes; no program takes it for a LoRA."""
    return out.with_name(out.stem + STATE_SUFFIX)


def due_steps(every: int | None, num_steps: int) -> list[int]:
    """The intermediate steps that are kept; the last step is the LoRA itself."""
    return [] if every is None else list(range(every, num_steps, every))


class Writer:
    """Writes files in the background, in order; what fails is raised when the block ends.

    An exception in the block, Ctrl-C included, waits for what is being written.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hdb-writer")
        self._jobs: list[Future] = []

    def submit(self, write: Callable[[], Any]) -> None:
        """Write soon; a fit that is faster than the disk waits, so that what is to be written does not pile up."""
        if len(self._jobs) >= _IN_QUEUE:
            wait([self._jobs[-_IN_QUEUE]])
        self._jobs.append(self._thread.submit(write))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            for job in self._jobs:
                job.result()


def run_record(config: PersonalizeConfig, **told: str) -> dict[str, str]:
    """What a fit's numbers follow from, as text by name: a state is of one such record.

    Args:
        told: what else: the base, its dtype, the photos, where the fit starts.
    """
    fields = {name: value for name, value in asdict(config).items() if name not in _FREE}
    return {name: json.dumps(value) for name, value in fields.items()} | told


class OtherFitError(ValueError):
    """A state is of another fit.

    Attributes:
        differing: what its record differs in.
    """

    def __init__(self, path: Path, differing: Sequence[str]) -> None:
        super().__init__(
            f"{path} is of a fit with another {' and '.join(differing)}; resume with what it was begun with, or start "
            "over with --overwrite"
        )
        self.differing = differing


class Checkpoints:
    """The files of one fit, of one person or many, beside the LoRAs.

    Attributes:
        outs: the LoRA of each person; nothing is written for those who have None.
        state: the file to resume from.
        files: what was written, in order.
    """

    def __init__(
        self,
        outs: Sequence[Path | None],
        state: Path,
        writer: Writer,
        metadata: Sequence[KohyaMetadata],
        record: dict[str, str],
    ) -> None:
        self.outs, self.state = outs, state
        self.files: list[Path] = []
        self._writer, self._metadata, self._record = writer, metadata, record

    def keep_lora(self, person: int, step: int, factors: LoraFactors) -> None:
        out = self.outs[person]
        if out is None:
            return
        path, metadata = step_path(out, step), self._metadata[person]
        self._writer.submit(lambda: self.files.extend(write_lora(path, factors, metadata, dtype=torch.float16)))

    def keep_picture(self, person: int, step: int, picture: Image.Image, parameters: str) -> None:
        out = self.outs[person]
        if out is None:
            return
        path = step_path(out, step, ".png")

        def write() -> None:
            write_our_picture(picture, path, parameters)
            self.files.append(path)

        self._writer.submit(write)

    def keep_state(
        self, stage: str, run: RunningFit, theta: Tensor, losses: dict[str, Tensor], failed: Mapping[int, str]
    ) -> None:
        """Write what the fit needs to resume.

        Args:
            theta: where the finetuning starts, ``(N, L, row)``.
            losses: of the stages before.
            failed: whose fit diverged in those, and why.
        """
        tree = {"format": FORMAT_VERSION, "record": self._record, "stage": stage, "fit": run.state(),
                "theta": theta.cpu(), "losses": dict(losses),
                "failed": {str(person): reason for person, reason in failed.items()}}  # fmt: skip
        self._writer.submit(lambda: write_tree(self.state, tree))

    def load_state(self) -> dict[str, Any]:
        """Read what `keep_state` has written last; raises as `read_state`."""
        return read_state(self.state, self._record)

    def remove_state(self) -> None:
        self.state.unlink(missing_ok=True)


def read_state(path: Path, record: dict[str, str]) -> dict[str, Any]:
    """Read the state of a fit of the same run.

    Raises:
        FileNotFoundError: there is none.
        OtherFitError: it is of another run.
        ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, so there is no fit to resume; leave --resume out")
    state = read_tree(path)
    if state.get("format") != FORMAT_VERSION or not isinstance(state.get("record"), dict):
        raise ValueError(f"{path} is not a state that this version of lidb-peft reads; start over, with --overwrite")
    theirs = state["record"]
    differing = sorted(name for name in {*record, *theirs} if record.get(name) != theirs.get(name))
    if differing:
        raise OtherFitError(path, differing)
    return state
