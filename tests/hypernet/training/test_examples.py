"""Who is trained on when, and in which photos."""

import pickle
from dataclasses import replace

import pytest
import torch
from PIL import Image

from hypernet.inputs import photos
from hypernet.inputs.face import Face
from hypernet.inputs.people import open_people
from hypernet.inputs.prepared import prepare
from hypernet.recipe import TrainConfig
from hypernet.training.examples import BLANK, Examples, augment, choose_people, training_places, validation_places

pytestmark = pytest.mark.usefixtures("datasets_cache")

CONFIG = TrainConfig(batch_size=2, num_workers=0, crop=False, flip=True, jitter=0.3, caption_dropout=0.25)


@pytest.fixture
def two_photos(face_folder):
    """One person in two photos, the second the negative of the first."""
    folder = face_folder.parent / "people" / "Ann"
    folder.mkdir(parents=True)
    photo = Image.open(face_folder / "0.png").convert("RGB")
    photo.save(folder / "a.png")
    photo.point(lambda value: 255 - value).save(folder / "b.png")
    return open_people(folder.parent)


def test_both_photos_are_cut_and_flipped_alike(two_photos):
    """Drawn apart, a flipped face was to be predicted from one that is not."""
    examples = Examples(two_photos, 32, CONFIG)
    drawn = [examples[step, 0] for step in range(12)]
    assert all(torch.allclose(example.seen, -example.denoised, atol=1e-5) for example in drawn)
    assert len({example.seen.numpy().tobytes() for example in drawn}) > 8
    assert {example.photo[-1] for example in drawn} == {"0", "1"}
    same = Examples(two_photos, 32, replace(CONFIG, same_photo=True))
    assert all(torch.equal(same[step, 0].seen, same[step, 0].denoised) for step in range(3))


def test_half_of_the_photos_are_mirrored_and_cuts_stay_inside(two_photos):
    pixels = torch.linspace(-1, 1, 20).expand(1, 3, 20, 20)
    generator = torch.Generator().manual_seed(0)
    mirrored = [bool((augment(pixels, True, 0.0, generator) == pixels.flip(-1)).all()) for _ in range(200)]
    assert 70 < sum(mirrored) < 130
    cuts = [augment(pixels, False, 0.5, generator)[0, 0, 0] for _ in range(100)]
    spans = torch.stack([cut[-1] - cut[0] for cut in cuts])
    assert spans.min() > 0.8  # 2 uncut, at least about half of it
    assert spans.max() <= 2
    assert torch.equal(augment(pixels, False, 0.0, generator), pixels)


def test_captions_are_dropped_at_the_rate(two_photos):
    examples = Examples(two_photos, 32, replace(CONFIG, flip=False, jitter=0.0))
    dropped = [examples[step, 0].drops_caption for step in range(200)]
    assert 30 < sum(dropped) < 70
    validation = Examples(two_photos, 32, CONFIG, is_validation=True)
    drawn = [validation[0, 0] for _ in range(2)]
    assert not drawn[0].drops_caption
    assert torch.equal(drawn[0].seen, drawn[1].seen)
    assert drawn[0].seed == drawn[1].seed


def test_an_example_follows_from_step_and_person_alone(face_folder):
    people = open_people(face_folder)
    first = Examples(people, 32, CONFIG)[3, 2]
    (face_folder / "0.png").unlink()  # everybody moves up
    again = Examples(open_people(face_folder), 32, CONFIG)[3, 1]
    assert first.name == again.name == "2.png"
    assert first.seed == again.seed
    assert torch.equal(first.seen, again.seen)
    assert Examples(people, 32, CONFIG)[4, 2].seed != first.seed


def test_what_cannot_be_used_is_a_blank_with_a_reason(face_folder):
    (face_folder / "1.png").write_bytes(b"no picture")
    examples = Examples(open_people(face_folder), 32, CONFIG, copies=3)
    batch = examples.collate([examples[0, 0], examples[0, 1], examples[0, BLANK]])
    assert batch.counts.tolist() == [1.0, 0.0, 0.0]
    assert [entry.name for entry in batch.skipped] == ["1.png"]
    assert batch.seen.shape == (3, 3, 32, 32)
    assert batch.targets is None


def test_a_face_is_looked_for_once_however_often_its_photo_comes(face_folder, monkeypatch):
    found = {"0.png": [Face(8.0, 8.0, 16.0, 0.9)], "1.png": []}
    looked_at = []

    def find(image, detector):
        looked_at.append(image.size)
        return found["0.png"] if len(looked_at) == 1 else found["1.png"]

    monkeypatch.setattr(photos, "find_faces", find)
    examples = Examples(open_people(face_folder), 32, replace(CONFIG, crop=True, face_detector="yunet"))
    drawn = [[examples[step, row] for row in (0, 1)] for step in range(3)]
    assert len(looked_at) == 2
    assert [[bool(example.name) for example in pair] for pair in drawn] == [[True, False]] * 3
    assert all("no face found" in pair[1].skipped[0].reason for pair in drawn)
    again = Examples(open_people(face_folder), 32, replace(CONFIG, crop=True, face_detector="yunet"))
    looked_at.clear()
    assert torch.equal(again[2, 0].seen, drawn[2][0].seen)


