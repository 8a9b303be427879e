"""Target stores at URLs: as a folder's to the bit, whole or not there, and what cannot work said in a sentence."""

import threading
import uuid

import fsspec
import pytest
import torch

from hypernet.claims import Shares
from hypernet.fitting.mirror import Mirror
from hypernet.fitting.preoptimize import open_targets, preoptimize
from hypernet.fitting.targets import _FILES, TargetStore
from hypernet.inputs.people import open_people
from hypernet.recipe import PersonalizeConfig, PreoptimizeConfig
from lidb_peft.outputs import check_output, check_output_folder

pytestmark = pytest.mark.usefixtures("datasets_cache", "machine")

CONFIG = PreoptimizeConfig(PersonalizeConfig(theta_steps=1, crop=False, preservation=0.0), batch_size=2)
SHARDS = [f"shard-0000{index}.safetensors" for index in range(3)]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes this another machine, which has no copy of anything."""

    def change():
        monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / uuid.uuid4().hex))

    change()
    return change


@pytest.fixture
def url():
    return f"memory://{uuid.uuid4().hex}/targets"


@pytest.fixture
def run(base, space, face_folder):
    def preoptimize_into(place, sharing=None):
        people = open_people(face_folder)
        store = open_targets(place, base, space, people, CONFIG)
        return store, preoptimize(people, base, space, store, CONFIG, sharing=sharing or Shares(0, 1))

    return preoptimize_into


def there(url):
    fs, path = fsspec.core.url_to_fs(url)
    return {name.rpartition("/")[2]: fs.cat_file(name) for name in fs.ls(path, detail=False)}


def test_a_store_at_a_url_is_a_folders_to_the_bit_and_is_read_and_gone_on_with_elsewhere(
    run, url, space, tmp_path, machine
):
    run(tmp_path / "targets")
    run(url, Shares(0, 2))
    assert {name for name in there(url) if name.startswith("shard")} == {SHARDS[0], SHARDS[2]}
    machine()
    _, result = run(url, Shares(1, 2))
    assert (result.found, result.fitted) == (2, 2)
    found = there(url)
    assert set(found) == {*SHARDS, "manifest.json", "skipped.jsonl"}
    assert all(found[name] == (tmp_path / "targets" / name).read_bytes() for name in SHARDS)
    machine()
    stores = [TargetStore(place, space) for place in (url, tmp_path / "targets")]
    keys = sorted(stores[1].places)
    assert torch.equal(*(store.thetas(keys) for store in stores))
    assert len(keys) == 5


@pytest.mark.parametrize("step", ["put_file", "mv"])
def test_a_shard_that_could_not_be_sent_is_not_there_and_is_made_again(run, url, monkeypatch, step):
    fs = fsspec.filesystem("memory")
    original = getattr(type(fs), step)

    def fail_at_a_shard(self, source, target, *arguments, **options):
        if SHARDS[1] in target:
            raise OSError("the connection broke")
        return original(self, source, target, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(fs), step, fail_at_a_shard)
        with pytest.raises(OSError, match="the connection broke"):
            run(url)
    assert set(there(url)) == {SHARDS[0], "manifest.json", "skipped.jsonl"}
    _, result = run(url)
    assert (result.found, result.fitted) == (1, 3)
    assert not [name for name in there(url) if name.startswith(".")]


def test_the_copy_follows_what_changes_at_the_url(url):
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{path}/manifest.json", b"one")
    fs.pipe_file(f"{path}/README.md", b"not of a store")
    mirror = Mirror(url, _FILES)
    for content in (b"one", b"two"):
        fs.pipe_file(f"{path}/manifest.json", content)
        mirror.fetch()
        assert (mirror.folder / "manifest.json").read_bytes() == content
    assert not (mirror.folder / "README.md").exists()
    fs.rm_file(f"{path}/manifest.json")
    mirror.fetch()
    assert not (mirror.folder / "manifest.json").exists()


def test_a_shard_that_is_being_sent_is_not_removed_from_the_copy_by_another_process(run, url, monkeypatch):
    """A process that starts, or is done, brings the copy up to date with a URL that has not got the shard yet."""
    fs, others = fsspec.filesystem("memory"), []
    original = type(fs).put_file

    def put_while_another_starts(self, source, target, *arguments, **options):
        others.append(threading.Thread(target=lambda: Mirror(url, _FILES).fetch()))
        others[-1].start()
        others[-1].join(timeout=0.2)
        return original(self, source, target, *arguments, **options)

    monkeypatch.setattr(type(fs), "put_file", put_while_another_starts)
    store, result = run(url)
    for other in others:
        other.join()
    assert len(others) > len(SHARDS)
    assert result.fitted == 5
    assert {*SHARDS} <= set(there(url))
    assert store.shards() == [0, 1, 2]


def test_what_cannot_work_is_said_in_a_sentence(url, space, tmp_path):
    with pytest.raises(ValueError, match=r"nonsense://somewhere cannot be opened: .*nonsense"):
        TargetStore("nonsense://somewhere", space)
    with pytest.raises(ValueError, match=r"memory://.* is not a target store"):
        TargetStore(url, space)
    for check in (check_output, check_output_folder):
        with pytest.raises(ValueError, match=r"s3:/bucket.* is a URL, and only hdb preoptimize writes to one"):
            check("s3://bucket/out.safetensors")
