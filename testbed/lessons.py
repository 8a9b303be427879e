"""Trains the miniature's hypernetwork on people in prompts: the drawn world has a true picture for every prompt.

In each step, the hypernetwork sees one photo of each of eight people. The loss is on denoising another plain photo and
a new picture of a prompt whose words may be seen (`testbed.prompts`); for half of the people, the change made by one of
many prompts is preserved (`hypernet.fitting.preservation`). The text encoder is not adapted, so prompts are encoded
once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hypernet.base_models.base import BaseModel, PromptEmbeds
from hypernet.fitting.losses import HEAD_HALF_HEIGHT, HEAD_HALF_WIDTH
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from lidb_peft import LiDBSpace
from lidb_peft.stacks import Stacks
from testbed import MINIATURE_RECIPE
from testbed.drawing import draw
from testbed.likeness import Likeness
from testbed.measuring import to_pixels
from testbed.portraits import SPLITS, Identity, Scene, identity, random_scene
from testbed.prompts import prompt_text, scene_to_learn, template_bank
from testbed.trainer import step_generator

PEOPLE = 8
COPIES = 2  # noisy copies of each picture
PRESERVED = PEOPLE // 2
MOST_PLAIN = 700  # plain photos are denoised below this timestep: eyes and jaws do not show in more noise
BACKGROUND = (0.0, 0.5)  # its weight in plain photos, and in pictures of a prompt
INNER = (0.56, 0.45, 0.1, 2.5)  # eyes to mouth: half width, half height and centre in halves of the picture; weight
LIKENESS = 0.01  # weight of the loss on drawn pictures
STAGE = 77  # of the noise


def loss_weights(side: int, background: float) -> Tensor:
    """Weight of each latent in the loss, ``(side, side)`` with mean 1: the inner face weighs more than the head."""
    line = torch.linspace(-1, 1, 2 * side + 1)[1::2]
    y, x = torch.meshgrid(line, line, indexing="ij")
    width, height, centre, weight = INNER
    is_head = (x / HEAD_HALF_WIDTH) ** 2 + (y / HEAD_HALF_HEIGHT) ** 2 < 1
    is_inner = (x / width) ** 2 + ((y - centre) / height) ** 2 < 1
    weights = torch.where(is_head, 1.0, background) + (weight - 1) * is_inner
    return weights / weights.mean()


def without_text_encoder(network: HyperNetwork, space: LiDBSpace) -> HyperNetwork:
    """The same hypernetwork, for the layers of ``space`` only."""
    config = network.config
    names = [name for name, *_ in config.layers]
    rows = torch.tensor([names.index(name) for name in space.layer_names])
    kept = ("prompt", "token", "train_encoder", "learned_bases", "k", "hidden_size", "num_hidden_layers",
            "num_attention_heads", "image_size", "image_mean", "image_std")  # fmt: skip
    options = {name: getattr(config, name) for name in kept}
    smaller = HyperNetwork(HyperNetworkConfig.for_space(space, config.encoder, "testbed", **options))
    by_layer = ("heads.weight", "heads.bias", "layer_positions", "theta_0", "mask")
    smaller.load_state_dict({k: v[rows] if k in by_layer else v for k, v in network.state_dict().items()})
    return smaller


@dataclass(frozen=True)
class Lesson:
    """The pictures of one step, of ``n`` people: the input photo, another plain photo, and a picture of a prompt.

    Attributes:
        shown: the input photos, pixels ``(n, 3, 32, 32)`` in [-1, 1].
        plain, prompted: the others, uint8 ``(32, 32, 3)`` each.
        prompts: prompts of ``prompted``, with the trigger.
    """

    step: int
    people: list[Identity]
    shown: Tensor
    plain: list[np.ndarray]
    scenes: list[Scene]
    prompted: list[np.ndarray]
    prompts: list[str]
    rng: np.random.Generator
    generator: torch.Generator


Parts = Callable[[slice], Sequence[Stacks]]
"""Called with rows of a lesson's people; returns the adapters of these people."""


