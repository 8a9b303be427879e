"""How well pictures show a person and follow their prompt: the measurement that all experiments on the miniature share.

A person is judged by photos that were never shown: a memorised background, pose or shirt earns nothing.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hypernet.bases.base import BaseModel
from hypernet.fitting.engine import Subject
from lidb_peft import LiDBSpace, LoraFactors
from testbed import MINIATURE_RECIPE
from testbed.drawing import draw
from testbed.measuring import Measurement, MeasuringNetwork, to_pixels
from testbed.portraits import SPLITS, Scene, identity, random_scene

PROMPTS = {
    "plain": ("a [V] face", {}),
    "pencil": ("a pencil drawing of a [V] face", {"style": "pencil"}),
    "pixel": ("pixel art of a [V] face", {"style": "pixel"}),
    "neon": ("a neon sign of a [V] face", {"style": "neon"}),
    "watercolour": ("a watercolour painting of a [V] face", {"style": "watercolour"}),
    "cartoon": ("a cartoon of a [V] face", {"style": "cartoon"}),
    "night": ("a [V] face at night", {"place": "night"}),
    "beach": ("a [V] face on a beach", {"place": "beach"}),
    "forest": ("a [V] face in a forest", {"place": "forest"}),
    "city": ("a [V] face in a city", {"place": "city"}),
    "snow": ("a [V] face in the snow", {"place": "snow"}),
    "hat": ("a [V] face wearing a hat", {"attire": "hat"}),
    "scarf": ("a [V] face wearing a scarf", {"attire": "scarf"}),
    "crown": ("a [V] face wearing a crown", {"attire": "crown"}),
    "headphones": ("a [V] face wearing headphones", {"attire": "headphones"}),
}
"""Name -> prompt, and what of the scene it asks for."""

SHOWN, NEVER_SHOWN = 0, (1, 2, 3)
CALIBRATION_PEOPLE = 100
TYPICAL_COLOUR_DISTANCE = 0.70  # of the backgrounds of two random plain photos, colours in [-1, 1]


def photo_scene(person: int, number: int) -> Scene:
    """How plain photo ``number`` shows the identity with seed ``person``."""
    return random_scene(np.random.default_rng((person, number, 0xF0)), plain=True)


def photo(person: int, number: int) -> np.ndarray:
    """Plain photo ``number`` of the identity with seed ``person``: ``(32, 32, 3)`` uint8."""
    return draw(identity(person), photo_scene(person, number))


def shown_photos(people: Sequence[int]) -> Tensor:
    """The photo of each person that fits are shown, ``(n, 3, 32, 32)`` in [-1, 1]."""
    return to_pixels([photo(person, SHOWN) for person in people])


def shown_subjects(base: BaseModel, people: Sequence[int]) -> list[Subject]:
    """Each person as a subject on the shown photo, with the prompts of `MINIATURE_RECIPE`."""
    moments = base.encode_photos(shown_photos(people))
    trigger, class_prompt = MINIATURE_RECIPE.trigger, MINIATURE_RECIPE.class_prompt
    return [Subject(str(person), m[None], trigger, class_prompt) for person, m in zip(people, moments, strict=True)]


def true_picture(person: int, prompt: str) -> np.ndarray:
    """What a prompt of `PROMPTS` asks for, drawn by the portraits' own program: ``(32, 32, 3)`` uint8."""
    rng = np.random.default_rng((person, list(PROMPTS).index(prompt), 0xAF))
    return draw(identity(person), replace(random_scene(rng, plain=True), **PROMPTS[prompt][1]))


