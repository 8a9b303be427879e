"""Procedural portraits with captions: the world that the bundled miniature was trained on.

A portrait is an `Identity` (who: what stays the same from photo to photo) in a `Scene` (how this photo shows them:
pose, light, expression, background, attire, style). Both come from a `numpy.random.Generator`, so a seed gives a
portrait; `testbed.drawing` draws it. Identities are split by seed: nothing is ever trained or tuned on the test range.
"""

from dataclasses import dataclass

import numpy as np

SPLITS = {
    "train": range(0, 1_000_000), "validation": range(1_000_000, 1_010_000), "test": range(2_000_000, 2_010_000),
    "measuring": range(3_000_000, 4_000_000),
}  # fmt: skip
"""Seeds of identities: for training the base, for choices, for reports, and for training the measuring network."""
RARE_TOKENS = ("sks", "ohwx", "zwx", "bnha")

HAIR_COLOURS = {
    "black": (30, 26, 28), "brown": (96, 58, 30), "blond": (232, 196, 104), "red": (190, 70, 24),
    "grey": (150, 150, 156), "white": (236, 236, 232), "blue": (44, 84, 214), "pink": (236, 98, 170),
    "green": (40, 160, 80),
}  # fmt: skip
HAIR_STYLES = ("bald", "short", "bob", "long", "afro", "bun", "mohawk", "fringe")
BEARDS = ("none", "moustache", "goatee", "full")
GLASSES = ("none", "round", "square")
EYE_COLOURS = {"brown": (70, 40, 20), "blue": (40, 90, 200), "green": (30, 130, 60)}
SKIN_TONES = np.array([(255, 224, 200), (240, 196, 160), (214, 158, 112), (160, 106, 70), (98, 62, 42)], np.float64)
CLOTHES = {"red": (200, 40, 40), "blue": (50, 80, 190), "green": (50, 140, 70), "yellow": (230, 200, 60),
           "white": (236, 236, 236), "black": (40, 40, 46), "purple": (130, 60, 170),
           "orange": (235, 130, 40)}  # fmt: skip

STYLES = ("photo", "pencil", "pixel", "neon", "watercolour", "cartoon")
SCENES = ("plain", "night", "beach", "forest", "city", "snow")
ATTIRES = ("shirt", "hat", "scarf", "crown", "headphones")
STYLE_WORDS = {
    "photo": "a photo of {}", "pencil": "a pencil drawing of {}", "pixel": "pixel art of {}",
    "neon": "a neon sign of {}", "watercolour": "a watercolour painting of {}", "cartoon": "a cartoon of {}",
}  # fmt: skip
SCENE_WORDS = {"plain": "", "night": " at night", "beach": " on a beach", "forest": " in a forest",
               "city": " in a city", "snow": " in the snow"}  # fmt: skip
ATTIRE_WORDS = {"shirt": "", "hat": " wearing a hat", "scarf": " wearing a scarf", "crown": " wearing a crown",
                "headphones": " wearing headphones"}  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """Who is in the picture. Continuous attributes lie in [0, 1]; the others are names from this module's tables."""

    skin: float
    face_width: float
    face_height: float
    jaw: float
    eye_spacing: float
    eye_size: float
    brow: float
    mouth_width: float
    nose: float
    hair_volume: float
    hair_colour: str
    hair_style: str
    eye_colour: str
    beard: str
    glasses: str
    freckles: bool


@dataclass(frozen=True)
class Scene:
    """How this picture shows the identity. Angles in radians, offsets in fractions of the picture."""

    style: str = "photo"
    place: str = "plain"
    attire: str = "shirt"
    attire_colour: str = "red"
    shirt_colour: str = "blue"
    background: tuple[int, int, int] = (150, 170, 190)
    roll: float = 0.0
    yaw: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    zoom: float = 1.08
    light: float = 0.0
    smile: float = 0.3
    mouth_open: float = 0.0
    seed: int = 0


def identity(seed: int) -> Identity:
    """The identity of a seed; see `SPLITS` for which seeds may be trained on."""
    rng = np.random.default_rng((seed, 0x1D))
    unit = {name: float(rng.random()) for name in (
        "skin", "face_width", "face_height", "jaw", "eye_spacing", "eye_size", "brow", "mouth_width", "nose",
        "hair_volume",
    )}  # fmt: skip
    return Identity(
        **unit,
        hair_colour=str(rng.choice(list(HAIR_COLOURS))),
        hair_style=str(rng.choice(HAIR_STYLES)),
        eye_colour=str(rng.choice(list(EYE_COLOURS))),
        beard=str(rng.choice(BEARDS, p=(0.55, 0.15, 0.1, 0.2))),
        glasses=str(rng.choice(GLASSES, p=(0.6, 0.2, 0.2))),
        freckles=bool(rng.random() < 0.25),
    )


def random_scene(rng: np.random.Generator, plain: bool = False) -> Scene:
    """A random way to photograph someone; ``plain`` gives ordinary photographs without extras."""
    style, place, attire = "photo", "plain", "shirt"
    if not plain:
        style = str(rng.choice(STYLES, p=(0.4, 0.12, 0.12, 0.12, 0.12, 0.12)))
        place = str(rng.choice(SCENES, p=(0.5, 0.1, 0.1, 0.1, 0.1, 0.1)))
        attire = str(rng.choice(ATTIRES, p=(0.6, 0.1, 0.1, 0.1, 0.1)))
    return Scene(
        style=style,
        place=place,
        attire=attire,
        attire_colour=str(rng.choice(list(CLOTHES))),
        shirt_colour=str(rng.choice(list(CLOTHES))),
        background=tuple(int(c) for c in rng.integers(60, 240, 3)),
        roll=float(rng.normal(0, 0.08)),
        yaw=float(rng.normal(0, 0.35)),
        shift=(float(rng.normal(0, 0.025)), float(rng.normal(0, 0.02))),
        zoom=float(rng.uniform(1.0, 1.15)),
        light=float(rng.uniform(-1, 1)),
        smile=float(rng.uniform(-0.2, 1)),
        mouth_open=float(max(0.0, rng.normal(0, 0.4))),
        seed=int(rng.integers(2**31)),
    )


def caption(who: Identity | None, scene: Scene, rng: np.random.Generator) -> str:
    """A caption; attributes are mentioned now and then, and sometimes a rare token stands before "face".

    Rare tokens are paired with random identities: like "sks" in Stable Diffusion, they mean nobody yet.
    """
    noun = "a face"
    if rng.random() < 0.3:
        noun = f"a {rng.choice(RARE_TOKENS)} face"
    elif who is not None and rng.random() < 0.5:
        hair = "bald" if who.hair_style == "bald" else f"{who.hair_colour} {who.hair_style} hair"
        words = ["a face with " + hair if hair != "bald" else "a bald face"]
        if who.beard != "none" and rng.random() < 0.7:
            words.append("a full beard" if who.beard == "full" else f"a {who.beard}")
        if who.glasses != "none" and rng.random() < 0.7:
            words.append(f"{who.glasses} glasses")
        noun = " and ".join(words)
    drop_style = scene.style == "photo" and rng.random() < 0.7
    text = noun if drop_style else STYLE_WORDS[scene.style].format(noun)
    attire = ATTIRE_WORDS[scene.attire]
    if scene.attire in ("hat", "scarf") and rng.random() < 0.5:
        attire = f" wearing a {scene.attire_colour} {scene.attire}"
    return text + attire + SCENE_WORDS[scene.place]
