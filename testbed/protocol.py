"""How well pictures show a person and follow their prompt: the measures shared by all experiments on the miniature.

A person is judged by photos that no fit has seen: a memorised background, pose or shirt earns nothing.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hypernet.base_models.base import BaseModel
from hypernet.fitting.engine import Subject
from lidb_peft import LiDBSpace, LoraFactors
from testbed import MINIATURE_RECIPE
from testbed.drawing import draw
from testbed.faces import DrawnRecogniser
from testbed.measuring import CHOICES, AttributeNetwork, Measurement, MeasuringNetwork, to_pixels
from testbed.portraits import SPLITS, Scene, identity, random_scene
from testbed.prompts import PROMPTS, SEEN, split_prompts

SHOWN, NEVER_SHOWN = 0, (1, 2, 3)
CALIBRATION_PEOPLE = 100
GALLERY = 30
SAMPLES, SAMPLED_PHOTOS = 16, 100  # of one person, and the number of the first true photo that they are compared with
CONTINUOUS_SEEN = ("skin", "face_width", "face_height", "jaw", "eye_spacing", "eye_size", "mouth_width", "hair_volume")
CHOICES_SEEN = ("hair_colour", "hair_style", "eye_colour", "beard", "glasses", "freckles")
LIKENESSES = ("identity", *CONTINUOUS_SEEN, *CHOICES_SEEN)
"""How people are compared: by the embedding, and by the attributes that the measuring network can read."""
TYPICAL_COLOUR_DISTANCE = 0.70  # between the backgrounds of two random plain photos, colours in [-1, 1]


def photo_scene(person: int, number: int) -> Scene:
    """The scene of plain photo ``number`` of the identity with seed ``person``."""
    return random_scene(np.random.default_rng((person, number, 0xF0)), plain=True)


def photo(person: int, number: int) -> np.ndarray:
    """Plain photo ``number`` of the identity with seed ``person``: ``(32, 32, 3)`` uint8."""
    return draw(identity(person), photo_scene(person, number))


def shown_photos(people: Sequence[int]) -> Tensor:
    """The input photo of each person, ``(n, 3, 32, 32)`` in [-1, 1]."""
    return to_pixels([photo(person, SHOWN) for person in people])


@torch.no_grad()
def shown_subjects(base: BaseModel, people: Sequence[int]) -> list[Subject]:
    """Each person as a subject: the input photo, seen by the bundled recogniser, with `MINIATURE_RECIPE`'s prompts."""
    photos = shown_photos(people)
    trigger, class_prompt = MINIATURE_RECIPE.trigger, MINIATURE_RECIPE.class_prompt
    return [
        Subject(str(person), moments[None], trigger, class_prompt, embedding)
        for person, moments, embedding in zip(
            people, base.encode_photos(photos), DrawnRecogniser().embed(photos), strict=True
        )
    ]


def true_picture(person: int, prompt: str) -> np.ndarray:
    """The true picture for a prompt of `PROMPTS`, drawn like the portraits: ``(32, 32, 3)`` uint8."""
    rng = np.random.default_rng((person, list(PROMPTS).index(prompt), 0xAF))
    return draw(identity(person), replace(random_scene(rng, plain=True), **PROMPTS[prompt][1]))


