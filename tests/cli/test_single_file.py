"""`hdb` on a base in one file, on a machine that has never seen a hub."""

import pytest

from converters import describe


@pytest.fixture
def checkpoint(hdb, narrow_checkpoint, monkeypatch):
    def ask(*args, **options):
        raise AssertionError("the hub is asked")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", ask)
    return narrow_checkpoint


def test_a_single_file_makes_a_lora_and_a_picture_without_a_hub(hdb, portrait, checkpoint):
    arguments = ("personalize", portrait, "--base", checkpoint, "--no-crop", "--no-preview", "--steps", 1)
    output = hdb.run(*arguments, "--out", "me.safetensors")
    assert "predicts epsilon: its metadata say so" in output
    assert describe(hdb.folder / "me.safetensors").base == "SD1"
    hdb.run("generate", "a sks face", "--base", checkpoint, "--lora", "me.safetensors", "--steps", 1)
    output = hdb.run(*arguments, "--out", "v.safetensors", "--prediction", "v")
    assert "predicts v: as asked for" in output


@pytest.mark.parametrize(
    "command", ["personalize", "train", "preoptimize", "learn-start", "generate", "project", "convert"]
)
def test_every_command_that_takes_a_base_takes_what_it_predicts(command):
    import click

    from cli.main import main

    found = main.get_command(click.Context(main), command)
    (option,) = (option for option in found.params if "--prediction" in option.opts)
    assert (option.type.choices, option.default) == (("auto", "epsilon", "v"), "auto")
    assert any("--base" in option.opts for option in found.params)
