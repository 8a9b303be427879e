"""The sidecar and the preview that A1111 looks for beside a LoRA."""

import json

import pytest
import torch
from PIL import Image

from converters.batch import convert_batch
from converters.formats.kohya import write_lora
from converters.inspection.describe import describe
from converters.metadata import KohyaMetadata

FACTORS = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (torch.ones(2, 4), torch.ones(4, 2))}


def test_sidecar_and_preview_stand_beside_the_lora(tmp_path):
    metadata = KohyaMetadata(trigger="a sks face", description="Anna, 1 photo", family="sd2")
    written = write_lora(tmp_path / "anna.safetensors", FACTORS, metadata, preview=Image.new("RGBA", (8, 6), "red"))
    assert [path.name for path in written] == ["anna.safetensors", "anna.json", "anna.png"]
    assert json.loads((tmp_path / "anna.json").read_text(encoding="utf-8")) == {
        "activation text": "a sks face",
        "description": "Anna, 1 photo",
        "notes": "",
        "preferred weight": 1.0,
        "sd version": "SD2",
    }
    with Image.open(tmp_path / "anna.png") as picture:
        assert (picture.format, picture.size, picture.getpixel((0, 0))) == ("PNG", (8, 6), (255, 0, 0))
    assert len(list(tmp_path.iterdir())) == 3


def test_writing_again_keeps_the_users_notes_and_replaces_our_preview(tmp_path):
    path = tmp_path / "anna.safetensors"
    write_lora(path, FACTORS, KohyaMetadata(), preview=Image.new("RGB", (8, 8), "red"))
    sidecar = json.loads((tmp_path / "anna.json").read_text())
    (tmp_path / "anna.json").write_text(json.dumps(sidecar | {"notes": "mine", "negative text": "blurry"}))
    write_lora(path, FACTORS, KohyaMetadata(trigger="new"), preview=Image.new("RGB", (8, 8), "blue"))
    sidecar = json.loads((tmp_path / "anna.json").read_text())
    assert (sidecar["notes"], sidecar["negative text"], sidecar["activation text"]) == ("mine", "blurry", "new")
    with Image.open(tmp_path / "anna.png") as picture:
        assert picture.getpixel((0, 0)) == (0, 0, 255)


def test_a_photo_or_json_of_the_same_name_is_never_overwritten(tmp_path):
    Image.new("RGB", (5, 5), "green").save(tmp_path / "anna.png")
    (tmp_path / "anna.json").write_text('{"camera": "mine"}')
    before = [(tmp_path / name).read_bytes() for name in ("anna.png", "anna.json")]
    with pytest.warns(UserWarning, match=r"anna\.json is not an A1111 sidecar"):
        written = write_lora(tmp_path / "anna.safetensors", FACTORS, KohyaMetadata(), preview=Image.new("RGB", (8, 8)))
    assert [path.name for path in written] == ["anna.safetensors", "anna.preview.png"]
    assert [(tmp_path / name).read_bytes() for name in ("anna.png", "anna.json")] == before
    (tmp_path / "anna.preview.png").write_bytes(b"no picture")
    (tmp_path / "anna.json").unlink()
    with pytest.warns(UserWarning, match="preview was not written"):
        written = write_lora(tmp_path / "anna.safetensors", FACTORS, KohyaMetadata(), preview=Image.new("RGB", (8, 8)))
    assert [path.name for path in written] == ["anna.safetensors", "anna.json"]


def edited(path, **entries):
    """Write a LoRA, edit its sidecar, write the LoRA anew; return a function that reads the sidecar."""
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | entries))
    return lambda: json.loads(sidecar.read_text(encoding="utf-8"))


def test_what_a_user_has_changed_stays(tmp_path):
    path = tmp_path / "anna.safetensors"
    about = KohyaMetadata(trigger="a sks face", description="Anna")
    write_lora(path, FACTORS, about)
    mine = {"activation text": "sks woman", "preferred weight": 0.7, "sd version": "Other", "description": "my Anna"}
    read = edited(path, **mine)
    write_lora(path, FACTORS, about)
    assert {key: read()[key] for key in mine} == mine
    write_lora(path, FACTORS, KohyaMetadata(trigger="a ohwx face", description="Anna"))
    assert read()["activation text"] == "a ohwx face"  # the old words call nobody up now
    path.unlink()
    read = edited(path, **{"activation text": "a ohwx face, smiling"})
    write_lora(path, FACTORS, KohyaMetadata(trigger="a ohwx face", description="Anna"))
    assert (read()["activation text"], read()["preferred weight"]) == ("a ohwx face, smiling", 0.7)


def test_companions_are_there_before_the_lora_that_says_done_and_go_if_it_does_not_come(tmp_path, monkeypatch):
    (tmp_path / "bob.json").write_text('{"activation text": "", "notes": "his"}')
    seen = []

    def fail(*_):
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("converters.formats.kohya.write_tensors", fail)
    for name in ("anna", "bob"):
        with pytest.raises(OSError, match="No space"):
            write_lora(tmp_path / f"{name}.safetensors", FACTORS, KohyaMetadata(), preview=Image.new("RGB", (8, 8)))
    assert seen == [["anna.json", "anna.png", "bob.json"], ["bob.json", "bob.png"]]
    assert [path.name for path in tmp_path.iterdir()] == ["bob.json"]
    assert json.loads((tmp_path / "bob.json").read_text())["notes"] == "his"


def test_half_of_a_character_in_somebodys_sidecar_stays_json_and_utf8(tmp_path):
    source = tmp_path / "theirs.safetensors"
    write_lora(source, FACTORS, KohyaMetadata(trigger="a face"))
    entries = json.loads(source.with_suffix(".json").read_text()) | {"notes": "a\ud800b", "activation text": "x\udfff"}
    source.with_suffix(".json").write_text(json.dumps(entries))
    (outcome,) = convert_batch([(source, tmp_path / "ours.safetensors")], "kohya")
    assert outcome.error is None
    copied = json.loads((tmp_path / "ours.json").read_text(encoding="utf-8"))
    assert (copied["notes"], copied["activation text"]) == ("a\ud800b", "x\udfff")
    assert describe(tmp_path / "ours.safetensors")
