"""Kill one of several processes that work together: the others end soon and say why, and nothing is lost.

Forks that meet by gloo train, or make targets, together; one is killed, as by ``kill -9``, at a random time. A resumed
training with as many processes leaves what an unbroken one leaves, bit for bit; with others its weights differ by
rounding: by less than a hundredth of what one step more changes. A few kills run with the tests; by hand:
``python tests/faults/test_ranks.py --kills 20 --seed 0 --processes 2``.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import torch
from forks import (
    LONGEST_S,
    contents,
    copy_inputs,
    count_kills,
    differences,
    find_torn,
    finish,
    is_alive,
    prepare_people,
    start,
)
from safetensors.torch import load

PEOPLE_A_STEP = 4  # so many processes at most
STEPS = 4
# In which the others end: at once; in a minute if they wait to meet it, in two if the main one dies as they meet.
NOTICED_S = 120.0
SLACK_S = 60.0  # on a machine that others use too
SAYS = {
    "train": ("another process of this training has died or hangs", "resume from the last checkpoint with --resume"),
    "preoptimize": ("another process of this pre-optimisation has died or hangs", "start all again"),
}
JOINING = ("has waited for the others", "start all of them again")


def command(name: str, processes: int, steps: int = STEPS) -> tuple[str, ...]:
    if name == "preoptimize":
        return ("preoptimize", "faces", "--base", "testbed", "--no-crop", "--out", "out", "--steps", "2", "--batch",
                "1", "--timesteps", "1")  # fmt: skip
    return ("train", "faces", "--base", "testbed", "--out", "out", "--encoder", "vit", "--no-crop", "--hidden-size",
            "16", "--k", "1", "--steps", str(steps), "--warmup-steps", "0",
            "--batch-size", "1", "--gradient-accumulation-steps", str(PEOPLE_A_STEP // processes),
            "--checkpoint-every", "2", "--log-every", "1", "--timesteps-per-step", "1", "--validation", "0.3",
            "--num-workers", "0")  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How processes have ended: their exit codes, what they printed, whether any left processes of its own behind, and
    how long after the kill the last one ended."""

    codes: list[int]
    printed: list[str]
    orphans: list[int]
    seconds: float


class Ranks:
    """Runs commands by several processes in folders of their own, from inputs that are made once."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.random = place, random.Random(seed)
        self.inputs = place / "inputs"
        prepare_people(self.inputs, 7)
        self.unbroken: dict[tuple, tuple[dict[str, bytes | None], float]] = {}
        self.slowest = 0.0

    def together(self, folder: Path, arguments: tuple[str, ...], processes: int, victim: int = -1, after_s: float = 0.0,
                 ) -> Ended:  # fmt: skip
        """Run `hdb` by so many processes; the victim is killed after a time, and then the others have a time to end."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        logs = [self.place / f"log-{rank}.txt" for rank in range(processes)]
        variables = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        children = [
            start(folder, arguments, log, variables=own if processes > 1 else None)
            for log, own in zip(logs, variables, strict=True)
        ]
        seconds = LONGEST_S
        if victim >= 0:
            time.sleep(after_s)
            if is_alive(children[victim]):
                os.kill(children[victim], signal.SIGKILL)
            seconds = NOTICED_S + SLACK_S
        killed = time.monotonic()
        codes = [finish(child, max(0.1, killed + seconds - time.monotonic())) for child in children]
        took = time.monotonic() - killed
        printed = [log.read_text(errors="replace") for log in logs]
        return Ended(codes, printed, [rank for rank, child in enumerate(children) if _is_group(child)], took)

    def expected(self, name: str, processes: int, steps: int = STEPS) -> tuple[dict[str, bytes | None], float]:
        """What an unbroken run leaves, and how many seconds it takes."""
        key = name, processes, steps
        if key not in self.unbroken:
            folder, began = self.fresh(), time.perf_counter()
            ended = self.together(folder, command(name, processes, steps), processes)
            assert set(ended.codes) == {0}, ended
            self.unbroken[key] = contents(folder / "out"), time.perf_counter() - began
            shutil.rmtree(folder)
        return self.unbroken[key]

    def kill(self, name: str, processes: int, again: int | None = None) -> str:
        """Kill one process once, and resume with ``again`` processes; returns what went wrong, or an empty string."""
        expected, seconds = self.expected(name, processes)
        folder, victim, after_s = self.fresh(), self.random.randrange(processes), self.random.uniform(0.05, seconds)
        again = again or self.random.choice((1, 2, 4))
        ended = self.together(folder, command(name, processes), processes, victim, after_s)
        self.slowest = max(self.slowest, ended.seconds)
        problems = [f"torn {torn}" for torn in find_torn(folder / "out")]
        problems += _wrong_ends(name, ended, victim, contents(folder / "out") == expected)
        is_begun = name == "train" and (folder / "out" / "training.safetensors").exists()
        resumed = self.together(folder, (*command(name, again), *["--resume"] * is_begun), again)
        problems += [
            f"the rerun exits {code}: {text[-600:]}"
            for code, text in zip(resumed.codes, resumed.printed, strict=True)
            if code
        ]
        found = contents(folder / "out")
        is_same = name == "preoptimize" or again == processes or not is_begun
        if not is_begun and name == "train":
            expected, _ = self.expected(name, again)
        problems += differences(found, expected) if is_same else self._differences_by_rounding(found, expected)
        shutil.rmtree(folder)
        where = f"{name}, process {victim + 1} of {processes} after {after_s:.2f} s, resumed with {again}"
        return f"{where}: {'; '.join(problems)}" if problems else ""

    def _differences_by_rounding(self, found: dict[str, bytes | None], expected: dict[str, bytes | None]) -> list[str]:
        """What another number of processes changes by more than a hundredth of what one step more does."""
        problems = [problem for problem in differences(found, expected) if not problem.endswith("differs")]
        shorter, _ = self.expected("train", 1, STEPS - 1)
        for name in ("last/model.safetensors", "best/model.safetensors"):
            distance = _distance(found.get(name), expected[name])
            step = _distance(shorter["last/model.safetensors"], expected["last/model.safetensors"])
            if not distance < 0.01 * step:
                problems.append(f"{name} differs by {distance:.2g}, and a step makes {step:.2g}")
        return problems

    def fresh(self) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.place))
        copy_inputs(self.inputs, folder)
        return folder


