import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hypernet.fitting.targets as targets_module
import lidb_peft.files
from hypernet.fitting.targets import Shard, TargetStore, create_targets, has_targets
from hypernet.inputs.people import Skipped
from lidb_peft import LiDBConfig, LiDBSpace
from lidb_peft.safe_read import read_tensors

FIT = {"steps": 3, "lr": 0.01, "preserved": ("{} at night",)}


@pytest.fixture
def store(space, tmp_path):
    create_targets(tmp_path / "targets", space, "miniature", FIT, 2, "faces")
    return TargetStore(tmp_path / "targets", space)


def add(store, index, *people, skipped=(), seed=0):
    """Write a shard of some people with random thetas and return these ``(n, L, row)``."""
    generator = torch.Generator().manual_seed(seed + index)
    thetas = torch.randn(len(people), 176, 30, generator=generator)
    keys = tuple(f"key of {name}" for name in people)
    rows = (*people, *(name for name, _ in skipped))
    store.write(index, Shard(rows, keys, people, tuple(skipped)), thetas, torch.rand(len(people), generator=generator))
    return thetas


# ---- what goes in comes out ----


def test_thetas_are_found_by_key(store, space):
    first, last = add(store, 0, "ann", "bob"), add(store, 11, "cy")
    again = TargetStore(store.folder, space)
    assert (len(again), again.batch, again.shards()) == (3, 2, [0, 11])
    assert torch.equal(again.thetas(["key of cy", "key of ann"]), torch.stack([last[0], first[0]]))
    assert "key of bob" in again
    assert "key of dora" not in again


def test_a_shard_says_what_became_of_its_rows(store):
    skipped = Skipped("bob", "bob: \N{SNOWMAN} no face found")
    add(store, 7, "ann", skipped=[skipped])
    assert store.path(7).name == "shard-00007.safetensors"
    assert store.read(7) == Shard(("ann", "bob"), ("key of ann",), ("ann",), (skipped,))
    assert set(load_file(store.path(7))) == {"theta", "losses"}


def test_a_shard_of_nobody_is_a_shard(store):
    add(store, 0, skipped=[Skipped("bob", "no face")])
    add(store, 1, "ann")
    assert len(store) == 1
    assert store.read(0).keys == ()


def test_what_was_skipped_is_listed_in_order_also_if_another_process_ends_meanwhile(store, monkeypatch):
    add(store, 1, "cy", skipped=[Skipped("dora", "2")])
    write = Path.write_text

    def write_while_another_ends(path, *arguments, **options):
        if not store.path(0).exists():
            add(store, 0, "ann", skipped=[Skipped("bob", "1")])
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write_while_another_ends)
    store.list_skipped()
    lines = (store.folder / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"name": "bob", "reason": "1"}, {"name": "dora", "reason": "2"}]


# ---- what does not belong together is refused ----


@pytest.mark.parametrize("change", [{"seed": 1}, {"down_dim": 19}, {"r": 2}, {"scale": 2.0}])
def test_targets_of_another_space_are_refused(store, base, space, change):
    settings = {name: getattr(space.config, name) for name in ("down_dim", "up_dim", "seed", "r", "scale")}
    with pytest.raises(ValueError, match=f"targets was made with .*{next(iter(change))}"):
        TargetStore(store.folder, LiDBSpace(base.adapted, LiDBConfig(**settings | change)))


def test_targets_of_other_layers_are_refused(store, base):
    with pytest.raises(ValueError, match="targets for unet and text_encoder, not for unet"):
        TargetStore(store.folder, LiDBSpace({"unet": base.unet}, store_config(store)))


def store_config(store):
    return LiDBConfig(**{name: int(store.manifest["space"][name]) for name in ("r", "down_dim", "up_dim", "seed")})


def test_targets_of_other_weights_are_refused(store, base, space):
    weight = next(parameter for parameter in base.unet.parameters() if parameter.dim() >= 2)
    kept = weight.data.clone()
    weight.data.mul_(1.1)
    try:
        with pytest.raises(ValueError, match=r"targets of miniature, whose weights differ .* use the base"):
            TargetStore(store.folder, space)
    finally:
        weight.data.copy_(kept)
    TargetStore(store.folder, space)


def test_targets_of_another_fit_are_refused(store):
    store.check_fit(FIT)
    with pytest.raises(ValueError, match=r"another fit, with steps 3 \(here 4\), prompt None \(here 'a face'\)"):
        store.check_fit(FIT | {"steps": 4, "prompt": "a face"})


# ---- what is broken is named ----


def test_a_folder_that_is_no_store_is_named(space, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        TargetStore(tmp_path / "gone", space)
    with pytest.raises(ValueError, match=r"not a target store: it has no manifest\.json"):
        TargetStore(tmp_path, space)
    assert not has_targets(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "has format 3; this version of lidb-peft reads 2"),
        ({"batch": "many"}, "batch is 'many'"),
        ({"space": {}}, "does not say what its targets belong to"),
        ({"fit": None}, "does not say what its targets belong to"),
    ],
)
def test_a_manifest_that_is_none_is_named(store, space, change, message):
    file = store.folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"manifest.json .*{message}"):
        TargetStore(store.folder, space)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON"):
        TargetStore(store.folder, space)


