import numpy as np
import pytest
import torch

from hypernet.bases.loading import load_base
from lidb_peft import LiDBSpace
from testbed import miniature_lidb_config, miniature_path
from testbed.measuring import load_measuring_network, to_pixels
from testbed.portraits import SPLITS
from testbed.protocol import PROMPTS, SHOWN, Judge, draw_prompts, photo, true_picture

PEOPLE = SPLITS["validation"][:12]


@pytest.fixture(scope="module")
def judge():
    return Judge(load_measuring_network())


@pytest.fixture(scope="module")
def base():
    return load_base(str(miniature_path()), device="cpu")


def _true_pictures(people):
    return torch.stack([to_pixels([true_picture(person, name) for name in PROMPTS]) for person in people])


def test_true_pictures_score_one_and_strangers_zero(judge):
    own = judge.score(_true_pictures(PEOPLE), PEOPLE).means()
    assert own["identity"] == pytest.approx(1, abs=0.1)
    assert own["identity_prompted"] == pytest.approx(1, abs=0.1)
    assert min(own["style"], own["scene"]) > 0.9
    strangers = judge.score(_true_pictures(SPLITS["validation"][100:112]), PEOPLE).means()
    assert abs(strangers["identity"]) < 0.25
    assert abs(strangers["identity_prompted"]) < 0.25
    assert strangers["style"] > 0.9  # prompts are obeyed, whoever it is


def test_a_copied_photo_scores_its_background_and_no_prompt(judge):
    shown = to_pixels([photo(person, SHOWN) for person in PEOPLE])
    copied = judge.score(shown[:, None].expand(-1, len(PROMPTS), -1, -1, -1), PEOPLE)
    assert torch.equal(copied.background, torch.ones(len(PEOPLE)))
    assert copied.means()["identity"] > 0.8
    assert copied.means()["prompt"] < 0.1
    assert abs(judge.score(_true_pictures(PEOPLE), PEOPLE).background.mean()) < 0.4


def test_photos_of_a_person_differ_and_repeat():
    assert np.array_equal(photo(PEOPLE[0], 1), photo(PEOPLE[0], 1))
    assert not np.array_equal(photo(PEOPLE[0], 0), photo(PEOPLE[0], 1))


def test_people_drawn_together_are_drawn_as_if_alone(base):
    space = LiDBSpace(base.adapted, miniature_lidb_config())
    generator = torch.Generator().manual_seed(0)
    thetas = space.theta_0 + 0.3 * torch.randn(2, *space.theta_0.shape, generator=generator) * space.mask
    factors = [space.factors(theta) for theta in thetas]
    prompts = ["a [V] face", "a [V] face at night", "a cartoon of a [V] face"]
    together = draw_prompts(base, space, factors, 2, num_steps=3, prompts=prompts)
    assert together.shape == (2, 3, 3, 32, 32)
    alone = draw_prompts(base, space, factors[:1], 1, num_steps=3, prompts=prompts)
    assert torch.allclose(together[:1], alone, atol=1e-4)
    alone = draw_prompts(base, space, factors[1:], 1, num_steps=3, prompts=prompts, first=1)
    assert torch.allclose(together[1:], alone, atol=1e-4)
    swapped = draw_prompts(base, space, factors[::-1], 2, num_steps=3, prompts=prompts)
    assert (swapped - together).abs().mean() > 0.01
