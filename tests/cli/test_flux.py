"""FLUX.1 through `hdb`, on a narrow model of random weights."""

import pytest
from PIL import Image

from converters import describe

pytestmark = pytest.mark.usefixtures("hdb")


def test_photos_become_loras_and_pictures(hdb, portrait, flux_folder):
    base = ("--base", flux_folder)
    hdb.run("personalize", portrait, *base, "--no-crop", "--steps", 1, "--rank", 2, "--out", "me.safetensors",
            "--no-preview", "--guidance-scale", 3.5)  # fmt: skip
    assert describe(hdb.folder / "me.safetensors").base == "Flux"
    hdb.run("convert", "me.safetensors", "diffusers.safetensors", "--to", "diffusers")  # which reads narrow ones too
    hdb.run("generate", "a sks face", *base, "--lora", "diffusers.safetensors", "--num-steps", 1, "--out", "me.png")
    assert Image.open(hdb.folder / "me.png").size == (32, 32)
    message = hdb.fail("generate", "a face", "--base", "testbed", "--lora", "me.safetensors")
    assert "is made for Flux and" in message


def test_people_become_targets_and_a_hypernetwork(hdb, flux_folder, draw_faces, trainable):
    faces = (draw_faces("0.png", "1.png"), "--base", flux_folder, "--no-crop", "--steps", 1)
    hdb.run("preoptimize", *faces, "--out", "targets", "--batch", 2)
    hdb.run("train", *faces, "--targets", "targets", "--encoder", trainable, "--hidden-size", 32, "--rounds", 1,
            "--validation", 0, "--workers", 0, "--batch", 1, "--out", "net")  # fmt: skip
    hdb.run("personalize", "faces/0.png", "--base", flux_folder, "--no-crop", "--no-preview", "--hypernet", "net/last",
            "--steps", 0, "--out", "0.safetensors")  # fmt: skip
    assert (hdb.folder / "0.safetensors").exists()


def test_what_only_flux_has_is_refused_elsewhere(hdb, portrait):
    personalize = ("personalize", portrait, "--base", "testbed", "--no-crop", "--no-preview")
    assert "--guidance-scale is for FLUX.1" in hdb.fail(*personalize, "--guidance-scale", 3.5)
    assert "--train-text-encoder is for FLUX.1" in hdb.fail(*personalize, "--train-text-encoder")
    assert "--quantize is for FLUX.1" in hdb.fail(*personalize, "--quantize", "nf4")
