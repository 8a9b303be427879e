"""`hdb` in forks, which start in no time and are killed as by ``kill -9``: what the tests of kills share."""

import collections
import contextlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from lidb_peft.safe_read import read_header

LONGEST_S = 900.0  # on a machine that others use too
TEMPORARY = (".hdb-tmp", ".hdb-old", ".hdb-lock")
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def prepare_people(folder: Path, count: int) -> None:
    """Write the folder ``faces``, an encoder to train with, and an empty ``out``; make sample pictures cheap."""
    from transformers import AutoModel, ViTConfig

    import hypernet.training.validation as validation
    from testbed.corpus import portrait

    validation.PICTURE_STEPS = 1
    (folder / "faces").mkdir(parents=True)
    (folder / "out").mkdir()
    for index in range(count):
        Image.fromarray(portrait(index, "validation")[0]).save(folder / "faces" / f"{index}.png")
    encoder = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(encoder).save_pretrained(folder / "vit")


def copy_inputs(inputs: Path, folder: Path) -> None:
    """Give a run a folder of its own; a base is never written."""
    for entry in inputs.iterdir():
        if entry.name == "model":
            (folder / "model").symlink_to(entry)
        else:
            shutil.copytree(entry, folder / entry.name)


def is_change(event: str, arguments: tuple) -> bool:
    """Whether an audited event changes the file system where a scenario runs; imports and devices do not count."""
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & WRITING) and "/dev/" not in str(arguments[0])
    return event in CHANGES


def start(
    folder: Path, arguments: tuple[str, ...], log: Path, die_before: int = 0, variables: Mapping[str, str] | None = None
) -> int:
    """Run `hdb` in a fork in ``folder``, in a process group of its own; returns its number.

    Args:
        log: takes what it prints, and in its last line how often it changed the file system.
        die_before: the number of the change of the file system that it does not live to make.
        variables: of the environment, that only the fork has.
    """
    child = os.fork()
    if child == 0:
        os.environ.update(variables or {})
        _forget_processes()
        _be_hdb(folder, arguments, log, die_before)
    return child


def _forget_processes() -> None:
    """What accelerate knows of other processes, since a test before this one has asked: there were none."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(folder: Path, arguments: tuple[str, ...], log: Path, die_before: int = 0, die_after_s: float = 0.0) -> int:
    """Run `hdb` as `start` does, to its end; returns its exit code, or minus the signal that ended it.

    Args:
        die_after_s: kill it after that time.
    """
    child = start(folder, arguments, log, die_before)
    if die_after_s:
        time.sleep(die_after_s)
        os.killpg(child, signal.SIGKILL) if is_alive(child) else None
    return finish(child, LONGEST_S)


def count_kills(names: Sequence[str], kills: int, kill: Callable[[str, int], str], kind: str = "") -> None:
    """Kill so many times, name by name in turns, and print what was lost and how often; Ctrl-C ends it early.

    Args:
        kill: called with a name and the kill's number; returns what went wrong, or an empty string.
        kind: what is said of each, such as ", 2 processes".
    """
    done, lost = collections.Counter(), collections.Counter()
    with contextlib.suppress(KeyboardInterrupt):
        for number in range(kills):
            name = names[number % len(names)]
            problem = kill(name, number)
            done[name] += 1
            if problem:
                lost[name] += 1
                print(problem, flush=True)
    for name in names:
        print(f"{name}{kind}: {done[name]} killed, {lost[name]} lost")
    print(f"{sum(done.values())} killed, {sum(lost.values())} lost")


def finish(child: int, seconds: float) -> int:
    """Wait for a fork, kill it if it takes longer, and return its exit code, or minus the signal that ended it."""
    deadline = time.monotonic() + seconds
    while is_alive(child):
        if time.monotonic() > deadline:  # a fork inherits locks that no thread of its own will open
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def is_alive(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _be_hdb(folder: Path, arguments: tuple[str, ...], log: Path, die_before: int) -> None:
    code, changes = 99, 0
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))  # instead of pytest's
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


def differences(found: Mapping[str, bytes | None], expected: Mapping[str, bytes | None]) -> list[str]:
    """What is lost, left over or another in a folder, by `contents`."""
    problems = [f"{path} is lost" for path in expected if path not in found]
    problems += [f"{path} is left" for path in found if path not in expected]
    return problems + [f"{path} differs" for path in expected if path in found and found[path] != expected[path]]


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
