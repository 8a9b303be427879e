"""A full disk is one sentence that names a file, whoever was writing, and no half a file is left there."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cli.main import as_sentence

PAGE_BYTES = 4096  # the unit in which a tmpfs counts
SENTENCE = r"the disk is full: full/\S+ could not be written; free some space and try again"
QUICK = ("--base", "testbed", "--no-crop")


@pytest.fixture
def full_disk(hdb):
    """A function: mount a file system with room for so many pages, called ``full``; returns its folder."""
    folder = hdb.folder / "full"

    def mount(pages: int) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={(pages + 1) * PAGE_BYTES}", "tmpfs", str(folder)]
        if sys.platform != "linux" or not shutil.which("mount") or subprocess.run(command).returncode:
            pytest.skip("mounting a file system of a few pages takes Linux, and root")
        (folder / "other").write_bytes(bytes(PAGE_BYTES))
        return Path(folder.name)

    yield mount
    if folder.is_mount():
        # Lazily: a thread of a command that failed may still have its file open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_told(message: str) -> None:
    assert re.fullmatch(SENTENCE, message), message
    assert "tmp" not in message


@pytest.mark.parametrize("pages", [0, 1, 40])
def test_of_what_makes_files_of_files(hdb, made, full_disk, pages):
    full, lora = full_disk(pages), made / "me.safetensors"
    for command in (
        ("convert", lora, full / "me.safetensors", "--to", "diffusers"),
        ("convert", lora, full / "peft", "--to", "peft"),
        ("convert", made / "theta.safetensors", full / "me.safetensors", "--base", "testbed"),
        ("resize", lora, full / "me.safetensors", "--rank", 4),
        ("merge", lora, f"{lora}=0.5", "--out", full / "me.safetensors"),
    ):
        assert_told(hdb.fail(*command))


@pytest.mark.parametrize(("pages", "more"), [(0, ()), (40, ("--save-every", 2)), (40, ("--preview-every", 2))])
def test_of_a_fit_and_what_it_leaves_on_the_way(hdb, personalize, portrait, full_disk, pages, more):
    full = full_disk(pages)
    command = [*personalize(portrait, "--out", full / "me.safetensors"), "--steps", 4, *more]
    assert_told(hdb.run(*command, code=1).splitlines()[-1].removeprefix("Error: "))
    for file in full.glob("*.safetensors"):
        assert load_file(file)  # what is there is whole
    assert not [file for file in full.iterdir() if "tmp" in file.name]


@pytest.mark.parametrize("command", [
    ("prepare", "faces", "--no-crop", "--resolution", 32, "--num-workers", 0),
    ("preoptimize", "faces", *QUICK, "--steps", 1, "--timesteps-per-step", 1),
    ("train", "faces", *QUICK, "--num-workers", 0, "--batch-size", 2, "--steps", 2, "--log-every", 1, "--encoder",
     "vit", "--hidden-size", 32, "--k", 2, "--validation", 0),
    ("personalize", "--each", "faces", *QUICK, "--no-preview", "--steps", 1),
], ids=lambda command: command[0])  # fmt: skip
def test_of_what_reads_many_people(hdb, trainable, draw_faces, full_disk, command):
    draw_faces("a.png", "b.png")
    full = full_disk(2)
    assert_told(hdb.run(*command, "--out", full / "out", code=1).splitlines()[-1].removeprefix("Error: "))


def test_of_pictures(hdb, full_disk):
    assert_told(hdb.fail("generate", "a face", "--base", "testbed", "--steps", 1, "--out", full_disk(0) / "a.png"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_of_where_the_output_of_a_command_goes(made):
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-m", "lidb_peft", "inspect", made / "me.safetensors"], stdout=full,
                                stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["Error: the disk is full; free some space and try again"]


def test_a_quota_is_a_full_disk_and_another_error_is_not():
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert "the disk is full: a\N{REPLACEMENT CHARACTER}b" in as_sentence(OSError(number, "whatever", "a\x07b"))
    assert as_sentence(OSError(errno.EIO, "Input/output error", "a")) == "Input/output error: a"
