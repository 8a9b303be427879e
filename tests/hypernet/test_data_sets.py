"""From a folder of people: each photo is opened once, however often the folder is trained on."""

import json

import pytest

import hypernet.inputs.people as people_module
from hypernet.data_sets import preoptimize, train
from lidb_peft.sealed import read_tree

pytestmark = pytest.mark.usefixtures("datasets_cache")

CONFIG = {"steps": 4, "batch_size": 2, "checkpoint_every": 4, "log_every": 1, "num_workers": 0, "crop": False,
          "validation": 0.0, "same_photo": True}  # fmt: skip


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """The names of photo files that are opened, with a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    names, original = [], people_module.read_image

    def read(path):
        names.append(path.rpartition("/")[2])
        return original(path)

    monkeypatch.setattr(people_module, "read_image", read)
    return names


@pytest.fixture
def run(base, space, face_folder, make_hypernetwork, tmp_path):
    """A function: (name, options) -> the log and the state of a training on the folder of faces."""
    make_hypernetwork(space).save_pretrained(tmp_path / "start")

    def train_into(name, **options):
        train(face_folder, tmp_path / name, base, hypernet=tmp_path / "start", **{**CONFIG, **options})
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines], read_tree(tmp_path / name / "training.safetensors")

    return train_into


def test_a_folder_is_opened_once_and_its_losses_are_the_same_to_the_bit(run, opened):
    faces = [f"{index}.png" for index in range(5)]
    expected, state = run("without", cache=False)
    assert len(opened) == 8
    opened.clear()
    assert run("first")[0] == expected
    assert sorted(opened) == faces
    again, theirs = run("second")
    assert again == expected
    assert sorted(opened) == faces
    assert theirs["data"] == state["data"]  # either goes on with the other's state
    assert all((theirs["network"][name] == value).all() for name, value in state["network"].items())


def test_a_training_too_short_to_see_everybody_prepares_nobody(run, opened):
    run("short", steps=2)
    assert len(opened) == 4


def test_targets_are_fitted_on_what_a_training_has_prepared(run, opened, base, face_folder, tmp_path):
    options = {"steps": 1, "crop": False, "preservation": 0.0, "batch_size": 5}
    options["theta_steps"] = options.pop("steps")
    preoptimize(face_folder, tmp_path / "raw", base, **options)
    run("out")
    opened.clear()
    preoptimize(face_folder, tmp_path / "prepared", base, **options)
    assert not opened
    raw, prepared = (tmp_path / name / "shard-00000.safetensors" for name in ("raw", "prepared"))
    assert raw.read_bytes() == prepared.read_bytes()
