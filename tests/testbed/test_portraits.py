import itertools
from dataclasses import replace

import numpy as np
import pytest

from testbed.corpus import portrait
from testbed.drawing import draw
from testbed.portraits import (
    ATTIRES,
    RARE_TOKENS,
    SCENES,
    SPLITS,
    STYLES,
    Scene,
    caption,
    identity,
    random_scene,
)


def test_a_seed_is_a_portrait():
    first, second = portrait(7), portrait(7)
    assert np.array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert not np.array_equal(first[0], portrait(8)[0])


def test_splits_do_not_overlap_and_draw_different_portraits():
    ranges = sorted(SPLITS.values(), key=lambda split: split.start)
    assert all(left.stop <= right.start for left, right in itertools.pairwise(ranges))
    assert len({portrait(3, split)[0].tobytes() for split in SPLITS}) == len(SPLITS)


def test_an_identity_looks_more_like_itself_than_like_others():
    rng = np.random.default_rng(0)
    pictures = np.stack(
        [[draw(identity(who), random_scene(rng, plain=True)) for _ in range(4)] for who in range(12)]
    ).astype(float)
    heads = pictures[:, :, 6:22, 8:24]  # without background and clothes
    centres = heads.mean(axis=1)
    own = np.abs(heads - centres[:, None]).mean()
    other = np.abs(heads - np.roll(centres, 1, axis=0)[:, None]).mean()
    assert own < 0.6 * other


@pytest.mark.parametrize(("field", "values"), [("style", STYLES), ("place", SCENES), ("attire", ATTIRES)])
def test_every_style_place_and_attire_shows(field, values):
    pictures = [draw(identity(1), replace(Scene(), **{field: value})) for value in values]
    for i, first in enumerate(pictures):
        for second in pictures[:i]:
            assert np.abs(first.astype(float) - second).mean() > 2


@pytest.mark.parametrize("size_px", [32, 64])
def test_size(size_px):
    picture = draw(identity(0), Scene(), size_px)
    assert picture.shape == (size_px, size_px, 3)
    assert picture.dtype == np.uint8


def test_captions_say_what_is_drawn():
    rng = np.random.default_rng(0)
    scene = Scene(style="pencil", place="night", attire="hat")
    texts = [caption(identity(2), scene, rng) for _ in range(50)]
    assert all("pencil" in text and "night" in text and "hat" in text and "face" in text for text in texts)
    rare = [text for text in texts if any(token in text for token in RARE_TOKENS)]
    assert 0 < len(rare) < 30


def test_drawing_leaves_global_generators_alone():
    before = np.random.get_state()[1].copy()
    portrait(11)
    assert np.array_equal(before, np.random.get_state()[1])
