from dataclasses import replace

import numpy as np
import pytest
import torch

from hypernet.base_models.loading import load_base
from lidb_peft import LiDBSpace
from testbed import miniature_lidb_config, miniature_path
from testbed.drawing import draw
from testbed.measuring import load_attribute_network, load_measuring_network, to_pixels
from testbed.portraits import SPLITS, identity
from testbed.protocol import LIKENESSES, SHOWN, Judge, draw_prompts, photo, photo_scene, spread, true_picture

PEOPLE = SPLITS["validation"][:12]
JUDGED = ("plain", "pencil", "night", "pixel", "crown", "pixel night")


@pytest.fixture(scope="module")
def judge():
    return Judge(load_measuring_network(), prompts=JUDGED)


@pytest.fixture(scope="module")
def base():
    return load_base(str(miniature_path()), device="cpu")


def _true_pictures(people):
    return torch.stack([to_pixels([true_picture(person, name) for name in JUDGED]) for person in people])


def test_true_pictures_score_one_and_strangers_zero(judge):
    scores = judge.score(_true_pictures(PEOPLE), PEOPLE)
    own = scores.means()
    assert own["identity"] == pytest.approx(1, abs=0.1)
    assert own["identity_prompted"] == pytest.approx(1, abs=0.1)
    assert min(own["seen"], own["unseen"], own["both"], own["found"]) > 0.85
    for prompted in (False, True):
        attributes = scores.attributes(prompted)
        assert set(attributes) == set(LIKENESSES[1:])
        assert np.mean([float(values.mean()) for values in attributes.values()]) == pytest.approx(1, abs=0.1)
    others = judge.score(_true_pictures(SPLITS["validation"][100:112]), PEOPLE)
    strangers = others.means()
    assert abs(strangers["identity"]) < 0.25
    assert abs(strangers["identity_prompted"]) < 0.25
    assert strangers["seen"] > 0.9  # prompts are obeyed, whoever it is
    assert max(strangers["both"], strangers["found"]) < 0.3
    assert abs(np.mean([float(values.mean()) for values in others.attributes().values()])) < 0.25


def test_a_copied_photo_scores_its_background_and_no_prompt(judge):
    shown = to_pixels([photo(person, SHOWN) for person in PEOPLE])
    copied = judge.score(shown[:, None].expand(-1, len(judge.prompts), -1, -1, -1), PEOPLE)
    assert torch.equal(copied.background, torch.ones(len(PEOPLE)))
    means = copied.means()
    assert min(means["identity"], means["found"]) > 0.8
    assert means["identity_prompted"] > 0.5  # which is why identity and obedience are multiplied, picture by picture
    assert max(means["seen"], means["unseen"], means["both"]) < 0.1
    assert abs(judge.score(_true_pictures(PEOPLE), PEOPLE).background.mean()) < 0.4


def test_one_attribute_that_differs_is_seen_by_its_name(judge):
    glasses = [replace(identity(person), glasses="none") for person in PEOPLE]
    true, changed = ([draw(who, photo_scene(person, 5)) for person, who in zip(PEOPLE, people, strict=True)]
                     for people in (map(identity, PEOPLE), glasses))  # fmt: skip
    judge = Judge(judge.network, prompts=("plain",))
    before, after = (judge.score(to_pixels(pictures)[:, None], PEOPLE).attributes() for pictures in (true, changed))
    wearing = torch.tensor([identity(person).glasses != "none" for person in PEOPLE])
    assert (before["glasses"] - after["glasses"])[wearing].min() > 0.5
    assert torch.allclose(before["glasses"][~wearing], after["glasses"][~wearing])
    assert (before["skin"] - after["skin"]).abs().mean() < 0.2


def test_true_photos_vary_as_true_photos_do_and_copies_not_at_all():
    network = load_attribute_network()
    other = torch.stack([to_pixels([photo(person, number) for number in range(20, 36)]) for person in PEOPLE])
    assert all(values.mean() == pytest.approx(1, abs=0.15) for values in spread(other, PEOPLE, network).values())
    same = spread(other[:, :1].expand(-1, 16, -1, -1, -1), PEOPLE, network)
    assert set(same) == {"pose", "zoom", "background"}
    assert all(values.abs().max() < 1e-3 for values in same.values())


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
