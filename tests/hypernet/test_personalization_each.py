"""A folder of people, each with a LoRA of their own."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hypernet.inputs.people import Person, RawPhoto, open_people, prepare_person
from hypernet.network.prediction import predict_people
from hypernet.opened_request import OpenedRequest, Starts
from hypernet.personalization import personalize
from hypernet.personalization_each import lora_name, personalize_each
from hypernet.request import Request, request_people
from hypernet.sampling import generate
from lidb_peft import LiDBSpace
from testbed import MINIATURE_RECIPE, miniature_lidb_config
from testbed.faces import DrawnRecogniser

pytestmark = pytest.mark.usefixtures("datasets_cache")

QUICK = replace(
    MINIATURE_RECIPE, adapt="all", steps=2, lr=0.02, rank=2, timesteps_per_step=1, preservation=0.0, crop=False,
    likeness=0.0,
)  # fmt: skip
LORAS = [f"{name}.safetensors" for name in ("0", "1", "2", "Ann")]


@pytest.fixture
def people_folder(face_folder):
    """Three people of one photo, and Ann of two."""
    (face_folder / "Ann").mkdir()
    for name in ("3.png", "4.png"):
        (face_folder / name).rename(face_folder / "Ann" / name)
    return face_folder


@pytest.fixture
def run(base, people_folder, tmp_path):
    """A function: (options) -> what became of the people; the LoRAs are in ``loras``."""

    def make(out=tmp_path / "loras", config=QUICK, previews=None, **options):
        people = open_people(people_folder)
        return personalize_each(people, base, out, config, miniature_lidb_config(), previews, **options)

    return make


def names(files):
    return [file.name for file in files]


def photos_of(folder, name):
    return sorted(folder.glob(f"{name}.png")) or sorted((folder / name).iterdir())


# ---- whom, and what ----


def read_people(folder):
    return [prepare_person(person, 32, crop=False)[0] for person in open_people(folder)]


@pytest.mark.parametrize("theta_steps", [0, 1])
@pytest.mark.parametrize("is_given", [False, True], ids=["from theta_0", "from thetas of their own"])
def test_nobodys_weights_depend_on_who_shares_the_batch(base, space, people_folder, theta_steps, is_given):
    config = replace(QUICK, theta_steps=theta_steps, theta_lr=0.02)
    noise = torch.randn(4, *space.theta_0.shape, generator=torch.Generator().manual_seed(0))
    thetas = space.theta_0 + 0.03 * is_given * noise * space.mask
    people = read_people(people_folder)
    opened = OpenedRequest(Request(config, miniature_lidb_config()), base)
    together = opened.fit(people, Starts(thetas))
    for person, theta, result in zip(people, thetas, together, strict=True):
        (alone,) = opened.fit([person], Starts(theta))
        assert result.photos == alone.photos == person.photos
        for stage, losses in alone.losses.items():
            assert torch.allclose(result.losses[stage][0], losses[0], rtol=1e-5)
        found, expected = (torch.cat([(B @ A).flatten() for A, B in one.factors.values()]) for one in (result, alone))
        assert (found - expected).norm() < 1e-3 * expected.norm()  # Adam blows float noise up


def test_everybody_is_predicted_from_all_photos_of_theirs(space, people_folder, make_hypernetwork):
    network = make_hypernetwork(space, learned_bases=True)
    people = read_people(people_folder)
    thetas, bases = predict_people(network, people, network.device)
    with torch.no_grad():
        expected = torch.cat([network(person.pixels[None]) for person in people])
    assert (thetas - expected).norm() < 1e-5 * (expected - space.theta_0).norm()
    assert all(torch.equal(bases[label], basis) for label, basis in network.bases.items())


def test_everybodys_file_holds_the_lora_of_their_photos(run, base, people_folder, tmp_path, assert_same_deltas):
    result = run(batch_size=3)
    assert names(result.made) == LORAS
    assert sorted(names((tmp_path / "loras").iterdir())) == sorted([*LORAS, "0.json", "1.json", "2.json", "Ann.json"])
    assert result.kept == result.skipped == result.notes == []
    for file in result.made:
        alone = personalize(photos_of(people_folder, file.stem), base, QUICK, miniature_lidb_config())
        assert_same_deltas(file, alone.factors, 1e-2, floor=1e-3)


def test_a_hypernetwork_is_loaded_once_and_starts_everybody(run, base, people_folder, tmp_path, make_hypernetwork):
    network = make_hypernetwork(LiDBSpace(base.adapted, miniature_lidb_config()))
    network.save_pretrained(tmp_path / "net")
    result = run(config=replace(QUICK, steps=0), hypernet=tmp_path / "net")
    assert {"load hypernetwork", "predict"} <= result.seconds.keys()
    alone = personalize([people_folder / "1.png"], base, replace(QUICK, steps=0), hypernet=network)
    alone.save(tmp_path / "alone.safetensors")
    expected = load_file(tmp_path / "alone.safetensors")
    for name, tensor in load_file(tmp_path / "loras" / "1.safetensors").items():
        assert torch.allclose(tensor, expected[name], rtol=2e-3, atol=1e-6)


def record_drawings(monkeypatch, *failures):
    """Draw in one step; returns the factors of each drawing. One is tried for each of ``failures``, which is raised."""
    drawn, draw, failures = [], generate, list(failures)

    def record(base, prompts, space, factors, **options):
        drawn.append(factors)
        if failures and (error := failures.pop(0)):
            raise error
        return draw(base, prompts, space, factors, num_steps=1, **options)

    monkeypatch.setattr("hypernet.pictures.generate", record)
    return drawn


def test_everybody_is_drawn_and_the_base_once(run, tmp_path, monkeypatch):
    drawn = record_drawings(monkeypatch)
    run(config=replace(QUICK, steps=1), previews=["a sks face at night"], batch_size=2)
    assert [factors is None for factors in drawn] == [False, True, False, False, False]
    for name in ("0", "Ann"):
        assert Image.open(tmp_path / "loras" / f"{name}.png").size == (32, 32)
        assert Image.open(tmp_path / "loras" / f"{name}-preview.png").width > 2 * 192


def test_progress_counts_people_and_ends_with_all_of_them(run, people_folder):
    (people_folder / "9.png").write_bytes(b"no picture")
    told = []
    run(batch_size=2, progress=lambda *step: told.append(step))
    assert {(stage, total) for stage, _, total in told} == {("personalize", 5)}
    done = [count for _, count, _ in told]
    assert done == sorted(done)
    assert set(done) == {0, 1, 2, 3, 4, 5}


# ---- stopped, and again ----


def test_a_run_that_was_killed_goes_on_with_those_who_are_missing(run, tmp_path):
    def die(stage, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(batch_size=2, progress=die)
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "loras").iterdir()}
    assert sorted(names(first)) == ["0.json", "0.safetensors", "1.json", "1.safetensors"]
    told = []
    result = run(batch_size=2, progress=lambda *step: told.append(step))
    assert (names(result.kept), names(result.made)) == (LORAS[:2], LORAS[2:])
    assert told[0] == ("personalize", 2, 4)
    assert {file: file.stat().st_mtime_ns for file in first} == first
    run(tmp_path / "unbroken", batch_size=2)
    for name in LORAS:
        expected = load_file(tmp_path / "unbroken" / name)
        found = load_file(tmp_path / "loras" / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_run_that_was_killed_within_a_batch_makes_of_the_others_what_the_unbroken_one_makes(run, tmp_path):
    run(tmp_path / "unbroken", batch_size=3)
    run(batch_size=3)
    (tmp_path / "loras" / "1.safetensors").unlink()
    result = run(batch_size=3)
    assert (names(result.kept), names(result.made)) == ([*LORAS[:1], *LORAS[2:]], ["1.safetensors"])
    assert sorted(names((tmp_path / "loras").iterdir())) == sorted(names((tmp_path / "unbroken").iterdir()))
    for file in (tmp_path / "unbroken").iterdir():
        assert (tmp_path / "loras" / file.name).read_bytes() == file.read_bytes()


def all_files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


WAYS = replace(QUICK, steps=5, theta_steps=2, theta_lr=0.02)


def of_everybody(*suffixes):
    return {name.removesuffix(".safetensors") + suffix for name in LORAS for suffix in suffixes}


@pytest.mark.parametrize("at", [("fit theta", 1), ("finetune LoRA", 3)], ids=str)
def test_a_run_that_is_stopped_within_a_batch_goes_on_at_its_step_to_the_very_files(run, tmp_path, at):
    steps = []

    def note(report):
        steps.append((report.stage, report.step))

    options = {"config": WAYS, "batch_size": 3, "save_every": 2, "on_step": note}
    unbroken = run(tmp_path / "unbroken", **options)
    assert unbroken.stopped_at is None
    assert names(unbroken.made) == LORAS
    assert set(all_files(tmp_path / "unbroken")) == of_everybody(
        ".safetensors", ".json", "-000002.safetensors", "-000002.json", "-000004.safetensors", "-000004.json",
        "-loss.png"
    )  # fmt: skip
    steps.clear()
    stopped = run(**options, stop=lambda: steps[-1] == at)
    assert stopped.stopped_at == at
    assert stopped.made == stopped.fitting == []
    assert "0.hdb-state" in all_files(tmp_path / "loras")
    steps.clear()
    told = []
    resumed = run(**options, progress=lambda *step: told.append(step))
    assert steps[0] == (at[0], at[1] + 1)
    assert names(resumed.made) == LORAS
    assert told[-1] == ("personalize", 4, 4)
    assert all_files(tmp_path / "loras") == all_files(tmp_path / "unbroken")


def test_a_run_that_was_killed_goes_on_from_the_last_state_that_was_saved(run, tmp_path):
    steps = []

    def die(report):
        steps.append(report.step)
        if report.step == 4:
            raise KeyboardInterrupt

    config = replace(QUICK, steps=5)
    with pytest.raises(KeyboardInterrupt):
        run(config=config, save_every=3, on_step=die)
    assert {"0.hdb-state", "0-000003.safetensors"} <= set(all_files(tmp_path / "loras"))
    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        run(config=config, save_every=3, on_step=die)
    assert steps == [4]


def test_a_state_of_other_options_is_refused_and_one_of_other_people_begins_anew(run, people_folder, tmp_path):
    config = replace(QUICK, steps=3)
    run(config=config, batch_size=3, stop=lambda: True)
    with pytest.raises(ValueError, match=r"0\.hdb-state is of a fit with another lr; resume with what it was begun"):
        run(config=replace(config, lr=0.01), batch_size=3)
    (people_folder / "1.png").unlink()
    result = run(config=config, batch_size=3)
    assert result.notes[0] == "0.hdb-state is of other people fitted together: they begin anew"
    assert names(result.made) == ["0.safetensors", "2.safetensors", "Ann.safetensors"]
    assert not list((tmp_path / "loras").glob("*.hdb-state"))


def test_samples_and_sheets_are_everybodys_own(run, tmp_path, monkeypatch):
    drawn = record_drawings(monkeypatch)
    for module in ("opened_request", "sheets"):
        monkeypatch.setattr(f"hypernet.{module}.generate", lambda *rest, **options: generate(
            *rest, **{**options, "num_steps": 1}))  # fmt: skip
    reports = []
    run(config=replace(QUICK, steps=3), previews=(), save_every=2, preview_every=2, on_step=reports.append)
    assert [(report.step, sorted(report.pictures)) for report in reports] == [(1, []), (2, [0, 1, 2, 3]), (3, [])]
    files = all_files(tmp_path / "loras")
    assert of_everybody("-000002.png", "-sheet.png", "-loss.png", ".png") <= set(files)
    assert len({files[name] for name in of_everybody("-000002.png")}) == 4
    assert len(drawn) == 4
    before = files.pop("1-sheet.png")
    (tmp_path / "loras" / "1-sheet.png").unlink()
    run(config=replace(QUICK, steps=3), previews=(), save_every=2, preview_every=2)
    assert (tmp_path / "loras" / "1-sheet.png").read_bytes() == before


def test_whose_name_is_that_of_anothers_intermediate_lora_is_left_out(run, people_folder):
    (people_folder / "2.png").rename(people_folder / "0-000002.png")
    result = run(config=replace(QUICK, steps=3), save_every=2)
    assert [(skipped.name, skipped.reason) for skipped in result.skipped] == [
        (
            "0.png",
            "one of its intermediate LoRAs would be 0-000002.safetensors, as that of 0-000002.png; rename one of them",
        )
    ]
    assert "0-000002.safetensors" in names(result.made)


def test_a_lora_is_there_before_it_is_drawn_and_a_picture_that_fails_is_drawn_by_the_next_run(
    run, tmp_path, monkeypatch
):
    out, previews = tmp_path / "loras", ["a sks face at night"]
    record_drawings(monkeypatch)
    run(tmp_path / "unbroken", previews=previews)
    drawn = record_drawings(monkeypatch, torch.cuda.OutOfMemoryError("no memory"), ValueError("NaN"))
    with pytest.warns(UserWarning, match=r"(0|1)\.safetensors is written, but its pictures are not: (no memory|NaN)"):
        result = run(previews=previews)
    assert (names(result.made), len(drawn)) == (LORAS, 5)
    assert not (out / "0.png").exists()
    assert not (out / "1-preview.png").exists()
    again = run(previews=previews)
    assert (names(again.kept), again.made, len(drawn)) == (LORAS, [], 8)
    for file in (tmp_path / "unbroken").iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file


def test_one_whose_fit_diverges_costs_one(run, base, tmp_path, monkeypatch):
    run(tmp_path / "unbroken", batch_size=4)
    encode = base.encode_photos

    def encode_badly(pixels):
        moments = encode(pixels)
        moments[1] = torch.nan
        return moments

    monkeypatch.setattr(base, "encode_photos", encode_badly)
    for _ in range(2):  # the next run does not die of him either
        result = run(batch_size=4, save_every=1)
        (skipped,) = result.skipped
        assert skipped.name == "1.png"
        assert "the base's VAE makes no finite numbers of the photo" in skipped.reason
    for name in ("0.safetensors", "2.safetensors", "Ann.safetensors"):
        assert (tmp_path / "loras" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


# ---- left out ----


def test_who_cannot_be_used_is_left_out_with_the_reason(run, people_folder, drawn_faces):
    (people_folder / "00.png").write_bytes(drawn_faces[0])
    (people_folder / "1.jpg").write_bytes(drawn_faces[4])
    (people_folder / "ann.png").write_bytes(drawn_faces[3])
    (people_folder / " .png").write_bytes(drawn_faces[3])
    (people_folder / f"{'n' * 240}.png").write_bytes(drawn_faces[3])
    (people_folder / "Ann" / "5.png").write_bytes(b"no picture")
    (people_folder / "text.png").write_bytes(b"no picture")
    result = run()
    assert names(result.made) == LORAS
    reasons = dict(result.skipped)
    assert reasons.pop("00.png") == "its photo is the same as that of 0.png"
    assert reasons.pop("1.png") == "its LoRA would be 1.safetensors, as that of 1.jpg; rename one of them"
    assert reasons.pop("ann.png") == "its LoRA would be ann.safetensors, as that of Ann; rename one of them"
    assert "makes no file name" in reasons.pop(" .png")
    assert "makes no file name" in reasons.pop(f"{'n' * 240}.png")
    assert "not an image" in reasons.pop("Ann/5.png")
    assert "not an image" in reasons.pop("text.png")
    assert not reasons


@pytest.mark.parametrize(
    ("person", "photo", "expected"),
    [
        ("ann.b.jpg", "ann.b.jpg", "ann.b"),
        ("Dr. Who", "Dr. Who/1.png", "Dr. Who"),
        ("0.tar/ann.png", "0.tar/ann.png", "0.tar-ann"),
        ("a<b>:c.png", "a<b>:c.png", "a-b--c"),
        (" .png", " .png", ""),
    ],
)
def test_names_of_files_are_those_of_people(person, photo, expected):
    assert lora_name(Person(person, (RawPhoto(photo, b""),))) == expected


def test_bad_outputs_are_found_before_any_work(people_folder, tmp_path, monkeypatch):
    people = open_people(people_folder)

    def check(out):
        request_people(people, out, QUICK)

    check(tmp_path / "a/new/folder")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file; name a folder to write"):
        check(tmp_path / "file")
    for inside in (people_folder, people_folder / "loras"):
        with pytest.raises(ValueError, match=r"what is read|which is read"):
            check(inside)
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(PermissionError, match="is not writable"):
        check(tmp_path / "new/folder")


def test_faces_that_cannot_be_looked_for_are_no_reason_to_leave_everybody_out(people_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="OpenCV is not installed; run pip install opencv"):
        request_people(open_people(people_folder), tmp_path / "loras", replace(QUICK, crop=True))


def test_who_is_not_recognised_is_skipped_with_the_reason(run, monkeypatch):
    """The recogniser sees nobody in the photos that it is asked about first."""
    asked, embed = [], DrawnRecogniser.embed

    def see(self, pixels):
        asked.append(pixels)
        return embed(self, pixels) * (len(asked) > 1)

    monkeypatch.setattr(DrawnRecogniser, "embed", see)
    result = run(config=replace(QUICK, steps=1, likeness=1.0))
    (skipped,) = result.skipped
    assert skipped.reason.startswith(f"nobody is recognised in the photos of {skipped.name}; choose others, or pass")
    assert len(result.made) == 3
