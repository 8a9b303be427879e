"""What the miniature's hypernetwork learns of people in prompts: the drawn world has a true picture for every prompt.

In each step, of each of eight people one photo is shown. Denoised are another plain photo, and a picture by a prompt of
words that may be seen (`testbed.prompts`), drawn anew each time; and half of the people keep what a prompt of a large
bank changes (`hypernet.fitting.preservation`). The text encoder is not adapted, so that prompts are encoded once.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hypernet.bases.base import BaseModel, PromptEmbeds
from hypernet.fitting.losses import HEAD_HALF_HEIGHT, HEAD_HALF_WIDTH
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from lidb_peft import LiDBSpace
from testbed import MINIATURE_RECIPE
from testbed.drawing import draw
from testbed.measuring import to_pixels
from testbed.portraits import SPLITS, identity, random_scene
from testbed.prompts import prompt_text, scene_to_learn, template_bank
from testbed.trainer import step_generator

PEOPLE = 8
COPIES = 2  # noisy ones of each picture
PRESERVED = PEOPLE // 2
MOST_PLAIN = 700  # plain photos are denoised below this timestep: eyes and jaws do not show in more noise
BACKGROUND = (0.0, 0.5)  # what it counts in plain photos, and in pictures by a prompt
INNER = (0.56, 0.45, 0.1, 2.5)  # eyes to mouth: half width, half height and centre in halves of the picture; weight
STAGE = 77  # of the noise


def loss_weights(side: int, background: float) -> Tensor:
    """How much each latent counts, ``(side, side)`` of mean 1: the head 1, the inner face more."""
    line = torch.linspace(-1, 1, 2 * side + 1)[1::2]
    y, x = torch.meshgrid(line, line, indexing="ij")
    width, height, centre, weight = INNER
    is_head = (x / HEAD_HALF_WIDTH) ** 2 + (y / HEAD_HALF_HEIGHT) ** 2 < 1
    is_inner = (x / width) ** 2 + ((y - centre) / height) ** 2 < 1
    weights = torch.where(is_head, 1.0, background) + (weight - 1) * is_inner
    return weights / weights.mean()


def without_text_encoder(network: HyperNetwork, space: LiDBSpace) -> HyperNetwork:
    """The same hypernetwork, of the layers of ``space`` only."""
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


class Lessons:
    """The loss of each step, by its number."""

    def __init__(self, base: BaseModel, space: LiDBSpace, network: HyperNetwork) -> None:
        self.base, self.space, self.network = base, space, network
        self.templates = template_bank()
        side = base.latent_shape[-1]
        self.weights = torch.stack([loss_weights(side, background) for background in BACKGROUND])
        self.encoded = cache(self._encode)

    def __call__(self, step: int) -> Tensor:
        """The loss: denoising plain photos and pictures by prompts, and what prompts are to go on changing."""
        rng, generator = np.random.default_rng((step, 0x1E55)), step_generator(STAGE, step)
        seeds = rng.integers(SPLITS["train"].start, SPLITS["train"].stop, PEOPLE)
        people = [identity(int(seed)) for seed in seeds]
        seen, plain = ([draw(who, random_scene(rng, plain=True)) for who in people] for _ in range(2))
        scenes = [scene_to_learn(rng) for _ in people]
        prompted = [draw(who, scene) for who, scene in zip(people, scenes, strict=True)]
        trigger = MINIATURE_RECIPE.trigger
        prompts = [prompt_text(scene, trigger, says_photo=bool(rng.random() < 0.3)) for scene in scenes]

        # Person by person, kind by kind, copy by copy.
        latents = self._latents([*plain, *prompted], generator).unflatten(0, (2, PEOPLE)).transpose(0, 1)
        latents = latents[:, :, None].expand(-1, -1, COPIES, -1, -1, -1)
        noise = torch.randn(latents.shape, generator=generator)
        positions = (torch.arange(COPIES) + torch.rand(PEOPLE, 2, COPIES, generator=generator)) / COPIES
        timesteps = torch.stack([self.base.timesteps(positions[:, 0], MOST_PLAIN),
                                 self.base.timesteps(positions[:, 1], 1000)], dim=1)  # fmt: skip
        asked = torch.stack([self._told([trigger] * PEOPLE), self._told(prompts)], dim=1)[:, :, None]
        asked = asked.expand(-1, -1, COPIES, -1, -1)
        flat = latents.flatten(0, 2), noise.flatten(0, 2), timesteps.flatten()
        noisy, target = (ask(*flat).view(latents.shape) for ask in (self.base.add_noise, self.base.target))

        theta = self.network(to_pixels(seen))
        with self.space.apply(self.space.expand(theta, self.network.bases)):
            found = self._denoise(noisy.flatten(0, 2), flat[2], asked.flatten(0, 2)).view(latents.shape)
        errors = ((found - target).square() * self.weights[:, None, None]).mean(dim=(0, 2, 3, 4, 5))
        return errors.sum() + self._change(step, theta, noisy[:, 0], timesteps[:, 0], found[:, 0], rng, generator)

    def _change(self, step, theta, noisy, timesteps, found, rng, generator) -> Tensor:
        """Prompt preservation of half of the people, in turn, at one noisy copy of their plain photo."""
        rows = slice(step % 2 * PRESERVED, (step % 2 + 1) * PRESERVED)
        copy = int(torch.randint(COPIES, (), generator=generator))
        chosen = [self.templates[i] for i in rng.integers(len(self.templates), size=PRESERVED)]
        noisy, timesteps, found = (values[rows, copy] for values in (noisy, timesteps, found))
        noun = MINIATURE_RECIPE.class_prompt
        with torch.no_grad():
            told = self._told([*[noun] * PRESERVED, *(template.format(noun) for template in chosen)])
            before, after = self._denoise(torch.cat([noisy] * 2), torch.cat([timesteps] * 2), told).chunk(2)
        with self.space.apply(self.space.expand(theta[rows], self.network.bases)):
            told = self._told([template.format(MINIATURE_RECIPE.trigger) for template in chosen])
            styled = self._denoise(noisy, timesteps, told)
        return (styled - (found.detach() + after - before)).square().mean()

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