def test_shards_without_a_manifest_are_not_given_one(store, space):
    add(store, 0, "ann")
    (store.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"shards without the manifest\.json"):
        create_targets(store.folder, space, "miniature", FIT, 2, "faces")


def test_a_damaged_shard_is_named_with_the_remedy(store):
    add(store, 0, "ann")
    add(store, 1, "bob")
    whole = store.path(1).read_bytes()
    for damage in (whole[:-1], whole[:9], b""):
        store.path(1).write_bytes(damage)
        with pytest.raises(
            ValueError, match=r"shard-00001\.safetensors is damaged .* delete it and run hdb preoptimize"
        ):
            len(store)
    save_file({"theta": torch.zeros(1, 2)}, store.path(1))
    with pytest.raises(ValueError, match="is damaged or no shard"):
        store.read(1)


@pytest.mark.parametrize("place", [0.3, 0.999])
def test_a_flipped_bit_is_noticed_in_thetas_and_losses(store, space, place):
    add(store, 0, "ann", "bob")
    blob = bytearray(store.path(0).read_bytes())
    blob[int(place * len(blob))] ^= 4
    store.path(0).write_bytes(blob)
    with pytest.raises(
        ValueError, match=r"shard-00000\.safetensors is damaged .*not those of its checksum.* delete it"
    ):
        len(TargetStore(store.folder, space))


@pytest.mark.parametrize("change", [{"fit": FIT | {"lr": 0.02}}, {"batch": 3}])
def test_a_shard_of_another_run_is_refused(store, space, tmp_path, change):
    manifest = {"fit": FIT, "batch": 2} | change
    create_targets(tmp_path / "other", space, "miniature", **manifest, source="faces")
    add(TargetStore(tmp_path / "other", space), 0, "ann")
    shutil.copy(tmp_path / "other" / "shard-00000.safetensors", store.folder)
    with pytest.raises(
        ValueError, match=r"shard-00000\.safetensors is of another run than .*manifest\.json.* delete it"
    ):
        store.read(0)


def test_a_shard_of_before_a_setting_was_recorded_is_of_the_same_run(store, space, monkeypatch):
    """What is recorded today has the value then that all fits had before."""
    add(store, 0, "ann")
    monkeypatch.setattr(targets_module, "_EARLIER_FIT", targets_module._EARLIER_FIT | {"new": "off"})
    assert TargetStore(store.folder, space).read(0).names == ("ann",)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    for value, is_same in (("off", True), ("on", False)):
        manifest["fit"]["new"] = value
        (store.folder / "manifest.json").write_text(json.dumps(manifest))
        again = TargetStore(store.folder, space)
        assert (again.run == store.run) == is_same


def test_the_digest_of_a_run_stays_as_it_was(store):
    """As shards have recorded it since there are digests."""
    fit = {"optimizer": "adamw", "max_timestep": 1000, "face_detector": "cascade"} | store.manifest["fit"]
    text = json.dumps([store.manifest["space"], fit, 2], sort_keys=True)
    assert store.run == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_a_store_of_before_there_were_checksums_is_read_and_a_shard_that_has_lost_its_own_is_not(store, space):
    thetas = add(store, 0, "ann")
    tensors, metadata = read_tensors(store.path(0))
    save_file(
        tensors, store.path(0), {name: value for name, value in metadata.items() if name not in ("sha256", "run")}
    )
    with pytest.raises(ValueError, match="it has no checksum"):
        len(TargetStore(store.folder, space))
    file = store.folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    assert torch.equal(TargetStore(store.folder, space).thetas(["key of ann"]), thetas)


def test_thetas_that_are_not_finite_are_named(store):
    thetas = torch.full((1, 176, 30), torch.nan)
    store.write(0, Shard(("ann",), ("key",), ("ann",), ()), thetas, torch.zeros(1))
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors holds values that are not finite"):
        store.thetas(["key"])


def test_a_full_disk_leaves_no_half_file(store, monkeypatch):
    add(store, 0, "ann")

    def full(tensors, metadata):
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lidb_peft.files, "safetensors_chunks", full)
    with pytest.raises(OSError, match="No space left") as caught:
        add(store, 1, "bob")
    assert caught.value.filename == str(store.path(1))
    assert sorted(file.name for file in store.folder.iterdir()) == ["manifest.json", "shard-00000.safetensors"]


def test_what_a_killed_process_was_writing_is_no_shard(store):
    (store.folder / ".shard-00000.safetensors.x1y2.tmp").write_bytes(b"half")
    assert store.shards() == []
