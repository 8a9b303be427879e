"""A prepared data set: the same people and pixels as the source's, resumption, parts, and what is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from hypernet.inputs import prepared
from hypernet.inputs.people import open_people, prepare_person
from hypernet.inputs.prepared import prepare
from testbed.protocol import photo

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def folder(tmp_path):
    """Five people, one with two photos, one whose photo is damaged."""
    images = tmp_path / "images"
    (images / "two").mkdir(parents=True)
    for number in range(2):
        Image.fromarray(photo(900_000, number)).resize((60, 50)).save(images / "two" / f"{number}.png")
    for person in range(3):
        Image.fromarray(photo(900_001 + person, 0)).resize((48, 64)).save(images / f"{person}.jpg")
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    return images


def test_people_names_pixels_and_what_is_left_out_are_the_sources(folder, tmp_path):
    made = prepare(folder, tmp_path / "out", size_px=32, crop=False)
    raw, again = open_people(folder), open_people(tmp_path / "out")
    assert again.is_prepared
    assert again.roster == raw.roster
    assert again.fingerprint == raw.fingerprint
    for ours, theirs in zip(again, raw, strict=True):
        found, expected = (prepare_person(each, 32, crop) for each, crop in ((ours, True), (theirs, False)))
        assert found[1] == expected[1]
        if expected[0] is None:
            assert found[0] is None
        else:
            assert torch.equal(found[0].pixels, expected[0].pixels)
            assert found[0].key == expected[0].key
    assert (made.people, made.found, made.missing) == (5, 0, 0)
    assert list(made.left_out) == [str(next(name for name in made.left_out if name.endswith("broken.png")))]


def test_moments_are_the_vaes_rounded_to_float16_in_the_order_of_the_photos(folder, base, tmp_path):
    prepare(folder, tmp_path / "out", 32, crop=False, base=base)
    (folder / "two" / "0.png").write_bytes(b"no picture")
    prepare(folder, tmp_path / "damaged", 32, crop=False, base=base)
    for name, photos in (("out", 2), ("damaged", 1)):
        people = open_people(tmp_path / name)
        found = {person.name: prepare_person(person, 32, True)[0] for person in people}
        assert len(found["two"].photos) == photos
        for person in filter(None, found.values()):
            expected = base.encode_photos(person.pixels).half().flatten(1)
            assert torch.equal(person.moments, expected)
        assert people.vae
        assert people.fingerprint != open_people(folder).fingerprint


def test_a_run_that_was_stopped_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "SHARD", 2)
    write, written = prepared._write, []

    def stop_at_the_second(path, records):
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, records)

    monkeypatch.setattr(prepared, "_write", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "out", 32, crop=False)
    monkeypatch.setattr(prepared, "_write", write)
    made = prepare(folder, tmp_path / "out", 32, crop=False)
    assert (made.people, made.found) == (3, 1)
    assert open_people(tmp_path / "out").roster == open_people(folder).roster


def test_parts_make_the_whole(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "SHARD", 2)
    first = prepare(folder, tmp_path / "out", 32, part=(0, 2), crop=False)
    assert (first.people, first.missing) == (3, 1)
    second = prepare(folder, tmp_path / "out", 32, part=(1, 2), crop=False)
    assert (second.people, second.missing) == (2, 0)
    assert open_people(tmp_path / "out").roster == open_people(folder).roster


PREPARE = """
import os, sys, time
from pathlib import Path
from hypernet.inputs import prepared
folder, dies = Path(sys.argv[1]), sys.argv[2] == "dies"
prepared.SHARD, write = 1, prepared._write

def write_slowly(path, records):
    while not dies and not (folder / "died").exists():
        time.sleep(0.05)
    if dies:
        (folder / "died").touch()
        os._exit(9)
    write(path, records)

prepared._write = write_slowly
made = prepared.prepare(folder / "images", folder / "out", 32, crop=False)
print(made.people, made.found, made.missing)
"""


def test_processes_share_the_shards_and_make_those_of_a_dead_one(folder, tmp_path, monkeypatch):
    """One dies at its first shard; the other writes none before that."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, tmp_path, fate], stdout=subprocess.PIPE, text=True, env=environment
        )
        for fate in ("lives", "dies")
    ]
    told = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 9]
    assert told[0].split() == ["5", "0", "0"]
    monkeypatch.setattr(prepared, "SHARD", 1)
    assert prepare(folder, tmp_path / "alone", 32, crop=False).people == 5
    for shard in sorted((tmp_path / "alone").glob("*.parquet")):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()
    assert not list((tmp_path / "out").glob(".*.claim"))


def test_other_images_settings_and_sizes_are_refused(folder, tmp_path):
    out = tmp_path / "out"
    prepare(folder, out, 32, crop=False)
    with pytest.raises(ValueError, match="was prepared with size_px 32 and not 64"):
        prepare(folder, out, 64, crop=False)
    (folder / "0.jpg").unlink()
    with pytest.raises(ValueError, match="was prepared with other images"):
        prepare(folder, out, 32, crop=False)
    with pytest.raises(ValueError, match="is prepared; pass the images"):
        prepare(out, tmp_path / "again", 32)
    with pytest.raises(ValueError, match="part is 2 of 2"):
        prepare(folder, tmp_path / "again", 32, part=(2, 2))
    with pytest.raises(
        ValueError, match="prepared at 32 pixels, and the base draws 64; prepare it again with --resolution 64"
    ):
        prepare_person(next(iter(open_people(out))), 64, True)
    (out / "prepared.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        prepare(folder, out, 32, crop=False)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_shard_that_is_gone_is_named_and_made_again(folder, tmp_path, monkeypatch, number):
    monkeypatch.setattr(prepared, "SHARD", 2)
    out = tmp_path / "out"
    prepare(folder, out, 32, crop=False)
    shard = out / f"people-0000{number}.parquet"
    shard.unlink()
    with pytest.raises(ValueError, match=rf"out lacks 1 of its 3 shards, {shard.name} for one; run hdb prepare again"):
        open_people(out)
    assert prepare(folder, out, 32, crop=False).found == 2
    assert open_people(out).roster == open_people(folder).roster


def test_a_shard_that_is_damaged_is_named(folder, tmp_path):
    prepare(folder, tmp_path / "out", 32, crop=False)
    (tmp_path / "out" / "people-00000.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="out is damaged or no data set"):
        list(open_people(tmp_path / "out"))


def test_the_manifest_says_how(folder, tmp_path):
    prepare(folder, tmp_path / "out", 32, crop=False)
    found = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert (found["size_px"], found["crop"], found["source"]) == (32, False, open_people(folder).fingerprint)
