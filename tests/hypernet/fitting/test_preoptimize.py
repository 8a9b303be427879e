import json
import shutil
import threading
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig

import hypernet.fitting.preoptimize as preoptimize_module
from hypernet.base_models.loading import load_base
from hypernet.claims import Claims, Shares
from hypernet.fitting.batch_size import LARGEST_BATCH, _largest_batch, choose_batch
from hypernet.fitting.engine import fit_theta
from hypernet.fitting.preoptimize import open_targets, preoptimize
from hypernet.fitting.subjects import make_subjects
from hypernet.inputs.face import Face
from hypernet.inputs.people import People, PreparedPerson, identity_key, open_people
from hypernet.inputs.photos import load_photo
from hypernet.network.hypernetwork import read_config
from hypernet.network.prediction import predicted_start
from hypernet.recipe import PersonalizeConfig, PreoptimizeConfig
from testbed import miniature_path

pytestmark = pytest.mark.usefixtures("datasets_cache")

RECIPE = PersonalizeConfig(theta_steps=2, theta_lr=1e-2, crop=False, preservation=0.0)
QUICK = PreoptimizeConfig(RECIPE, batch_size=2)
SHARDS = [f"shard-0000{index}.safetensors" for index in range(3)]


@pytest.fixture
def run(base, space, face_folder):
    """A function: (folder, config) -> (store, what was done) of a pre-optimisation of the five faces."""

    def preoptimize_into(folder, config=QUICK, start_name="theta_0", people=None, **options):
        people = people or open_people(face_folder)
        store = open_targets(folder, base, space, people, config, start_name)
        return store, preoptimize(people, base, space, store, config, **options)

    return preoptimize_into


