"""`hdb` on an SDXL base: the commands that load one."""

from PIL import Image

from converters import describe


def test_photos_become_loras_and_pictures(hdb, portrait, sdxl_folder):
    base = ("--base", sdxl_folder)
    hdb.run("personalize", portrait, *base, "--no-crop", "--no-preview", "--steps", 1, "--out", "me.safetensors")
    found = describe(hdb.folder / "me.safetensors")
    assert (found.base, found.warnings) == ("SDXL", ())
    hdb.run("generate", "a sks face", *base, "--lora", "me.safetensors", "--num-steps", 1, "--out", "me.png")
    assert Image.open(hdb.folder / "me.png").size == (32, 32)
    assert "is made for SDXL and" in hdb.fail("generate", "a face", "--base", "testbed", "--lora", "me.safetensors")


def test_people_become_targets_and_a_hypernetwork(hdb, sdxl_folder, draw_faces, trainable):
    faces = (draw_faces("0.png", "1.png"), "--base", sdxl_folder, "--no-crop", "--steps", 1)
    assert "fitted 2 people" in hdb.run("preoptimize", *faces, "--out", "targets")
    hdb.run("train", *faces, "--targets", "targets", "--weights", 1, "--validation", 0, "--workers", 0, "--batch", 2,
            "--encoder", trainable, "--hidden-size", 32, "--rounds", 1, "--out", "net")  # fmt: skip
    hdb.run("personalize", "faces/0.png", "--base", sdxl_folder, "--no-crop", "--no-preview", "--hypernet", "net/last",
            "--steps", 0, "--out", "me.safetensors")  # fmt: skip
    assert describe(hdb.folder / "me.safetensors").base == "SDXL"