def _is_group(child: int) -> bool:
    """Whether there is still a process of the group that a fork has begun."""
    try:
        os.killpg(child, 0)
    except ProcessLookupError:
        return False
    return True


def _wrong_ends(name: str, ended: Ended, victim: int, is_all_done: bool) -> list[str]:
    """What is wrong with how the others ended: nothing if all was done, else each says one sentence."""
    problems = [f"process {rank + 1} has left some behind" for rank in ended.orphans]
    for rank, printed in enumerate(ended.printed):
        code = ended.codes[rank]
        if rank == victim or (code == 0 and is_all_done):
            continue
        errors = [line for line in printed.splitlines() if line.startswith("Error: ")]
        is_said = len(errors) == 1 and any(all(part in errors[0] for part in said) for said in (SAYS[name], JOINING))
        if code != 1 or not is_said or "Traceback" in printed:
            problems.append(f"process {rank + 1} exits {code} and says: {printed[-1500:]}")
    return problems


def _distance(first: bytes | None, second: bytes | None) -> float:
    """Between networks' weights, but for the key biases, which a softmax does not see and Adam moves by rounding."""
    if first is None or second is None:
        return float("inf")
    ours, theirs = load(first), load(second)
    squares = 0.0
    for name, value in ours.items():
        difference = value.double() - theirs[name].double()
        if name.endswith("self_attn.in_proj_bias"):
            width = len(difference) // 3
            difference[width : 2 * width] = 0
        squares += float(difference.square().sum())
    return squares**0.5


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Ranks(tmp_path_factory.mktemp("ranks"), seed=0)


@needs_fork
@pytest.mark.parametrize(("name", "again"), [("train", 2), ("train", 1), ("preoptimize", 1)])
def test_a_killed_process_ends_the_others_and_loses_nothing(ranks, name, again):
    assert ranks.kill(name, 2, again) == ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, choices=(2, 4))
    parser.add_argument("--only", choices=SAYS, action="append")
    arguments = parser.parse_args()
    names = arguments.only or list(SAYS)
    place = Path(tempfile.mkdtemp())
    ranks = Ranks(place, arguments.seed)
    count_kills(
        names,
        arguments.kills,
        lambda name, _: ranks.kill(name, arguments.processes),
        f", {arguments.processes} processes",
    )
    print(f"the others ended within {ranks.slowest:.0f} s; seed {arguments.seed}")
    shutil.rmtree(place)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