@pytest.fixture(scope="module")
def unbroken(base, space, drawn_faces, tmp_path_factory):
    """The store of an unbroken run on the five faces, two at a time."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "faces").mkdir()
    for index, face in enumerate(drawn_faces):
        (folder / "faces" / f"{index}.png").write_bytes(face)
    people = open_people(folder / "faces")
    store = open_targets(folder / "targets", base, space, people, QUICK)
    preoptimize(people, base, space, store, QUICK)
    return store.folder


@pytest.fixture
def fits(monkeypatch):
    """The sizes of the batches that are fitted; ``die_at`` of them raises instead."""

    class Fits(list):
        die_at = None

        def __call__(self, base, space, subjects, *arguments, **options):
            if len(self) == self.die_at:
                raise KeyboardInterrupt
            self.append(len(subjects))
            return fit_theta(base, space, subjects, *arguments, **options)

    fits = Fits()
    monkeypatch.setattr(preoptimize_module, "fit_theta", fits)
    return fits


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.startswith("shard")}


def listed(store):
    return {line["name"]: line["reason"] for line in map(json.loads, open(store.folder / "skipped.jsonl"))}


# ---- what is fitted ----


def test_the_targets_are_the_fits_of_the_people_in_the_data_sets_order(unbroken, base, space, face_folder):
    store = open_targets(unbroken, base, space, open_people(face_folder), QUICK)
    assert [store.read(index).names for index in store.shards()] == [("0.png", "1.png"), ("2.png", "3.png"), ("4.png",)]
    photos = [load_photo(face_folder / name, base.size_px, crop=False) for name in ("2.png", "3.png")]
    subjects = make_subjects(base, [PreparedPerson(photo.name, (photo,)) for photo in photos], RECIPE.trigger)
    thetas, _ = fit_theta(base, space, subjects, QUICK.recipe.theta_fit)
    assert torch.equal(store.thetas([subject.key for subject in subjects]), thetas)
    assert not torch.equal(thetas[0], space.theta_0)


def test_the_manifest_says_what_defines_the_targets(unbroken):
    manifest = json.loads((unbroken / "manifest.json").read_text())
    assert manifest["batch"] == 2
    expected = {"steps": 2, "lr": 0.01, "timesteps_per_step": 1, "max_grad_norm": 1.0, "seed": 0, "crop": False,
                "prompt": "a sks face", "class_prompt": "a face", "size_px": 32, "start": "theta_0",
                "dtype": "float32"}  # fmt: skip
    assert expected.items() <= manifest["fit"].items()
    assert {"seed", "down_dim", "layers_hash", "bases", "base_fingerprint"} <= set(manifest["space"])


def test_a_store_from_before_a_setting_is_gone_on_with(run, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "targets")
    manifest = json.loads((unbroken / "manifest.json").read_text())
    for name in ("optimizer", "max_timestep"):
        del manifest["fit"][name]
    (tmp_path / "targets" / "manifest.json").write_text(json.dumps(manifest))
    _, result = run(tmp_path / "targets")
    assert (result.fitted, result.found) == (0, 3)


def test_several_photos_are_one_person(run, face_folder, base, space):
    (face_folder / "Ann").mkdir()
    for name in ("3.png", "4.png"):
        (face_folder / name).rename(face_folder / "Ann" / name)
    store, _ = run(face_folder.parent / "targets")
    photos = [load_photo(face_folder / "Ann" / name, base.size_px, crop=False) for name in ("3.png", "4.png")]
    assert store.read(1).names == ("2.png", "Ann")
    assert store.read(1).keys[1] == identity_key(torch.stack([photo.to_tensor() for photo in photos]))


# ---- stopped, shared, resumed ----


@pytest.mark.parametrize("die_at", [0, 1, 2])
def test_a_run_that_was_killed_goes_on_and_equals_an_unbroken_one(run, unbroken, fits, tmp_path, die_at):
    fits.die_at = die_at
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "targets")
    assert sorted(contents(tmp_path / "targets")) == SHARDS[:die_at]
    fits.clear()
    fits.die_at = None
    _, result = run(tmp_path / "targets")
    assert fits == [2, 2, 1][die_at:]
    assert (result.found, result.fitted) == (die_at, sum(fits))
    assert contents(tmp_path / "targets") == contents(unbroken)


def test_another_number_at_once_gives_the_same_to_rounding(run, fits, tmp_path):
    config = PreoptimizeConfig(replace(RECIPE, theta_lr=1e-3), batch_size=3)
    together, _ = run(tmp_path / "targets", config)
    for stored in together.shards():
        together.path(stored).rename(tmp_path / together.path(stored).name)
    expected = {path.name: load_file(path)["theta"] for path in tmp_path.glob("*.safetensors")}
    store, _ = run(tmp_path / "targets", replace(config, batch_size=1))
    assert fits == [3, 2, 1, 1, 1, 1, 1]
    assert store.batch == 3  # the shards stay as they were cut
    for name, thetas in expected.items():
        assert (load_file(store.folder / name)["theta"] - thetas).abs().max() < 1e-5


def test_processes_share_the_shards_and_a_rerun_fills_the_gaps_of_a_dead_one(run, unbroken, fits, tmp_path):
    run(tmp_path / "targets", sharing=Shares(0, 2))
    assert sorted(contents(tmp_path / "targets")) == [SHARDS[0], SHARDS[2]]
    fits.clear()
    fits.die_at = 0
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "targets", sharing=Shares(1, 2))
    assert sorted(contents(tmp_path / "targets")) == [SHARDS[0], SHARDS[2]]
    fits.die_at = None
    run(tmp_path / "targets")
    assert fits == [2]
    assert contents(tmp_path / "targets") == contents(unbroken)


def test_a_shard_that_another_has_claimed_is_its_own_until_it_is_there_or_the_other_dies(
    run, unbroken, fits, tmp_path, monkeypatch
):
    targets, other = tmp_path / "targets", Claims(tmp_path)
    run(targets, sharing=Shares(9, 10))  # makes the store, and nothing in it
    other.folder = targets
    assert other.take(0)
    assert other.take(1)

    def finish_one_and_die(seconds):
        if SHARDS[1] not in contents(targets):
            assert list(contents(targets)) == [SHARDS[2]]  # the only one that was free
            shutil.copy(unbroken / SHARDS[1], targets)
            other.release(1)
        else:
            other.release_all()

    monkeypatch.setattr(preoptimize_module.time, "sleep", finish_one_and_die)
    _, result = run(targets)
    assert fits == [1, 2]
    assert (result.fitted, result.found) == (3, 0)
    assert contents(targets) == contents(unbroken)
    assert not list(targets.glob(".*.claim"))


def test_a_shard_of_a_damaged_file_is_named(run, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "targets")
    shard = tmp_path / "targets" / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{SHARDS[1]} is damaged"):
        run(tmp_path / "targets")


def test_another_fit_start_or_data_set_in_the_same_folder_is_refused(run, unbroken, face_folder, tmp_path):
    for change in ({"token": "ohwx"}, {"theta_lr": 1e-3}, {"background": 0.5}):
        with pytest.raises(ValueError, match="another fit"):
            run(unbroken, PreoptimizeConfig(replace(RECIPE, **change)))
    with pytest.raises(ValueError, match="start 'theta_0'"):
        run(unbroken, start_name="a hypernetwork")
    (face_folder / "00.png").write_bytes((face_folder / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"other people or photos than .*faces has in that place"):
        run(unbroken)


def test_another_photo_of_the_same_name_is_refused(run, unbroken, face_folder):
    Image.new("RGB", (64, 64)).save(face_folder / "3.png")
    with pytest.raises(ValueError, match=f"{SHARDS[1]} holds other people or photos than .*faces has in that place"):
        run(unbroken)


def test_another_photo_of_the_same_name_and_size_is_refused(run, unbroken, face_folder):
    photo = face_folder / "3.png"
    photo.write_bytes(photo.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{SHARDS[1]} holds other people or photos"):
        run(unbroken)


def test_a_shard_of_before_photos_were_noted_is_gone_on_from(run, unbroken, base, space, face_folder, tmp_path):
    shutil.copytree(unbroken, tmp_path / "targets")
    store = open_targets(tmp_path / "targets", base, space, open_people(face_folder), QUICK)
    shard = store.read(0)
    store.write(0, replace(shard, photos=()), store.thetas(shard.keys), torch.zeros(len(shard.keys)))
    assert run(tmp_path / "targets")[1].found == len(SHARDS)


@pytest.mark.usefixtures("checkpointing")
def test_gradient_checkpointing_may_change_on_the_way(run, unbroken):
    run(unbroken, replace(QUICK, recipe=replace(QUICK.recipe, gradient_checkpointing="on")))


# ---- what is left out ----


def test_what_cannot_be_used_is_skipped_counted_and_listed(run, face_folder, drawn_faces, tmp_path):
    (face_folder / "0.png").write_bytes(b"no picture")
    (face_folder / "3.png").write_bytes(drawn_faces[2])
    (face_folder / "ann").mkdir()
    (face_folder / "4.png").rename(face_folder / "ann" / "good.png")
    (face_folder / "ann" / "cut.png").write_bytes(drawn_faces[0][:300])
    store, result = run(tmp_path / "targets", replace(QUICK, batch_size=5))
    assert (result.fitted, result.skipped) == (3, 3)
    reasons = listed(store)
    assert "not an image" in reasons["0.png"]
    assert "damaged" in reasons["ann/cut.png"]
    assert reasons["3.png"] == "its photo is the same as that of 2.png"


def test_a_name_that_comes_again_is_skipped_also_in_another_shard(run, drawn_faces, tmp_path):
    rows = [{"bytes": face, "path": name} for face, name in zip(drawn_faces, "aabac", strict=True)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "faces.parquet")
    store, result = run(tmp_path / "targets", people=open_people(tmp_path / "faces.parquet"))
    assert [store.read(index).names for index in store.shards()] == [("a",), ("b",), ("c",)]
    assert (result.fitted, result.skipped) == (3, 2)
    assert listed(store) == {"a": "an earlier row of the data set has the same name"}


def test_without_faces_all_are_skipped_and_none_again(run, fits, tmp_path):
    store, result = run(tmp_path / "targets", replace(QUICK, recipe=replace(RECIPE, crop=True)))
    assert (result.fitted, result.skipped, len(store)) == (0, 5, 0)
    assert all("no face found" in reason for reason in listed(store).values())
    assert run(tmp_path / "targets", replace(QUICK, recipe=replace(RECIPE, crop=True)))[1].found == 3
    assert not fits


def test_of_several_people_in_a_photo_the_one_that_is_asked_for_is_fitted(run, base, space, face_folder, monkeypatch):
    faces = [Face(16.0, 8.0, 16.0, 0.9), Face(0.0, 8.0, 12.0, 0.9)]
    monkeypatch.setattr("hypernet.inputs.photos.find_faces", lambda image, detector: faces)
    recipe, (person, *_) = replace(RECIPE, crop=True, face_detector="yunet"), open_people(face_folder)
    keys = []
    for face in ("largest", "leftmost"):
        config = replace(QUICK, recipe=replace(recipe, face=face))
        store, _ = run(face_folder.parent / face, config)
        expected = preoptimize_module.prepare_person(person, base.size_px, True, "yunet", face=face)[0].key
        assert store.read(0).keys[0] == expected
        keys.append(expected)
    assert keys[0] != keys[1]
    with pytest.raises(ValueError, match=r"another fit, with face 'leftmost' \(here 'largest'\)"):
        run(face_folder.parent / "leftmost", replace(QUICK, recipe=recipe))


def test_a_data_set_without_people_is_refused(run, tmp_path):
    nobody = People("nowhere", Dataset.from_dict({"name": [], "photos": [], "paths": []}), None)
    with pytest.raises(ValueError, match="nowhere holds no people"):
        run(tmp_path / "targets", people=nobody)


# ---- where fits start ----


def test_fits_start_at_the_mean_prediction_of_ones_photos(run, face_folder, space, tmp_path):
    (face_folder / "ann").mkdir()
    for name in ("0.png", "4.png"):
        (face_folder / name).rename(face_folder / "ann" / name)

    def predict(pixels):
        return space.theta_0 + pixels.mean(dim=(1, 2, 3)).view(-1, 1, 1) * space.mask

    gently = PreoptimizeConfig(replace(RECIPE, theta_steps=1, theta_lr=1e-9), batch_size=5)
    people = open_people(face_folder)
    store, _ = run(tmp_path / "targets", gently, start_name="brightness", people=people, start=predict)
    for person in people:
        prepared = preoptimize_module.prepare_person(person, 32, crop=False)[0]
        expected = predict(prepared.pixels).mean(0)
        assert torch.allclose(store.thetas([prepared.key])[0], expected, atol=1e-6)
    assert store.manifest["fit"]["start"] == "brightness"


def test_a_hypernetwork_starts_fits_and_names_itself_by_its_weights(space, tmp_path):
    from hypernet.network.hypernetwork import HyperNetwork, HyperNetworkConfig

    encoder = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    small = {"hidden_size": 16, "num_attention_heads": 2, "k": 1}
    network = HyperNetwork(HyperNetworkConfig.for_space(space, encoder, **small)).eval()
    network.save_pretrained(tmp_path / "first")
    models = load_base(str(miniature_path()), device="cpu").adapted

    def started(name):
        return predicted_start(read_config(tmp_path / name), models, torch.device("cpu"))

    found, start, name = started("first")
    assert found.layer_names == space.layer_names
    pixels = torch.zeros(2, 3, 32, 32)
    with torch.no_grad():  # the decoder's layers take another path, and round otherwise
        assert torch.equal(start(pixels), network(pixels))
    HyperNetwork(network.config, seed=1).save_pretrained(tmp_path / "first")
    other = started("first")[2]
    assert name.startswith("first ")
    assert name != other
    learned = HyperNetworkConfig.for_space(space, encoder, learned_bases=True, **small)
    HyperNetwork(learned).save_pretrained(tmp_path / "learned")
    with pytest.raises(ValueError, match="learned bases"):
        started("learned")


# ---- how many at once, and how far it is ----


def test_auto_takes_what_the_memory_holds(base, space, tmp_path, run):
    each, fixed = 2_000, 500
    peaks = [fixed + each, fixed + 2 * each]
    assert fixed + _largest_batch(100_000, peaks) * each <= 85_000
    assert fixed + (_largest_batch(100_000, peaks) + 1) * each > 85_000
    assert _largest_batch(10**9, peaks) == LARGEST_BATCH
    assert _largest_batch(2_600, peaks) == _largest_batch(2_600, peaks[:1]) == 1
    assert choose_batch(base, space, QUICK.recipe.theta_fit) == 16
    assert run(tmp_path / "targets", replace(QUICK, batch_size=None))[0].batch == 16


def test_progress_goes_on_from_what_was_found_to_the_end(run, tmp_path, fits):
    def steps(**options):
        seen = []
        run(tmp_path / "targets", progress=lambda *step: seen.append(step), **options)
        return seen

    assert steps(sharing=Shares(1, 2)) == [("fit people", done, 5) for done in (0, 0, 1, 2)]
    rest = steps()
    assert rest[0] == ("fit people", 2, 5)
    assert rest[-1] == ("fit people", 5, 5)
    assert rest == sorted(rest)


def test_the_next_shard_is_prepared_while_one_is_fitted(run, tmp_path, monkeypatch):
    """A GPU does not wait for photos to be decoded; here each waits for the other, so that in turn they would hang."""
    original, fit, second = preoptimize_module.prepare_person, preoptimize_module.fit_theta, threading.Event()
    prepared = []

    def prepare(person, *arguments, **options):
        prepared.append(person.name)
        if len(prepared) == 3:  # two in a shard
            second.set()
        return original(person, *arguments, **options)

    def fit_when_the_next_is_prepared(*arguments, **options):
        assert second.wait(timeout=30)
        return fit(*arguments, **options)

    monkeypatch.setattr(preoptimize_module, "prepare_person", prepare)
    monkeypatch.setattr(preoptimize_module, "fit_theta", fit_when_the_next_is_prepared)
    run(tmp_path / "targets")
    assert prepared == sorted(prepared)
