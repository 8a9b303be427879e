"""Prompts: those that fits and training may see, and those that only measurements use.

A user's prompt was neither preserved nor trained. So words are held out: none of `UNSEEN_WORDS` occurs in a training
prompt or in the prompts that fits preserve, and those used for choices differ from those used for reports.
"""

from dataclasses import replace

import numpy as np

from testbed.portraits import (
    ATTIRE_WORDS,
    HAIR_COLOURS,
    HAIR_STYLES,
    SCENE_WORDS,
    STYLE_WORDS,
    Scene,
    random_scene,
)

STYLES_SEEN = ("photo", "pencil", "watercolour", "cartoon")
PLACES_SEEN = ("plain", "night", "beach", "forest", "city")
ATTIRES_SEEN = ("shirt", "hat")
UNSEEN_WORDS = {"validation": ("pixel", "crown"), "test": ("neon", "snow", "headphones")}
"""Held out of all training; so is the scarf, which the base itself never learned to draw."""

NOUN = "a [V] face"


def prompt_text(scene: Scene, noun: str = NOUN, says_photo: bool = False) -> str:
    """The prompt for a scene's style, place and attire.

    Args:
        says_photo: include "a photo of".
    """
    style = "{}" if scene.style == "photo" and not says_photo else STYLE_WORDS[scene.style]
    return style.format(noun) + ATTIRE_WORDS[scene.attire] + SCENE_WORDS[scene.place]


def _prompts(*scenes: Scene) -> dict[str, tuple[str, dict[str, str]]]:
    """Name -> prompt, and its scene."""
    found = {}
    for scene in scenes:
        ordinary = Scene()
        asked = {name: getattr(scene, name) for name in ("style", "place", "attire")}
        asked = {name: value for name, value in asked.items() if value != getattr(ordinary, name)}
        found[" ".join(asked.values()) or "plain"] = (prompt_text(scene), asked)
    return found


PLAIN = _prompts(Scene())
SEEN = _prompts(
    *(Scene(style=style) for style in STYLES_SEEN[1:]), *(Scene(place=place) for place in PLACES_SEEN[1:]),
    Scene(attire="hat"),
)  # fmt: skip
"""Those that fits preserve, literally or in other words, and training draws."""
UNSEEN = {
    "validation": _prompts(
        Scene(style="pixel"), Scene(attire="crown"),
        Scene(style="pixel", place="night"), Scene(style="pixel", place="beach"), Scene(style="pixel", place="city"),
        Scene(style="pixel", attire="hat"), Scene(style="pencil", attire="crown"),
        Scene(style="cartoon", attire="crown"), Scene(place="beach", attire="crown"),
        Scene(place="night", attire="crown"),
    ),
    "test": _prompts(
        Scene(style="neon"), Scene(place="snow"), Scene(attire="headphones"),
        Scene(style="neon", place="forest"), Scene(style="neon", attire="hat"), Scene(style="cartoon", place="snow"),
        Scene(place="snow", attire="hat"), Scene(place="snow", attire="headphones"),
        Scene(style="pencil", attire="headphones"), Scene(style="watercolour", attire="headphones"),
        Scene(place="forest", attire="headphones"), Scene(place="night", attire="headphones"),
        Scene(place="city", attire="headphones"),
    ),
}  # fmt: skip
PROMPTS = PLAIN | SEEN | UNSEEN["validation"] | UNSEEN["test"]
"""Name -> prompt, and the part of the scene that it specifies."""


def split_prompts(split: str) -> tuple[str, ...]:
    """The names of a split's prompts: the plain one, then the seen ones, then the unseen ones."""
    return (*PLAIN, *SEEN, *UNSEEN[split])


def scene_to_learn(rng: np.random.Generator) -> Scene:
    """A random scene, never the plain one, whose prompt has only words that may be seen."""
    while True:
        scene = replace(
            random_scene(rng, plain=True),
            style=str(rng.choice(STYLES_SEEN, p=(0.34, 0.22, 0.22, 0.22))),
            place=str(rng.choice(PLACES_SEEN, p=(0.4, 0.15, 0.15, 0.15, 0.15))),
            attire=str(rng.choice(ATTIRES_SEEN, p=(0.6, 0.4))),
        )
        if (scene.style, scene.place, scene.attire) != ("photo", "plain", "shirt"):
            return scene


def template_bank(count: int = 400) -> tuple[str, ...]:
    """Prompts with words that may be seen, ``{}`` for the subject: styles, places, attire, hair, beards and glasses."""
    rng = np.random.default_rng(0xBA)
    found: dict[str, None] = {}
    while len(found) < count:
        scene = scene_to_learn(rng) if rng.random() < 0.8 else Scene()
        text = prompt_text(scene, "{}" + _looks(rng), says_photo=bool(rng.random() < 0.3))
        if text != "{}":
            found[text] = None
    return tuple(found)


def _looks(rng: np.random.Generator) -> str:
    """A description of the subject in the words of captions, or ""."""
    if rng.random() > 0.6:
        return ""
    style, parts = str(rng.choice(HAIR_STYLES)), []
    if style != "bald":
        parts.append(f"{rng.choice(list(HAIR_COLOURS))} {style} hair")
    if rng.random() < 0.4:
        parts.append(str(rng.choice(("a full beard", "a moustache", "a goatee"))))
    if rng.random() < 0.4:
        parts.append(str(rng.choice(("round glasses", "square glasses"))))
    return " with " + " and ".join(parts) if parts else ""
