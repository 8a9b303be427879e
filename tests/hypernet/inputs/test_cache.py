"""Data sets in the cache: prepared once, by whoever asks, and again when photos or settings change."""

import os
import time

import pytest
import torch
from PIL import Image

from hypernet.inputs import cache, prepared
from hypernet.inputs.people import open_people, prepare_person
from hypernet.recipe import PersonalizeConfig
from testbed.protocol import photo

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three people's photos, and a cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    images = tmp_path / "images"
    images.mkdir()
    for person in range(3):
        Image.fromarray(photo(900_001 + person, 0)).resize((48, 64)).save(images / f"{person}.png")
    return images


@pytest.fixture
def looked(monkeypatch):
    """The names of people whose photos were decoded to prepare them."""
    names, original = [], prepared.prepare_person

    def prepare(person, *arguments, **options):
        names.append(person.name)
        return original(person, *arguments, **options)

    monkeypatch.setattr(prepared, "prepare_person", prepare)
    return names


def ask(folder, size_px=32, crop=False, face="largest", **options):
    config = PersonalizeConfig(crop=crop, face_detector="cascade", face=face)
    return cache.prepared(open_people(folder), size_px, config, **options)


def test_everybody_is_prepared_once_and_is_the_same_bit_for_bit(folder, looked):
    assert not ask(folder, make=False).is_prepared
    first, again = ask(folder), ask(folder, make=False)
    assert looked == ["0.png", "1.png", "2.png"]
    for found in (first, again):
        assert found.is_prepared
        assert (found.source, found.fingerprint) == (str(folder), open_people(folder).fingerprint)
        for ours, theirs in zip(found, open_people(folder), strict=True):
            pair = [prepare_person(person, 32, crop=False)[0] for person in (ours, theirs)]
            assert torch.equal(pair[0].pixels, pair[1].pixels)
    assert ask(folder / "0.png").count() == 1  # another data set


def test_changed_photos_and_settings_are_prepared_anew(folder, looked, monkeypatch):
    ask(folder)
    ask(folder, size_px=16)
    ask(folder, crop=True)
    assert len(looked) == 9
    ask(folder, crop=True, face="leftmost")
    monkeypatch.setattr("lidb_peft.__version__", "another")  # which may crop otherwise
    ask(folder)
    assert len(looked) == 15
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes())
    ask(folder)
    assert len(looked) == 18
    monkeypatch.setattr("hypernet.inputs.people._WHOLE_BYTES", 1000)  # of larger files a digest sees parts
    ask(folder)
    ask(folder)
    assert len(looked) == 21
    os.utime(folder / "1.png", (1, 1))
    ask(folder)
    assert len(looked) == 24


def test_a_preparation_that_was_stopped_goes_on(folder, looked, monkeypatch):
    monkeypatch.setattr(prepared, "SHARD", 2)
    write = prepared._write

    def stop_at_the_second(path, records):
        if "00001" in path.name:
            raise KeyboardInterrupt
        write(path, records)

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "_write", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            ask(folder)
    assert not ask(folder, make=False).is_prepared
    assert ask(folder).is_prepared
    assert looked == ["0.png", "1.png", "2.png", "2.png"]


def test_the_cache_holds_no_more_than_its_limit_and_what_was_used_longest_ago_goes(folder, caplog, monkeypatch):
    def entries():
        return {entry.name for entry in cache._root().iterdir()}

    ask(folder)
    (old,) = entries()
    held = sum(file.stat().st_size for file in (cache._root() / old).rglob("*") if file.is_file())
    needed = 3 * 16**2 * 3
    monkeypatch.setattr(cache, "CACHE_BYTES", held + needed - 1)
    assert not ask(folder, size_px=16).is_prepared  # the other was used just now
    assert "has no room" in caplog.text
    os.utime(cache._root() / old, (time.time() - 2 * 24 * 3600,) * 2)
    assert ask(folder, size_px=16).is_prepared
    assert old not in entries()
    assert len(entries()) == 1
    monkeypatch.setattr(cache, "CACHE_BYTES", 3 * 64**2 * 3 - 1)
    assert not ask(folder, size_px=64).is_prepared


def test_where_the_cache_cannot_be_written_the_photos_are_read_as_before(folder, monkeypatch):
    (folder.parent / "assets").write_text("no folder")
    with pytest.warns(UserWarning, match=r"is not prepared in the cache.*assets"):
        assert not ask(folder).is_prepared


def test_a_cache_that_can_only_be_read_is_read(folder, looked, monkeypatch):
    made = ask(folder)

    def refuse(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    (entry,) = cache._root().iterdir()
    (entry / ".arrow").rename(entry.parent / "taken-away")
    monkeypatch.setattr(cache.os, "utime", refuse)
    found = ask(folder)
    assert found.is_prepared
    assert found.roster == made.roster
    assert not (entry / ".arrow").exists()
    assert len(looked) == 3


def test_a_data_set_that_makes_room_goes_at_once_even_if_removing_it_is_interrupted(folder, looked, monkeypatch):
    ask(folder)
    (old,) = cache._root().iterdir()
    held = sum(file.stat().st_size for file in old.rglob("*") if file.is_file())
    monkeypatch.setattr(cache, "CACHE_BYTES", held + 3 * 16**2 * 3 - 1)
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)

    def die(path, **options):
        (path / "prepared.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            ask(folder, size_px=16)
    assert not old.exists()
    monkeypatch.setattr(cache, "CACHE_BYTES", 10**9)
    assert ask(folder).is_prepared
    assert len(looked) == 6
