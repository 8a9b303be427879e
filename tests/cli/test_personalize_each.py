"""`hdb personalize --each`."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from cli.personalize import Stop


@pytest.fixture
def faces(draw_faces):
    return draw_faces("ann.png", "bob.png")


def test_everybody_in_a_folder_gets_the_lora_of_their_photo(hdb, personalize, faces):
    (hdb.folder / faces / "carl.png").write_bytes(b"no picture")
    output = hdb.run(*personalize("--each", faces, "--batch", 2))
    assert "skipped carl.png: faces/carl.png is not an image" in output
    assert "made 2 LoRAs in faces-loras" in output
    for stage in ("import", "load base", "prepare photos", "fit theta", "finetune LoRA", "export"):
        assert f" {stage} " in output
    assert 'write "a sks face <lora:NAME:1>"' in output
    assert 'all of them use the trigger "a sks face"' in output
    hdb.run(*personalize("faces/bob.png"))
    alone = load_file("bob.safetensors")
    found = load_file("faces-loras/bob.safetensors")
    assert alone.keys() == found.keys()
    error, size = (
        sum(tensor.float().square().sum() for tensor in tensors)
        for tensors in ([found[name] - alone[name] for name in alone], alone.values())
    )
    assert error < 1e-4 * size


def test_who_has_a_lora_keeps_it(hdb, personalize, faces):
    Path("loras").mkdir()
    Path("loras/ann.safetensors").write_text("the one from yesterday")
    output = hdb.run(*personalize("--each", faces, "--out", "loras"))
    assert "made 1 LoRAs in loras" in output
    assert "kept 1 LoRAs already in loras; delete a LoRA to redo it" in output
    assert Path("loras/ann.safetensors").read_text() == "the one from yesterday"
    output = hdb.run(*personalize("--each", faces, "--out", "loras"))
    assert "kept 2 LoRAs" in output
    assert "made" not in output


def test_a_stop_within_a_person_is_told_and_the_same_command_goes_on(hdb, personalize, faces, monkeypatch):
    monkeypatch.setattr(Stop, "__call__", lambda self: True)
    command = [*personalize("--each", faces, "--out", "loras"), "--steps", 4, "--save-every", 2]
    output = hdb.run(*command, code=130)
    assert "stopped after step 1 of finetune LoRA of a batch; run the same command to continue there" in output
    assert [name for name in hdb.files() if name.startswith("loras/")] == ["loras/ann.hdb-state"]
    monkeypatch.undo()
    monkeypatch.chdir(hdb.folder)
    assert "made 2 LoRAs in loras" in hdb.run(*command)
    assert sorted(file.name for file in Path("loras").glob("*.safetensors")) == [
        "ann-000002.safetensors", "ann.safetensors", "bob-000002.safetensors", "bob.safetensors",
    ]  # fmt: skip
    assert not Path("loras/ann.hdb-state").exists()


def test_nobody_is_an_error_after_all_reasons(hdb, personalize):
    Path("faces").mkdir()
    for name in ("a.png", "b.png"):
        Path("faces", name).write_bytes(b"no picture")
    output = hdb.run(*personalize("--each", "faces"), code=1)
    assert "skipped a.png: faces/a.png is not an image" in output
    assert output.splitlines()[-1] == "Error: no LoRA was made: all 2 people were skipped, see above"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--each", "faces", "me.jpg"), "PHOTOS and --each contradict each other"),
        (("--each", "faces", "--save-theta", "t.safetensors"), "--save-theta is for one person; drop it or --each"),
        (("--each", "faces", "--from-theta", "t.safetensors"), "--from-theta is for one person; drop it or --each"),
        (("me.jpg", "--batch", 2), "--batch-size is for many people; pass them with --each"),
        ((), "pass at least one photo, or --each with a folder of people"),
    ],
)
def test_what_does_not_go_with_a_folder_is_a_usage_error(hdb, faces, arguments, text):
    assert text in hdb.fail("personalize", *arguments, code=2)


def test_what_is_wrong_is_told_before_the_base_is_loaded(hdb, faces):
    each = ("personalize", "--no-crop", "--base", "no/such-base", "--each")
    assert "faces/loras lies inside faces, which is read" in hdb.fail(*each, faces, "--out", "faces/loras")
    Path("empty").mkdir()
    assert "empty holds no images" in hdb.fail(*each, "empty")
