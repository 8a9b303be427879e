"""Kill `hdb` anywhere: nothing half-written has a final name, and the next run leaves what the unbroken one leaves.

A forked `hdb` is killed, as by ``kill -9``, just before a random change of the file system or at a random time. A few
kills run with the tests; by hand, over all commands: ``python tests/faults/test_kills.py --kills 200 --seed 0``.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import torch
from PIL import Image

from lidb_peft.safe_read import read_header

LONGEST_S = 900.0  # on a machine that others use too
TEMPORARY = (".hdb-tmp", ".hdb-old", ".hdb-lock")
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
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
    from transformers import AutoModel, ViTConfig

    from converters.formats.kohya import write_lora
    from converters.metadata import KohyaMetadata
    from hypernet.base_models.loading import load_base
    from lidb_peft.naming import find_layers
    from testbed import miniature_lidb_config, miniature_path
    from testbed.corpus import portrait

    (folder / "faces").mkdir()
    (folder / "loras").mkdir()
    (folder / "out").mkdir()
    for index in range(3):
        Image.fromarray(portrait(index, "validation")[0]).save(folder / "faces" / f"{index}.png")
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
    encoder = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(encoder).save_pretrained(folder / "vit")


def is_change(event: str, arguments: tuple) -> bool:
    """Whether an audited event changes the file system where a scenario runs; imports and devices do not count."""
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & WRITING) and "/dev/" not in str(arguments[0])
    return event in CHANGES


def run(folder: Path, arguments: tuple[str, ...], log: Path, die_before: int = 0, die_after_s: float = 0.0) -> int:
    """Run `hdb` in a fork in ``folder``; returns its exit code, or minus the signal that ended it.

    Args:
        log: takes what it prints, and in its last line how often it changed the file system.
        die_before: the number of the change of the file system that it does not live to make.
        die_after_s: kill it after that time.
    """
    child = os.fork()
    if child == 0:
        _be_hdb(folder, arguments, log, die_before)
    if die_after_s:
        time.sleep(die_after_s)
        os.killpg(child, signal.SIGKILL) if _is_alive(child) else None
    deadline = time.monotonic() + LONGEST_S
    while _is_alive(child):
        if time.monotonic() > deadline:  # a fork inherits locks that no thread of its own will open
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _is_alive(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _be_hdb(folder: Path, arguments: tuple[str, ...], log: Path, die_before: int) -> None:
    code, changes = 99, 0
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(folder)

        def hook(event, event_arguments):
            nonlocal changes
            if is_change(event, event_arguments):
                changes += 1
                if changes == die_before:
                    os.killpg(0, signal.SIGKILL)

        sys.addaudithook(hook)
        from cli.main import main

        main(list(arguments), standalone_mode=True)
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(1, f"\n{changes}".encode())
        os._exit(code if isinstance(code, int) else 98)


def num_changes(log: Path) -> int:
    return int(log.read_text(errors="replace").splitlines()[-1])


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their bytes, folders with None."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def find_torn(folder: Path) -> list[str]:
    """Files under a final name that are not whole."""
    torn = []
    for path in folder.rglob("*"):
        if not path.is_file() or any(part.endswith(TEMPORARY) for part in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".safetensors":
                read_header(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".png":
                with Image.open(path) as picture:
                    picture.load()
        except (ValueError, OSError) as error:
            torn.append(f"{path.name}: {error}")
    return torn


class Killer:
    """Runs scenarios in folders of their own, from inputs that are made once."""

    def __init__(self, place: Path, seed: int) -> None:
        import hypernet.training.validation as validation

        validation.PICTURE_STEPS = 1
        self.place, self.random = place, random.Random(seed)
        self.inputs = place / "inputs"
        self.inputs.mkdir()
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
        found = contents(folder / "out")
        problems += [f"{path} is lost" for path in expected if path not in found]
        problems += [f"{path} is left" for path in found if path not in expected]
        problems += [f"{path} differs" for path in expected if path in found and found[path] != expected[path]]
        shutil.rmtree(folder)
        return f"{name} {when}: {'; '.join(problems)}" if problems else ""

    def _fresh(self, name: str) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.place))
        for entry in self.inputs.iterdir():
            if entry.name == "model":
                (folder / "model").symlink_to(entry)  # never written
            else:
                shutil.copytree(entry, folder / entry.name)
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
    done, lost = collections.Counter(), collections.Counter()
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends it with what was found so far
        for number in range(arguments.kills):
            name = names[number % len(names)]
            problem = killer.kill(name, by_time=number % 5 == 4)
            done[name] += 1
            if problem:
                lost[name] += 1
                print(problem, flush=True)
    for name in names:
        print(f"{name}: {done[name]} killed, {lost[name]} lost")
    print(f"{sum(done.values())} killed, {sum(lost.values())} lost; seed {arguments.seed}")
    shutil.rmtree(place)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
