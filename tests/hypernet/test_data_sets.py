"""From a folder of people: each photo is opened once, however often it is trained on."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import hypernet.inputs.people as people_module
from hypernet.data_sets import preoptimize, train
from hypernet.inputs.prepared import prepare
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

    def train_into(name, people=face_folder, base=base, **options):
        train(people, tmp_path / name, base, hypernet=tmp_path / "start", **{**CONFIG, **options})
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


def test_stored_moments_are_trained_and_fitted_on_instead_of_encoding_photos(
    run, base, face_folder, tmp_path, monkeypatch
):
    def encode(*_, **options):
        raise AssertionError("encoded")

    prepare(face_folder, tmp_path / "stored", 32, crop=False, base=base)
    expected, _ = run("raw", cache=False, lr=1e-12)  # no step makes a difference larger
    fit = {"theta_steps": 1, "crop": False, "preservation": 0.0, "batch_size": 5}
    preoptimize(face_folder, tmp_path / "of-raw", base, **fit)
    monkeypatch.setattr(type(base), "encode_photos", encode)
    found, _ = run("out", people=tmp_path / "stored", lr=1e-12)
    losses = [[line["loss"] for line in lines] for lines in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert losses[0] != losses[1]
    preoptimize(tmp_path / "stored", tmp_path / "of-stored", base, **fit)
    losses = [load_file(tmp_path / name / "shard-00000.safetensors")["losses"] for name in ("of-raw", "of-stored")]
    assert torch.allclose(*losses, rtol=5e-3)
    with pytest.raises(AssertionError, match="encoded"):  # what is mirrored is encoded anew
        run("flipped", people=tmp_path / "stored", flip=True)
    with pytest.raises(ValueError, match=r"another fit, with moments 'float32' \(here 'float16'\)"):
        preoptimize(tmp_path / "stored", tmp_path / "of-raw", base, **fit)


def test_the_moments_of_another_vae_are_refused(run, base, face_folder, tmp_path):
    prepare(face_folder, tmp_path / "stored", 32, crop=False, base=base)
    other = copy.copy(base)
    other.vae = copy.deepcopy(base.vae)
    vars(other).pop("vae_fingerprint", None)
    with torch.no_grad():
        for parameter in other.vae.encoder.parameters():
            parameter.mul_(1.1)
    told = "stored was prepared with the moments of another VAE than that of .*; prepare it again with --base"
    with pytest.raises(ValueError, match=told):
        run("out", people=tmp_path / "stored", base=other)
    with pytest.raises(ValueError, match=told):
        preoptimize(tmp_path / "stored", tmp_path / "targets", other, theta_steps=1, crop=False)
    with pytest.raises(ValueError, match="was prepared with moments of another VAE, or of none"):
        prepare(face_folder, tmp_path / "stored", 32, crop=False)
    with pytest.raises(ValueError, match=r"size_px is 64, and .* encodes 32 pixels; pass --resolution 32"):
        prepare(face_folder, tmp_path / "larger", 64, crop=False, base=base)
