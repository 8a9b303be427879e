"""What is random in a step, drawn person by person, and the noisy latents that are made with it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hypernet.base_models.base import BaseModel
from hypernet.recipe import NUM_TIMESTEPS


class Noise(NamedTuple):
    """What is random in the noisy latents of a step, for B people with k copies each.

    Attributes:
        latent: with it the latents are drawn from the VAE's moments, ``(B * k, c, h, w)``.
        added: what is added to them, same shape.
        timesteps: ``(B * k,)``.
    """

    latent: Tensor
    added: Tensor
    timesteps: Tensor

    def to(self, device: torch.device) -> "Noise":
        return Noise(*(tensor.to(device) for tensor in self))


def draw_noise(
    base: BaseModel,
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    max_timestep: int = NUM_TIMESTEPS,
) -> Noise:
    """Draw noise on the CPU, so that every device draws the same, person by person.

    The timesteps of one person's k copies are stratified, so that every step sees all of the schedule below
    ``max_timestep``.

    Args:
        shape: of the photos' moments, ``(B * k, 2 * c, h, w)``.
        generators: each person's own, B of them.
    """
    copies = shape[0] // len(generators)
    size = (copies, shape[1] // 2, *shape[2:])
    latent, added, timesteps = [], [], []
    for generator in generators:
        latent.append(torch.randn(size, generator=generator))
        added.append(torch.randn(size, generator=generator))
        positions = (torch.arange(copies) + torch.rand(copies, generator=generator)) / copies
        timesteps.append(base.timesteps(positions, max_timestep))
    return Noise(torch.cat(latent), torch.cat(added), torch.cat(timesteps))


def noise_photos(base: BaseModel, moments: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """The noisy latents of photos and the target of each, ``(B * k, c, h, w)``.

    Args:
        moments: ``(B * k, 2 * c, h, w)``, on the device of ``noise``.
    """
    latents = base.sample_latents(moments, noise.latent)
    return base.add_noise(latents, noise.added, noise.timesteps), base.target(latents, noise.added, noise.timesteps)
