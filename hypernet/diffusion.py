"""Denoising: what a base model is asked to predict, and how far off it is, sample by sample."""

from functools import lru_cache

import torch
from torch import Tensor

from hypernet.base_models import BaseModel, PromptEmbeds

# Of a portrait as `prepare_photo` crops it, in halves of the picture.
HEAD_HALF_WIDTH, HEAD_HALF_HEIGHT = 0.725, 0.9


def add_noise(clean: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """q(x_t | x_0), Ho et al. 2020, equation 4. ``alphas_cumprod`` ``(n,)`` at each sample's timestep."""
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def prediction_target(clean: Tensor, noise: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """What the UNet should say: the noise, or the velocity of Salimans & Ho 2022, appendix D."""
    if prediction_type == "epsilon":
        return noise
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean


def question(base: BaseModel, clean: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy latents that the UNet is shown, and the target it should answer; both ``(n, 4, h, w)``.

    Args:
        clean: scaled latents ``(n, 4, h, w)`` float32.
        noise: standard normal, same shape.
        timesteps: ``(n,)`` integers.
    """
    alphas = base.alphas_cumprod[timesteps]
    return add_noise(clean, noise, alphas), prediction_target(clean, noise, alphas, base.prediction_type)


def predict(base: BaseModel, noisy: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
    """The UNet's answer ``(n, 4, h, w)`` in float32.

    Args:
        noisy: ``(n, 4, h, w)``.
        timesteps: ``(n,)`` integers.
        embeds: of n prompts.
    """
    added = None
    if embeds.pooled is not None:
        added = {"text_embeds": embeds.pooled, "time_ids": base.time_ids.expand(len(noisy), -1)}
    return base.unet(noisy.to(base.dtype), timesteps, embeds.hidden, added_cond_kwargs=added).sample.float()


def denoising_error(prediction: Tensor, target: Tensor, background: float = 1.0) -> Tensor:
    """Mean squared error per sample, ``(n,)``; the background counts ``background`` times as much as the head.

    The head is the ellipse in which prepared portraits show it with its hair; weights have mean 1.
    """
    error = (prediction - target).square()
    if background != 1:
        error = error * _head_weights(*error.shape[-2:], background, error.device)
    return error.mean(dim=(1, 2, 3))


@lru_cache(maxsize=8)  # a copy to the device would make every step wait for it
def _head_weights(height: int, width: int, background: float, device: torch.device) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 2 * height + 1)[1::2], torch.linspace(-1, 1, 2 * width + 1)[1::2],
                          indexing="ij")  # fmt: skip
    inside = (x / HEAD_HALF_WIDTH) ** 2 + (y / HEAD_HALF_HEIGHT) ** 2 < 1
    weights = torch.where(inside, 1.0, background)
    return (weights / weights.mean()).to(device)


@torch.no_grad()
def encode_photos(base: BaseModel, pixels: Tensor, release: bool = True) -> Tensor:
    """The VAE's moments of photos, encoded once and resampled at each step: ``(photos, 2 * 4, h, w)`` float32.

    The VAE is moved to the base's device for this. It runs in float32: SD1.5's overflows in float16.

    Args:
        pixels: ``(photos, 3, size, size)`` in [-1, 1].
        release: call `release_vae` at the end; False leaves the VAE there for the next photos.
    """
    vae = base.vae.to(base.device).type(torch.float32)  # at a cast by to() diffusers logs a warning
    # One at a time: a batch of 512 px takes gigabytes.
    moments = torch.cat([vae.encode(photo[None].to(base.device)).latent_dist.parameters for photo in pixels])
    if release:
        release_vae(base)
    return moments


def release_vae(base: BaseModel) -> None:
    """Move the VAE to the CPU, so that it holds no memory while fitting, in the base's dtype, to draw with."""
    base.vae.type(base.dtype).to("cpu")


def sample_latents(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Draw scaled latents ``(n, 4, h, w)`` from moments ``(n, 8, h, w)`` with standard normal ``noise``."""
    mean, log_variance = moments.chunk(2, dim=1)
    return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise) * scaling_factor
