"""`hdb preoptimize`, in this process and in two."""

import json
import re

import pytest

import testbed
from hypernet.base_models.loading import load_base
from lidb_peft import LiDBSpace
from testbed import miniature_lidb_config, miniature_path

QUICK = ("--base", "testbed", "--no-crop", "--steps", 1, "--timesteps", 1)


@pytest.fixture
def faces(draw_faces):
    return draw_faces("0.png", "1.png", "2.png")


def shards(folder):
    return {file.name: file.read_bytes() for file in folder.glob("shard-*")}


def test_preoptimize_fits_everybody_and_goes_on_where_it_was_stopped(hdb, faces):
    (hdb.folder / faces / "3.png").write_bytes(b"no picture")
    output = hdb.run("preoptimize", faces, *QUICK, "--out", "targets", "--batch", 2)
    assert "faces: 4 people, 2 at a time" in output
    assert "fitted 3 people" in output
    assert "an hour" in output
    assert "skipped 1 photos or people so far, listed in targets/skipped.jsonl" in output
    assert "targets now holds the targets of 3 people" in output
    first = shards(hdb.folder / "targets")
    (hdb.folder / "targets" / "shard-00001.safetensors").unlink()
    output = hdb.run("preoptimize", faces, *QUICK, "--out", "targets")
    assert "2 at a time" in output
    assert "fitted 1 people" in output
    assert "found 1 shards of an earlier run" in output
    assert shards(hdb.folder / "targets") == first


def test_preoptimize_tells_what_is_wrong_in_a_sentence(hdb, faces):
    preoptimize = ("preoptimize", faces, *QUICK, "--lr", 0.01, "--out")
    hdb.run(*preoptimize, "targets", "--batch", "auto")
    assert "targets holds targets of another fit, with lr 0.01 (here 0.5)" in hdb.fail(
        *preoptimize, "targets", "--lr", 0.5
    )
    assert "with seed 0 (here 1)" in hdb.fail(*preoptimize, "targets", "--seed", 1)
    (hdb.folder / "empty").mkdir()
    assert "empty holds no images" in hdb.fail("preoptimize", "empty", *QUICK, "--out", "other")
    assert "empty is not a hypernetwork" in hdb.fail(*preoptimize, "other", "--init-from", "empty")
    assert "'many' is not a valid" in hdb.fail(*preoptimize, "other", "--batch", "many", code=2)
    shard = hdb.folder / "targets" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "shard-00000.safetensors is damaged" in hdb.run(*preoptimize, "targets", code=1)


def test_preoptimize_starts_at_a_prediction(hdb, faces, make_hypernetwork, monkeypatch):
    base = load_base(str(miniature_path()), device="cpu")
    make_hypernetwork(LiDBSpace(base.adapted, miniature_lidb_config())).save_pretrained(hdb.folder / "net")
    monkeypatch.setattr(testbed, "miniature_hypernetwork_path", lambda: hdb.folder / "net")
    for name, out in (("net", "targets"), ("testbed", "again")):
        hdb.run("preoptimize", faces, *QUICK, "--init-from", name, "--out", out)
        assert json.loads((hdb.folder / out / "manifest.json").read_text())["fit"]["start"].startswith("net ")
    assert shards(hdb.folder / "again") == shards(hdb.folder / "targets")


def test_two_processes_make_the_shards_of_one(hdb, faces, start_pair):
    pair = start_pair("-m", "lidb_peft", "preoptimize", faces, *QUICK, "--out", "shared", "--batch", 1)
    hdb.run("preoptimize", faces, *QUICK, "--out", "alone", "--batch", 1)
    told = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    fitted = [int(re.search(rf"process {rank + 1} of 2: fitted (\d) people", told[rank][0])[1]) for rank in range(2)]
    assert sum(fitted) == 3
    assert shards(hdb.folder / "shared") == shards(hdb.folder / "alone")
    assert json.loads((hdb.folder / "shared" / "manifest.json").read_text())["batch"] == 1


DIES = """
import os, sys, time
from pathlib import Path
from hypernet.fitting.targets import TargetStore
write, died = TargetStore.write, Path("died")

def die(*arguments):
    died.touch()
    os._exit(9)

def write_after_that(*arguments):
    while not died.exists():
        time.sleep(0.05)
    write(*arguments)

TargetStore.write = die if os.environ["RANK"] == "1" else write_after_that
from cli.main import main
main(sys.argv[1:])
"""


def test_a_process_whose_fellow_dies_makes_what_that_had_claimed(hdb, faces, start_pair):
    pair = start_pair("-c", DIES, "preoptimize", faces, *QUICK, "--out", "shared", "--batch", 1)
    hdb.run("preoptimize", faces, *QUICK, "--out", "alone", "--batch", 1)
    told = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 9], told
    assert "process 1 of 2: fitted 3 people" in told[0][0]
    assert shards(hdb.folder / "shared") == shards(hdb.folder / "alone")
