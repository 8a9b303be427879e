"""A loss on pictures that the hypernetwork's predictions draw: who is in them, and whether they follow the prompt.

The denoising loss hardly rewards eye spacing or the shape of a jaw. So pictures are sampled from noise, with guidance,
as users do, up to a random step; there the finished picture is predicted, decoded, and read by a network that
recognises attributes by name (like ReFL, arXiv:2304.05977, and PuLID, arXiv:2404.16022; only the last step is
differentiated). That network is neither of the measuring networks: it was trained on the training split's people, with
words that may be seen, and half of its pictures were half denoised.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hypernet.base_models.base import BaseModel, PromptEmbeds
from hypernet.fitting.likeness import STEPS, half_drawn
from lidb_peft import LiDBSpace
from lidb_peft.stacks import Stacks
from testbed import MINIATURE_RECIPE
from testbed.measuring import (
    RECOGNISER_WIDTH,
    Measurement,
    MeasuringNetwork,
    labels,
    residual_trunk,
    to_images,
    to_pixels,
)
from testbed.measuring_training import SHOTS, attribute_loss, draw_labelled, train_to_tell_people
from testbed.portraits import SPLITS, Identity, Scene, random_scene
from testbed.prompts import scene_to_learn
from testbed.trainer import Run, fixed_initialisation, step_generator

HALF_DENOISED = (20, 400)  # timesteps of its pictures
FIRST_STOP = 3  # of a drawing's steps
GUIDANCE = MINIATURE_RECIPE.guidance
CONTINUOUS_WEIGHT = 30.0  # about the network's errors on true pictures
SAME_FACE = 4.0  # weight of the cosine of embeddings, relative to attributes
STAGE = 80


@dataclass(frozen=True)
class RecogniserStage:
    """A training of a network that recognises people.

    Attributes:
        name: of its files.
        people: of the training split.
        noise: largest standard deviation of noise added to pixels.
    """

    name: str
    people: int
    steps: int
    noise: float


def train_recogniser(run: Run, base: BaseModel, stage: RecogniserStage) -> MeasuringNetwork:
    """Train a network that reads pictures in training."""
    batches = iter(range(stage.people))

    def scenes_of(seed: int) -> list[Scene]:
        rng = np.random.default_rng((seed, 0xEC))
        return [random_scene(rng, plain=True) if shot % 2 == 0 else scene_to_learn(rng) for shot in range(SHOTS)]

    @torch.no_grad()
    def half_denoised(images: np.ndarray) -> np.ndarray:
        generator = step_generator(STAGE, next(batches))
        moments = base.vae.encode(to_pixels(images[:, 2:].reshape(-1, *images.shape[-3:]))).latent_dist.parameters
        first, second = (torch.randn(moments.chunk(2, dim=1)[0].shape, generator=generator) for _ in range(2))
        latents = base.sample_latents(moments, first)
        timesteps = torch.randint(*HALF_DENOISED, (len(latents),), generator=generator)
        noisy = base.add_noise(latents, second, timesteps)
        asked = base.encode_prompts(base.prepare_prompts([MINIATURE_RECIPE.class_prompt])).prompt_embeds
        velocity = base.denoise(noisy, timesteps, PromptEmbeds(asked.expand(len(noisy), -1, -1)))
        output = to_images(base.decode_latents(base.finished(noisy, velocity, timesteps)[0]))
        return np.concatenate([images[:, :2], output.reshape(-1, 2, *images.shape[-3:])], axis=1)

    people = draw_labelled(run.out, stage.name, SPLITS["train"][-stage.people :], scenes_of, half_denoised)
    with fixed_initialisation():
        network = MeasuringNetwork(residual_trunk(RECOGNISER_WIDTH), RECOGNISER_WIDTH)
    train_to_tell_people(stage.name, run, network, people, stage.steps, stage.noise)
    return network.eval().requires_grad_(False)


class Likeness:
    """The loss of pictures drawn with predictions."""

    def __init__(
        self, base: BaseModel, space: LiDBSpace, recogniser: MeasuringNetwork, first_stop: int = FIRST_STOP
    ) -> None:
        """Read pictures with ``recogniser``, finished at step ``first_stop`` of a drawing or later."""
        self.base, self.space, self.recogniser, self.first_stop = base, space, recogniser, first_stop

    def __call__(
        self,
        parts: Sequence[Stacks],
        asked: Tensor,
        people: Sequence[Identity],
        scenes: Sequence[Scene],
        photos: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """The loss on a picture of each of ``n`` people.

        Args:
            parts: the adapters of these people.
            asked: embeddings of the prompts, ``(n, tokens, width)``, one for each scene.
            photos: true photos, ``(n, 3, 32, 32)``, other than the input photos.
        """
        stop = int(torch.randint(self.first_stop, STEPS, (), generator=generator))
        noise = torch.randn((len(asked), *self.base.latent_shape), generator=generator)
        with self.space.apply(*parts):
            latents = half_drawn(self.base, noise, PromptEmbeds(asked), stop, GUIDANCE)
        return self._read(self.recogniser(self.base.decode_latents(latents)), people, scenes, photos)

    def _read(self, found: Measurement, people, scenes, photos: Tensor) -> Tensor:
        right = [labels(who, scene) for who, scene in zip(people, scenes, strict=True)]
        continuous, choices = (torch.from_numpy(np.stack(part)) for part in zip(*right, strict=True))
        with torch.no_grad():
            own = self.recogniser(photos).embedding
        same = (found.embedding * own).sum(dim=1).mean()
        return attribute_loss(found, continuous, choices, CONTINUOUS_WEIGHT) + SAME_FACE * (1 - same)