@dataclass(frozen=True)
class Scores:
    """Scores of ``n`` people.

    Attributes:
        identities: prompt -> ``(n,)``; 0 like a stranger's picture, 1 like a true picture of the person by that prompt.
        right: prompt -> ``(n,)``; 1 where the style, place or attire asked for is there, otherwise 0.
        background: ``(n,)``, of the first prompt; 1 the shown photo's own background colour, 0 as near to it as that of
            another photo.
    """

    identities: dict[str, Tensor]
    right: dict[str, Tensor]
    background: Tensor

    def by_person(self) -> dict[str, Tensor]:
        """Each person's identity by the plain prompt and by the others, share of styles and of scenes (place, attire)
        obeyed, prompt fidelity (the mean of both) and background, ``(n,)`` each."""
        styles = [values for name, values in self.right.items() if "style" in PROMPTS[name][1]]
        scenes = [values for name, values in self.right.items() if "style" not in PROMPTS[name][1]]
        prompted = [values for name, values in self.identities.items() if name != "plain"]
        style, scene = torch.stack(styles).mean(dim=0), torch.stack(scenes).mean(dim=0)
        return {
            "identity": self.identities["plain"],
            "identity_prompted": torch.stack(prompted).mean(dim=0),
            "style": style,
            "scene": scene,
            "prompt": (style + scene) / 2,
            "background": self.background,
        }

    def means(self) -> dict[str, float]:
        """What `by_person` gives, averaged over people."""
        return {name: float(values.mean()) for name, values in self.by_person().items()}


class Judge:
    """Scores pictures of people by the measuring network, calibrated on true pictures of one split."""

    def __init__(
        self, network: MeasuringNetwork, split: str = "validation", prompts: Sequence[str] = tuple(PROMPTS)
    ) -> None:
        self.network, self.prompts = network, tuple(prompts)
        people = SPLITS[split][-CALIBRATION_PEOPLE:]
        references = self.references(people)
        self.stranger, self.true = {}, {}
        for prompt in self.prompts:
            embedding = self.measure([true_picture(person, prompt) for person in people]).embedding
            self.true[prompt], self.stranger[prompt] = own_and_others(embedding @ references.T)

    @torch.no_grad()
    def measure(self, images: Sequence[np.ndarray] | Tensor) -> Measurement:
        """Measure uint8 images, or pixels ``(n, 3, 32, 32)`` in [-1, 1]."""
        return self.network(images if isinstance(images, Tensor) else to_pixels(images))

    def references(self, people: Sequence[int]) -> Tensor:
        """Mean embedding ``(n, 64)`` of photos of each person that are never shown to a fit."""
        shots = [self.measure([photo(person, number) for person in people]).embedding for number in NEVER_SHOWN]
        return torch.nn.functional.normalize(torch.stack(shots).mean(dim=0), dim=1)

    def identity(self, embedding: Tensor, references: Tensor, prompt: str) -> Tensor:
        """Identity ``(n,)`` of a prompt's pictures, by the people's `references`: 0 a stranger's, 1 a true one."""
        similarity = (embedding * references).sum(dim=1)
        return (similarity - self.stranger[prompt]) / (self.true[prompt] - self.stranger[prompt])

    def score(self, pictures: Tensor, people: Sequence[int]) -> Scores:
        """Score pictures ``(n, prompts, 3, 32, 32)`` in [-1, 1], in the order of the judge's prompts."""
        references = self.references(people)
        identities, right = {}, {}
        for name, drawn in zip(self.prompts, pictures.unbind(1), strict=True):
            found = self.measure(drawn)
            identities[name] = self.identity(found.embedding, references, name)
            for attribute, value in PROMPTS[name][1].items():
                right[name] = torch.tensor([float(choice == value) for choice in found.choice(attribute)])
        return Scores(identities, right, _background_copied(pictures[:, 0], shown_photos(people)))


def own_and_others(similarity: Tensor) -> tuple[float, float]:
    """Mean of similarities ``(n, n)`` on the diagonal, of each person with themselves, and of those beside it."""
    count, own = len(similarity), similarity.diagonal().sum()
    return float(own / count), float((similarity.sum() - own) / (count * (count - 1)))


def _background_copied(pictures: Tensor, shown: Tensor) -> Tensor:
    """1 where the upper corners have the shown photo's colour, 0 where they are as far off as another photo's."""

    def corners(pixels: Tensor) -> Tensor:
        return torch.cat([pixels[:, :, :4, :3], pixels[:, :, :4, -3:]], dim=3).mean(dim=(2, 3))

    distance = (corners(pictures) - corners(shown)).norm(dim=1)
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
    prompts: Sequence[str] = tuple(prompt for prompt, _ in PROMPTS.values()),
    first: int = 0,
) -> Tensor:
    """Draw every prompt for every person, all in one batch: pixels ``(n, prompts, 3, h, w)`` in [-1, 1].

    Args:
        factors: each person's weights; None draws with the base.
        first: how many people come before these: each has noise of their own, however many are drawn at once.
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
