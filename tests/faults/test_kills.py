"""Kill `hdb` anywhere: nothing half-written has a final name, and the next run leaves what the unbroken one leaves.

A forked `hdb` is killed, as by ``kill -9``, just before a random change of the file system or at a random time. A few
kills run with the tests; by hand, over all commands: ``python tests/faults/test_kills.py --kills 200 --seed 0``.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import torch
from forks import contents, copy_inputs, count_kills, differences, find_torn, num_changes, prepare_people, run
from PIL import Image

BASE = ("--base", "testbed", "--hypernet", "none", "--no-crop")
FIT = (*BASE, "--theta-steps", "1", "--steps", "1", "--preservation", "0")


@dataclass(frozen=True)
class Scenario:
    """A command that writes into ``out`` of the folder that it runs in, which holds its inputs."""

    arguments: tuple[str, ...]
    is_once: bool = False  # what is there already is refused
    again: Callable[[Path], tuple[str, ...]] | None = None  # by the folder that a kill has left
    before: tuple[str, ...] = ()  # a command that has made what this one replaces

    def rerun(self, folder: Path) -> tuple[str, ...]:
        return self.arguments if self.again is None else self.again(folder)


TRAIN = ("train", "faces", "--base", "testbed", "--out", "out", "--encoder", "vit", "--no-crop", "--hidden-size", "16",
         "--k", "1", "--steps", "2", "--batch-size", "1", "--checkpoint-every", "1", "--log-every", "1",
         "--timesteps-per-step", "1", "--validation", "0.4")  # fmt: skip
ONE = ("personalize", "faces/0.png", *FIT, "--out", "out/me.safetensors")
SCENARIOS = {
    "convert": Scenario(("convert", "loras", "out")),
    "convert --to peft": Scenario(("convert", "loras/0.safetensors", "out", "--to", "peft")),
    "convert --to peft over another": Scenario(
        ("convert", "loras/0.safetensors", "out/one", "--to", "peft", "--overwrite"),
        before=("convert", "loras/1.safetensors", "out/one", "--to", "peft"),
    ),
    "merge": Scenario(("merge", "loras/0.safetensors", "loras/1.safetensors", "--out", "out/both.safetensors"), True),
    "merge --into a folder": Scenario(("merge", "loras/0.safetensors", "--into", "model", "--out", "out/merged"), True),
    "preoptimize": Scenario(
        ("preoptimize", "faces", "--base", "testbed", "--no-crop", "--out", "out", "--steps", "1", "--batch", "2",
         "--timesteps", "1")
    ),
    "personalize": Scenario(ONE, again=lambda _: (*ONE, "--overwrite")),
    "personalize --each": Scenario(("personalize", "--each", "faces", *FIT, "--out", "out", "--batch", "2")),
    "train": Scenario(
        TRAIN, again=lambda folder: (*TRAIN, "--resume") if (folder / "out/training.safetensors").exists() else TRAIN
    ),
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Write the inputs of all scenarios."""
    from converters.formats.kohya import write_lora
    from converters.metadata import KohyaMetadata
    from hypernet.base_models.loading import load_base
    from lidb_peft.naming import find_layers
    from testbed import miniature_lidb_config, miniature_path

    prepare_people(folder, 3)
    (folder / "loras").mkdir()
    base = load_base(str(miniature_path()), device="cpu")
    generator = torch.Generator().manual_seed(0)
    config = miniature_lidb_config()
    layers = {name: layer for component, model in base.adapted.items()
              for name, layer in list(find_layers(component, model, config).items())[:3]}  # fmt: skip
    for index in range(2):
        shapes = {name: ((2, layer.in_features), (layer.out_features, 2)) for name, layer in layers.items()}
        factors = {name: [torch.randn(shape, generator=generator) for shape in pair] for name, pair in shapes.items()}
        picture = Image.new("RGB", (8, 8), (index * 90, 0, 0))
        about = KohyaMetadata(trigger=f"person {index}")
        write_lora(folder / "loras" / f"{index}.safetensors", factors, about, preview=picture)
    shutil.copytree(miniature_path(), folder / "model")


class Killer:
    """Runs scenarios in folders of their own, from inputs that are made once."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.random = place, random.Random(seed)
        self.inputs = place / "inputs"
        prepare(self.inputs)
        self.log = place / "log.txt"
        self.unbroken: dict[str, tuple[dict[str, bytes | None], int, float]] = {}

    def expected(self, name: str) -> tuple[dict[str, bytes | None], int, float]:
        """What an unbroken run leaves, how often it changes the file system, and how many seconds it takes."""
        if name not in self.unbroken:
            folder, start = self._fresh(name), time.perf_counter()
            assert run(folder, SCENARIOS[name].arguments, self.log) == 0, self.log.read_text(errors="replace")
            seconds = time.perf_counter() - start
            self.unbroken[name] = contents(folder / "out"), num_changes(self.log), seconds
            shutil.rmtree(folder)
        return self.unbroken[name]

    def kill(self, name: str, by_time: bool = False) -> str:
        """Kill a scenario once and run it again; returns what went wrong, or an empty string."""
        expected, changes, seconds = self.expected(name)
        folder = self._fresh(name)
        when = {"die_after_s": self.random.uniform(0.05, seconds)} if by_time else {
            "die_before": self.random.randint(1, changes)}  # fmt: skip
        run(folder, SCENARIOS[name].arguments, self.log, **when)
        problems = [f"torn {torn}" for torn in find_torn(folder / "out")]
        if SCENARIOS[name].is_once and contents(folder / "out") == expected:  # killed when all was done
            shutil.rmtree(folder)
            return ""
        code = run(folder, SCENARIOS[name].rerun(folder), self.log)
        if code:
            problems.append(f"the rerun exits {code}: {self.log.read_text(errors='replace')[-600:]}")
        problems += differences(contents(folder / "out"), expected)
        shutil.rmtree(folder)
        return f"{name} {when}: {'; '.join(problems)}" if problems else ""

    def _fresh(self, name: str) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.place))
        copy_inputs(self.inputs, folder)
        before = SCENARIOS[name].before
        assert not before or run(folder, before, self.log) == 0, self.log.read_text(errors="replace")
        return folder


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    return Killer(tmp_path_factory.mktemp("kills"), seed=0)


@needs_fork
@pytest.mark.parametrize(
    ("name", "kills"),
    [("convert", 4), ("convert --to peft", 3), ("convert --to peft over another", 3), ("merge", 1), ("preoptimize", 1)],
)
def test_a_killed_run_loses_nothing(killer, name, kills):
    assert [problem for _ in range(kills) if (problem := killer.kill(name))] == []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SCENARIOS, action="append")
    arguments = parser.parse_args()
    names = arguments.only or list(SCENARIOS)
    place = Path(tempfile.mkdtemp())
    killer = Killer(place, arguments.seed)
    count_kills(names, arguments.kills, lambda name, number: killer.kill(name, by_time=number % 5 == 4))
    print(f"seed {arguments.seed}")
    shutil.rmtree(place)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
