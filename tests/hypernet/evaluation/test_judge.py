"""Metrics against the formulas of their papers, on networks that are easy to reckon with."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from hypernet.evaluation.faces import SeenFace
from hypernet.evaluation.judge import Judge, Reference, hide_face
from hypernet.evaluation.prompts import PROMPTS_FILE, read_prompts
from hypernet.recipe import PRESERVED
from testbed.prompts import template_bank


def flat(red: float, green: float, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), (round(255 * red), round(255 * green), 0))


def colour(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(picture)[0, 0], dtype=torch.float32) / 255


class Faces:
    """A picture's face is its first pixel; a black picture has none."""

    source, revision, same, measure = "colours", "1", None, "cosine"

    def see(self, picture):
        found = colour(picture)
        return SeenFace(found, None, (0.4, 0.4, 0.6, 0.6)) if found.any() else None

    def similarity(self, first, second):
        unit = torch.nn.functional.normalize
        return unit(first, dim=1) @ unit(second, dim=1).T


@dataclass
class Colours:
    """In place of DINO and CLIP."""

    source: str = "colours"
    revision: str = "1"
    seen: list = field(default_factory=list)

    def features(self, pictures):
        self.seen += pictures
        return torch.nn.functional.normalize(torch.stack([colour(each) + 1e-3 for each in pictures]), dim=1)

    def text_features(self, texts):
        return torch.tensor([[1.0, 0, 0] if "red" in text else [0, 1.0, 0] for text in texts])


@pytest.fixture
def judge():
    judge = Judge(["a red face", "a green face"], Faces(), Colours(), Colours())
    judge.meet([
        Reference("red", [flat(1, 0)], [flat(1, 0), flat(1, 0.5)]),
        Reference("green", [flat(0, 1)], [flat(0, 1)]),
    ])  # fmt: skip
    return judge


def cosine(a, b):
    return math.cos(math.atan2(a[1], a[0]) - math.atan2(b[1], b[0]))


def test_pictures_are_compared_with_every_reference_photo(judge):
    drawn = [[flat(1, 0.2), flat(0.5, 1)], [flat(0.3, 0.3), flat(0, 0)]]
    scores = judge.score("red", [flat(1, 0)], drawn)
    seen = [(1, 0.2), (0.5, 1), (0.3, 0.3)]
    expected = [np.mean([cosine(each, other) for other in ((1, 0), (1, 0.5))]) for each in seen]
    assert scores["face_rec"] == pytest.approx(np.mean(expected), abs=0.01)
    assert scores["no_face"] == 0.25
    assert scores["found"] == pytest.approx(2 / 3)  # (0.5, 1) is more like the other person
    assert list(scores) == ["face_rec", "found", "no_face", "dino", "clip_i", "clip_t", "background", "diversity"]


def test_clip_t_compares_each_picture_with_its_own_prompt(judge):
    right = judge.score("red", [flat(1, 0)], [[flat(1, 0)], [flat(0, 1)]])["clip_t"]
    wrong = judge.score("red", [flat(1, 0)], [[flat(0, 1)], [flat(1, 0)]])["clip_t"]
    assert right == pytest.approx(1, abs=0.01)
    assert wrong == pytest.approx(0, abs=0.01)


def test_diversity_is_among_pictures_of_one_prompt(judge):
    alike = judge.score("red", [flat(1, 0)], [[flat(1, 0)] * 2, [flat(0, 1)] * 2])
    differing = judge.score("red", [flat(1, 0)], [[flat(1, 0), flat(0, 1)]] * 2)
    assert alike["diversity"] == pytest.approx(0, abs=1e-5)
    assert differing["diversity"] == pytest.approx(1, abs=0.01)
    assert "diversity" not in judge.score("red", [flat(1, 0)], [[flat(1, 0)], [flat(0, 1)]])


def test_what_is_copied_is_seen_with_the_head_hidden(judge):
    big = flat(1, 0, side=100)
    hidden = np.asarray(hide_face(big, SeenFace(torch.zeros(3), None, (0.4, 0.4, 0.6, 0.6))))
    assert tuple(hidden[50, 50]) == (128, 128, 128)
    assert tuple(hidden[50, 36]) == (128, 128, 128)
    assert tuple(hidden[50, 30]) == (255, 0, 0)
    assert judge.score("red", [flat(1, 0)], [[flat(1, 0)]] * 2)["background"] == pytest.approx(1, abs=0.01)
    assert judge.score("red", [flat(0, 1)], [[flat(1, 0)]] * 2)["background"] == pytest.approx(0, abs=0.01)


def test_without_any_face_what_cannot_be_measured_is_not_a_number(judge):
    scores = judge.score("red", [flat(0, 0)], [[flat(0, 0)]] * 2)
    assert scores["no_face"] == 1
    assert all(math.isnan(scores[name]) for name in ("face_rec", "found", "background"))


def test_photos_set_the_scale(judge):
    assert judge.real("red", is_held_out=True)["face_rec"] == pytest.approx(
        (1 + cosine((1, 0), (1, 0.5))) / 2, abs=0.01
    )
    assert judge.real("green", is_held_out=False) == {}
    assert judge.stranger("red", "green")["found"] == 0


def test_whoever_has_no_face_is_named():
    with pytest.raises(ValueError, match="nobody: the face network finds no face in the photos to compare with"):
        Judge(["a face"], Faces()).meet([Reference("nobody", [flat(0, 0)], [flat(0, 0)])])
    with pytest.raises(ValueError, match="there is no network to judge by"):
        Judge(["a face"])


def test_the_prompts_are_thirty_and_share_no_word_with_what_fits_preserve():
    prompts = read_prompts()
    assert len(prompts) == 30
    bank = (*PRESERVED, *template_bank())
    assert not set(prompts) & set(bank)
    little = {"a", "an", "of", "with", "in", "on", "at", "and", "the", "wearing", "painting", "snow"}
    words = [set(" ".join(texts).replace(",", "").split()) - {"{}"} for texts in (prompts, PRESERVED)]
    assert words[0] & words[1] <= little


@pytest.mark.parametrize(("content", "message"), [
    (b"# nothing\n", "has no prompt"), (b"a face\n", "has the prompt 'a face'; write prompts with one"),
    (b"{} in {}\n", "one {}"), (b"{x} of {}\n", "one {}"), (b"{} here\n{} here\n", "twice"), (b"\xff\xfe", "UTF-8"),
])  # fmt: skip
def test_unusable_prompts_are_refused(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(file)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_prompts(tmp_path / "none.txt")
    assert PROMPTS_FILE.is_file()