@dataclass(frozen=True)
class Scores:
    """Scores of ``n`` people.

    Attributes:
        likeness: name in `LIKENESSES` -> prompt -> ``(n,)``; 0 like a stranger's picture, 1 like a true picture of the
            person for that prompt.
        weights: for the same, by prompt: by how much a true picture beats a stranger's; in neon nobody has eyes.
        right: prompt -> ``(n,)``; 1 if its style, place and attire are all right, otherwise 0.
        found: ``(n,)``; 1 if the first prompt's picture is more similar to the person than to any of `GALLERY` - 1
            others, otherwise 0.
        background: ``(n,)``, for the first prompt; 1 is the input photo's own background colour, 0 is as close to it as
            another photo's.
    """

    likeness: dict[str, dict[str, Tensor]]
    weights: dict[str, dict[str, float]]
    right: dict[str, Tensor]
    found: Tensor
    background: Tensor

    @property
    def identities(self) -> dict[str, Tensor]:
        return self.likeness["identity"]

    def by_person(self) -> dict[str, Tensor]:
        """Each person's scores, ``(n,)`` each.

        ``identity`` for the plain prompt and ``identity_prompted`` for the others; ``seen`` and ``unseen``, the
        fractions followed of prompts that could and could not have been learned; ``both``, identity times prompt
        fidelity, picture by picture, for all but the plain one; ``found`` and ``background``.
        """
        prompted = [name for name in self.identities if name != "plain"]
        both = [self.identities[name].clamp(0, 1) * self.right[name] for name in prompted]
        return {
            "identity": self.identities["plain"],
            "identity_prompted": self._mean([self.identities[name] for name in prompted]),
            "seen": self._mean([self.right[name] for name in prompted if name in SEEN]),
            "unseen": self._mean([self.right[name] for name in prompted if name not in SEEN]),
            "both": self._mean(both),
            "found": self.found,
            "background": self.background,
        }

    def attributes(self, prompted: bool = False) -> dict[str, Tensor]:
        """Likeness by attribute, ``(n,)`` each: in the plain picture, or in the others, weighted by `weights`."""
        chosen = [name for name in self.identities if (name != "plain") == prompted]
        found = {}
        for attribute, by_prompt in self.likeness.items():
            if attribute != "identity" and chosen:
                weights = self.weights[attribute]
                shown = sum(by_prompt[name] * weights[name] for name in chosen)
                found[attribute] = shown / sum(weights[name] for name in chosen)
        return found

    def means(self) -> dict[str, float]:
        """The scores of `by_person`, averaged over people."""
        return {name: float(values.mean()) for name, values in self.by_person().items()}

    def _mean(self, values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean(dim=0) if values else torch.full_like(self.background, float("nan"))


class Judge:
    """Scores pictures of people with a measuring network, calibrated on true pictures of one split."""

    def __init__(
        self,
        network: MeasuringNetwork | AttributeNetwork,
        split: str = "validation",
        prompts: Sequence[str] | None = None,
    ) -> None:
        """Calibrate on ``prompts``, names in `PROMPTS` with the plain one first; by default the split's."""
        self.network, self.prompts = network, tuple(split_prompts(split) if prompts is None else prompts)
        people = SPLITS[split][-CALIBRATION_PEOPLE:]
        references = self.references(people)
        self.gallery = Measured(*(part[: GALLERY - 1] for part in references))
        self.true, self.stranger = {}, {}
        for prompt in self.prompts:
            found = measured(self.measure([true_picture(person, prompt) for person in people]))
            pairs = {name: own_and_others(values) for name, values in similarities(found, references).items()}
            self.true[prompt] = {name: own for name, (own, _) in pairs.items()}
            self.stranger[prompt] = {name: others for name, (_, others) in pairs.items()}

    @torch.no_grad()
    def measure(self, images: Sequence[np.ndarray] | Tensor) -> Measurement:
        """Measure uint8 images, or pixels ``(n, 3, 32, 32)`` in [-1, 1]."""
        return self.network(images if isinstance(images, Tensor) else to_pixels(images))

    def references(self, people: Sequence[int]) -> "Measured":
        """The network's output for photos of each person that no fit has seen, on average."""
        shots = [measured(self.measure([photo(person, number) for person in people])) for number in NEVER_SHOWN]
        means = Measured(*(torch.stack(parts).mean(dim=0) for parts in zip(*shots, strict=True)))
        return means._replace(embedding=torch.nn.functional.normalize(means.embedding, dim=1))

    def score(self, pictures: Tensor, people: Sequence[int]) -> Scores:
        """Score pictures ``(n, prompts, 3, 32, 32)`` in [-1, 1], in the order of the judge's prompts."""
        references = self.references(people)
        likeness: dict[str, dict[str, Tensor]] = {}
        weights: dict[str, dict[str, float]] = {}
        right = {}
        found = torch.ones(len(people))
        for prompt, drawn in zip(self.prompts, pictures.unbind(1), strict=True):
            measurement = self.measure(drawn)
            true, stranger = self.true[prompt], self.stranger[prompt]
            for name, values in similarities(measured(measurement), references).items():
                weights.setdefault(name, {})[prompt] = true[name] - stranger[name]
                scaled = (values.diagonal() - stranger[name]) / (true[name] - stranger[name])
                likeness.setdefault(name, {})[prompt] = scaled
            if prompt == self.prompts[0]:
                own = (measurement.embedding * references.embedding).sum(dim=1)
                others = (measurement.embedding @ self.gallery.embedding.T).amax(dim=1)
                found = (own > others).float()
            if asked := PROMPTS[prompt][1]:
                choices = {name: measurement.choice(name) for name in asked}
                obeyed = [all(choices[name][i] == value for name, value in asked.items()) for i in range(len(people))]
                right[prompt] = torch.tensor(obeyed, dtype=torch.float32)
        return Scores(likeness, weights, right, found, _background_copied(pictures[:, 0], shown_photos(people)))


class Measured(NamedTuple):
    """The features by which ``n`` people are compared.

    Attributes:
        embedding: ``(n, 64)``.
        continuous: of `CONTINUOUS_SEEN`, ``(n, attributes)``.
        choices: probabilities of `CHOICES_SEEN`, one after the other, ``(n, choices)``.
    """

    embedding: Tensor
    continuous: Tensor
    choices: Tensor


def measured(found: Measurement) -> Measured:
    """The features of a measurement, to compare with those of another picture."""
    return Measured(
        found.embedding,
        torch.stack([found.continuous[name] for name in CONTINUOUS_SEEN], dim=1),
        torch.cat([found.logits[name].softmax(dim=1) for name in CHOICES_SEEN], dim=1),
    )


def similarities(found: Measured, references: Measured) -> dict[str, Tensor]:
    """Similarity of ``n`` pictures and ``m`` people, ``(n, m)`` for each of `LIKENESSES`.

    The cosine of embeddings; minus the distance of continuous attributes; the probability of the same choice.
    """
    result = {"identity": found.embedding @ references.embedding.T}
    pairs = zip(found.continuous.unbind(1), references.continuous.unbind(1), strict=True)
    for name, (ours, theirs) in zip(CONTINUOUS_SEEN, pairs, strict=True):
        result[name] = -(ours[:, None] - theirs[None]).abs()
    sizes = [len(CHOICES[name]) for name in CHOICES_SEEN]
    pairs = zip(found.choices.split(sizes, dim=1), references.choices.split(sizes, dim=1), strict=True)
    for name, (ours, theirs) in zip(CHOICES_SEEN, pairs, strict=True):
        result[name] = ours @ theirs.T
    return result


def own_and_others(similarity: Tensor) -> tuple[float, float]:
    """Means of similarities ``(n, n)``: on the diagonal, each person with themselves, and off it."""
    count, own = len(similarity), similarity.diagonal().sum()
    return float(own / count), float((similarity.sum() - own) / (count * (count - 1)))


def spread(samples: Tensor, people: Sequence[int], network: AttributeNetwork) -> dict[str, Tensor]:
    """How much pictures of one person vary, ``(n,)`` each: 1 is as much as true photos of them, 0 not at all.

    Args:
        samples: pictures of each person for one plain prompt, ``(n, samples, 3, 32, 32)`` in [-1, 1].

    Returns:
        ``pose`` (turned, tilted, moved), ``zoom`` and ``background`` (its colour).
    """
    numbers = range(SAMPLED_PHOTOS, SAMPLED_PHOTOS + samples.shape[1])
    photos = torch.stack([to_pixels([photo(person, number) for number in numbers]) for person in people])
    found, true = _variation(samples, network), _variation(photos, network)
    return {name: values / true[name].mean() for name, values in found.items()}


@torch.no_grad()
def _variation(pictures: Tensor, network: AttributeNetwork) -> dict[str, Tensor]:
    found = network(pictures.flatten(0, 1)).pose
    turned = {name: values.view(pictures.shape[:2]).std(dim=1) for name, values in found.items()}
    zoom = turned.pop("zoom")
    colours = _corners(pictures.flatten(0, 1)).view(*pictures.shape[:2], -1)
    return {"pose": torch.stack(list(turned.values())).mean(dim=0), "zoom": zoom,
            "background": colours.std(dim=1).norm(dim=1)}  # fmt: skip


def _corners(pixels: Tensor) -> Tensor:
    return torch.cat([pixels[:, :, :4, :3], pixels[:, :, :4, -3:]], dim=3).mean(dim=(2, 3))


def _background_copied(pictures: Tensor, shown: Tensor) -> Tensor:
    """1 if the upper corners have the input photo's colour, 0 if they are as different as another photo's."""
    distance = (_corners(pictures) - _corners(shown)).norm(dim=1)
    return 1 - distance / TYPICAL_COLOUR_DISTANCE


@torch.no_grad()
def draw_prompts(
    base: BaseModel,
    space: LiDBSpace,
    factors: Sequence[LoraFactors] | None,
    num_people: int,
    token: str = "sks",
    seed: int = 0,
    num_steps: int = 15,
    guidance: float = 3.0,
    prompts: Sequence[str] = (PROMPTS["plain"][0],),
    first: int = 0,
) -> Tensor:
    """Draw every prompt for every person, all in one batch: pixels ``(n, prompts, 3, h, w)`` in [-1, 1].

    Args:
        factors: each person's weights; None draws with the base.
        first: people before these; makes each person's noise independent of how many are drawn at once.
    """
    texts = [prompt.replace("[V]", token) for prompt in prompts] * num_people
    start = seed * 1_000_003 + first * len(prompts)
    noise = [torch.Generator().manual_seed(start + i) for i in range(len(texts))]
    with space.apply(_stacked(factors)) if factors is not None else nullcontext():
        asked = base.encode_prompts(base.prepare_prompts(texts)).prompt_embeds
        nothing = base.encode_prompts(base.prepare_prompts([""] * len(texts))).prompt_embeds
    # Guidance puts all negative prompts before all positive ones, so the UNet sees the people twice.
    with space.apply(_stacked([*factors, *factors])) if factors is not None else nullcontext():
        latents = base.pipeline()(
            prompt_embeds=asked, negative_prompt_embeds=nothing, num_inference_steps=num_steps,
            guidance_scale=guidance, height=base.size_px, width=base.size_px, generator=noise, output_type="latent",
        ).images  # fmt: skip
    parts = (latents / base.vae.config.scaling_factor).split(64)
    pixels = torch.cat([base.vae.decode(part.to(base.vae.dtype)).sample.float() for part in parts])
    return pixels.clamp(-1, 1).unflatten(0, (num_people, len(prompts)))


def _stacked(people: Sequence[LoraFactors]) -> LoraFactors:
    return {
        name: tuple(torch.stack([person[name][half] for person in people]) for half in (0, 1)) for name in people[0]
    }
