"""`hdb` on an SDXL base: the commands that load one."""

from PIL import Image
from transformers import AutoModel, ViTConfig

import hypernet.training.validation as validation
from converters import describe
from testbed.corpus import portrait as draw_portrait


def test_photos_become_loras_and_pictures(hdb, portrait, sdxl_folder):
    base = ("--base", sdxl_folder)
    hdb.run("personalize", portrait, *base, "--no-crop", "--no-preview", "--steps", 1, "--out", "me.safetensors")
    found = describe(hdb.folder / "me.safetensors")
    assert (found.base, found.warnings) == ("SDXL", ())
    hdb.run("generate", "a sks face", *base, "--lora", "me.safetensors", "--num-steps", 1, "--out", "me.png")
    assert Image.open(hdb.folder / "me.png").size == (32, 32)
    assert "is made for SDXL and" in hdb.fail("generate", "a face", "--base", "testbed", "--lora", "me.safetensors")


def test_people_become_targets_and_a_hypernetwork(hdb, sdxl_folder, monkeypatch):
    monkeypatch.setattr(validation, "PICTURE_STEPS", 1)
    (hdb.folder / "faces").mkdir()
    for index in range(2):
        Image.fromarray(draw_portrait(index, "validation")[0]).save(hdb.folder / "faces" / f"{index}.png")
    encoder = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    AutoModel.from_config(encoder).save_pretrained(hdb.folder / "vit")
    faces = ("faces", "--base", sdxl_folder, "--no-crop", "--steps", 1)
    assert "fitted 2 people" in hdb.run("preoptimize", *faces, "--out", "targets")
    hdb.run("train", *faces, "--targets", "targets", "--weights", 1, "--validation", 0, "--workers", 0, "--batch", 2,
            "--encoder", "vit", "--hidden-size", 32, "--rounds", 1, "--out", "net")  # fmt: skip
    hdb.run("personalize", "faces/0.png", "--base", sdxl_folder, "--no-crop", "--no-preview", "--hypernet", "net/last",
            "--steps", 0, "--out", "me.safetensors")  # fmt: skip
    assert describe(hdb.folder / "me.safetensors").base == "SDXL"