class Lessons:
    """Step number -> loss."""

    def __init__(
        self,
        base: BaseModel,
        space: LiDBSpace,
        network: HyperNetwork | None = None,
        seed: int = 0,
        likeness: Likeness | None = None,
        likeness_from: int = 0,
        one_copy_from: float = math.inf,
        preservation: float = 1.0,
        start: Tensor | None = None,
    ) -> None:
        """Train ``network``, or with None whatever `loss` is called with.

        Args:
            seed: random seed of the people, their pictures and the noise.
            likeness: the loss on pictures that predictions draw, used from step ``likeness_from`` on.
            one_copy_from: from this step on, there is one noisy copy of each picture instead of `COPIES`, which saves a
                fifth of the time.
            preservation: weight of what prompts are to go on changing.
            start: flat LoRA of the recipe's rank beside everybody's predictions, which may be trained too.
        """
        self.base, self.space, self.network, self.seed = base, space, network, seed
        self.likeness, self.likeness_from, self.one_copy_from = likeness, likeness_from, one_copy_from
        self.preservation, self.start = preservation, start
        self.templates = template_bank()
        side = base.latent_shape[-1]
        self.weights = torch.stack([loss_weights(side, background) for background in BACKGROUND])
        self.encoded = cache(self._encode)

    def __call__(self, step: int) -> Tensor:
        """The loss: denoising plain photos and pictures of prompts, prompt preservation, likeness."""
        assert self.network is not None
        lesson = self.draw(step)
        theta, bases = self.network(lesson.shown), self.network.bases

        def parts(rows: slice) -> list[Stacks]:
            predicted = [self.space.expand(theta[rows], bases)]
            if self.start is None:
                return predicted
            start = self.start.expand(len(theta[rows]), -1)
            return [*predicted, self.space.split_lora(start, MINIATURE_RECIPE.rank)]

        return self.loss(lesson, parts)

    def draw(self, step: int) -> Lesson:
        """The pictures of a step."""
        rng = np.random.default_rng((step, 0x1E55 + self.seed))
        seeds = rng.integers(SPLITS["train"].start, SPLITS["train"].stop, PEOPLE)
        people = [identity(int(seed)) for seed in seeds]
        shown, plain = ([draw(who, random_scene(rng, plain=True)) for who in people] for _ in range(2))
        scenes = [scene_to_learn(rng) for _ in people]
        prompted = [draw(who, scene) for who, scene in zip(people, scenes, strict=True)]
        trigger = MINIATURE_RECIPE.trigger
        prompts = [prompt_text(scene, trigger, says_photo=bool(rng.random() < 0.3)) for scene in scenes]
        generator = step_generator(STAGE + self.seed, step)
        return Lesson(step, people, to_pixels(shown), plain, scenes, prompted, prompts, rng, generator)

    def loss(self, lesson: Lesson, parts: Parts) -> Tensor:
        """The loss of a lesson's people, with the adapters ``parts``."""
        # Person by person, kind by kind, copy by copy.
        generator, copies = lesson.generator, 1 if lesson.step >= self.one_copy_from else COPIES
        latents = self._latents([*lesson.plain, *lesson.prompted], generator).unflatten(0, (2, PEOPLE)).transpose(0, 1)
        latents = latents[:, :, None].expand(-1, -1, copies, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=generator)
        positions = (torch.arange(copies) + torch.rand(PEOPLE, 2, copies, generator=generator)) / copies
        timesteps = torch.stack([self.base.timesteps(positions[:, 0], MOST_PLAIN),
                                 self.base.timesteps(positions[:, 1], 1000)], dim=1)  # fmt: skip
        trigger = self._told([MINIATURE_RECIPE.trigger] * PEOPLE)
        asked = torch.stack([trigger, self._told(lesson.prompts)], dim=1)[:, :, None]
        asked = asked.expand(-1, -1, copies, -1, -1)
        flat = latents.flatten(0, 2), noise.flatten(0, 2), timesteps.flatten()
        noisy, target = (ask(*flat).view(latents.shape) for ask in (self.base.add_noise, self.base.target))
        with self.space.apply(*parts(slice(None))):
            found = self._denoise(noisy.flatten(0, 2), flat[2], asked.flatten(0, 2)).view(latents.shape)
        errors = ((found - target).square() * self.weights[:, None, None]).mean(dim=(0, 2, 3, 4, 5))
        loss = errors.sum() + self.preservation * self._change(lesson, parts, noisy[:, 0], timesteps[:, 0], found[:, 0])
        if self.likeness is None or lesson.step < self.likeness_from:
            return loss
        return loss + LIKENESS * self._likeness(lesson, parts)

    def _change(self, lesson: Lesson, parts: Parts, noisy: Tensor, timesteps: Tensor, found: Tensor) -> Tensor:
        """Prompt preservation for half of the people, alternating, on one noisy copy of their plain photo."""
        rows = slice(lesson.step % 2 * PRESERVED, (lesson.step % 2 + 1) * PRESERVED)
        copy = int(torch.randint(noisy.shape[1], (), generator=lesson.generator))
        chosen = [self.templates[i] for i in lesson.rng.integers(len(self.templates), size=PRESERVED)]
        noisy, timesteps, found = (values[rows, copy] for values in (noisy, timesteps, found))
        noun = MINIATURE_RECIPE.class_prompt
        with torch.no_grad():
            told = self._told([*[noun] * PRESERVED, *(template.format(noun) for template in chosen)])
            before, after = self._denoise(torch.cat([noisy] * 2), torch.cat([timesteps] * 2), told).chunk(2)
        with self.space.apply(*parts(rows)):
            told = self._told([template.format(MINIATURE_RECIPE.trigger) for template in chosen])
            styled = self._denoise(noisy, timesteps, told)
        return (styled - (found.detach() + after - before)).square().mean()

    def _likeness(self, lesson: Lesson, parts: Parts) -> Tensor:
        """The likeness loss: half of the people, alternating, with the plain prompt, the others with their own."""
        by_prompt = [(row + lesson.step) % 2 == 1 for row in range(PEOPLE)]
        scenes = [scene if yes else Scene() for yes, scene in zip(by_prompt, lesson.scenes, strict=True)]
        trigger = MINIATURE_RECIPE.trigger
        asked = [prompt if yes else trigger for yes, prompt in zip(by_prompt, lesson.prompts, strict=True)]
        assert self.likeness is not None
        return self.likeness(
            parts(slice(None)), self._told(asked), lesson.people, scenes, to_pixels(lesson.plain), lesson.generator
        )

    def _denoise(self, noisy: Tensor, timesteps: Tensor, told: Tensor) -> Tensor:
        return self.base.denoise(noisy, timesteps, PromptEmbeds(told))

    @torch.no_grad()
    def _latents(self, images: Sequence[np.ndarray], generator: torch.Generator) -> Tensor:
        moments = self.base.vae.encode(to_pixels(images)).latent_dist.parameters
        noise = torch.randn(moments.chunk(2, dim=1)[0].shape, generator=generator)
        return self.base.sample_latents(moments, noise)

    def _told(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self.encoded(text) for text in texts])

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        return self.base.encode_prompts(self.base.prepare_prompts([text])).prompt_embeds[0]