def test_of_several_people_in_a_photo_the_one_that_is_asked_for_is_taken(face_folder, monkeypatch):
    left, right = Face(0.0, 8.0, 12.0, 0.9), Face(16.0, 8.0, 16.0, 0.9)
    monkeypatch.setattr(photos, "find_faces", lambda image, detector: [right, left])
    config = replace(CONFIG, crop=True, face_detector="yunet")
    shown = {
        face: Examples(open_people(face_folder), 32, replace(config, face=face))[0, 0].seen
        for face in ("largest", "leftmost", "rightmost")
    }
    assert torch.equal(shown["largest"], shown["rightmost"])
    assert not torch.equal(shown["largest"], shown["leftmost"])
    with pytest.raises(ValueError, match="face is 'middle'"):
        replace(config, face="middle")


def test_workers_that_are_spawned_get_the_same_examples(face_folder):
    """As on Windows and macOS: what a data loader hands to them is pickled, and holds no base model."""
    examples = Examples(open_people(face_folder), 32, CONFIG)
    sent = pickle.dumps(examples.collate)
    assert len(sent) < 1_000_000
    assert torch.equal(pickle.loads(sent).__self__[3, 2].seen, examples[3, 2].seen)


def test_photos_whose_latents_are_kept_are_not_brought_to_the_device(face_folder):
    examples = Examples(open_people(face_folder), 32, CONFIG)
    batch = examples.collate([examples[0, 0]]).to(torch.device("meta"))
    assert (batch.seen.device.type, batch.counts.device.type, batch.denoised.device.type) == ("meta", "meta", "cpu")


def places(config, step=0, rank=0, world=1, count=5):
    return list(training_places(config, count, step, rank, world))


def test_everybody_is_seen_once_an_epoch_in_another_order_each_time():
    rows = [row for batch in places(replace(CONFIG, steps=5)) for _, row in batch]
    assert sorted(rows[:5]) == sorted(rows[5:]) == list(range(5))
    assert rows[:5] != rows[5:]


def test_processes_and_accumulation_share_the_same_people_of_a_step():
    def by_step(batches):
        steps = {}
        for batch in batches:
            for step, row in batch:
                steps.setdefault(step, []).append(row)
        return {step: sorted(rows) for step, rows in steps.items()}

    config = replace(CONFIG, steps=4)
    alone = by_step(places(replace(config, batch_size=4)))
    assert by_step(places(config, rank=0, world=2) + places(config, rank=1, world=2)) == alone
    assert by_step(places(replace(config, gradient_accumulation_steps=2))) == alone
    assert places(config, step=3) == places(config)[3:]


def test_validation_shares_everybody_out_and_fills_up_batches():
    shares = [list(validation_places(CONFIG, 5, rank, 2)) for rank in range(2)]
    assert shares == [[[(0, 0), (0, 2)], [(0, 4), (0, BLANK)]], [[(0, 1), (0, 3)]]]


def test_who_is_held_out_depends_on_names_alone(face_folder):
    config = replace(CONFIG, validation=0.4)
    chosen = choose_people(open_people(face_folder), config, None, None)
    training, held_out = ({person.name for person in part} for part in chosen)
    assert (len(training), len(held_out)) == (3, 2)
    assert not training & held_out
    (face_folder / min(training)).unlink()
    _, again = choose_people(open_people(face_folder), config, None, None)
    assert {person.name for person in again} == held_out
    assert choose_people(open_people(face_folder), replace(CONFIG, validation=0.0), None, None)[1] is None


def test_one_person_cannot_be_shared_out(two_photos):
    with pytest.raises(ValueError, match=r"holds 1 people to train on, and validation holds out 1; add people"):
        choose_people(two_photos, CONFIG, None, None)


def test_prepared_people_give_the_very_examples_of_their_source(face_folder, tmp_path):
    prepare(face_folder, tmp_path / "prepared", 32, crop=False)
    raw, ready = (Examples(open_people(source), 32, CONFIG) for source in (face_folder, tmp_path / "prepared"))
    for place in ((0, 0), (5, 1), (9, 2)):
        ours, theirs = ready[place], raw[place]
        assert torch.equal(ours.seen, theirs.seen)
        assert torch.equal(ours.denoised, theirs.denoised)
        assert (ours.name, ours.photo, ours.seed) == (theirs.name, theirs.photo, theirs.seed)
