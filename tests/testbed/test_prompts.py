import numpy as np

from testbed.portraits import ATTIRE_WORDS, SCENE_WORDS, STYLE_WORDS
from testbed.prompts import (
    PROMPTS,
    SEEN,
    UNSEEN,
    UNSEEN_WORDS,
    prompt_text,
    scene_to_learn,
    split_prompts,
    template_bank,
)

HELD_OUT = {word for words in UNSEEN_WORDS.values() for word in words} | {"scarf"}


def test_nothing_that_is_learned_holds_a_word_that_is_held_out():
    bank = template_bank()
    assert len(set(bank)) == len(bank) == 400
    rng = np.random.default_rng(0)
    scenes = [scene_to_learn(rng) for _ in range(300)]
    learned = [*bank, *(prompt_text(scene) for scene in scenes), *(text for text, _ in SEEN.values())]
    assert not [text for text in learned if HELD_OUT & set(text.split())]
    assert all(text.count("{}") == 1 for text in bank)
    assert {value for scene in scenes for value in (scene.style, scene.place, scene.attire)} >= {
        "pencil", "watercolour", "cartoon", "night", "beach", "forest", "city", "hat"
    }  # fmt: skip


def test_every_unseen_prompt_asks_for_a_word_of_its_own_split_only():
    for split, other in (("validation", "test"), ("test", "validation")):
        for text, _ in UNSEEN[split].values():
            assert set(UNSEEN_WORDS[split]) & set(text.split())
            assert not set(UNSEEN_WORDS[other]) & set(text.split())
    assert not set(UNSEEN["validation"]) & set(UNSEEN["test"])


def test_prompts_say_what_they_ask_for():
    words = STYLE_WORDS | SCENE_WORDS | ATTIRE_WORDS
    for text, asked in PROMPTS.values():
        assert all(words[value].replace("{}", "").strip() in text for value in asked.values())
    assert PROMPTS["plain"] == ("a [V] face", {})
    assert PROMPTS["pencil crown"] == (
        "a pencil drawing of a [V] face wearing a crown", {"style": "pencil", "attire": "crown"}
    )  # fmt: skip
    assert split_prompts("test")[0] == "plain"
