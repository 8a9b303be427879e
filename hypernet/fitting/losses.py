"""What a step asks of the base, for many people at once: a fit's and the hypernetwork's denoising and preservation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hypernet.base_models import BaseModel
from hypernet.diffusion import denoising_error, predict, question, sample_latents
from hypernet.fitting.preservation import Preserved
from hypernet.recipe import NUM_TIMESTEPS


class Noise(NamedTuple):
    """What is random in the noisy latents of a step, for B people with k copies each.

    Attributes:
        latent: with it the latents are drawn from the VAE's moments, ``(B * k, 4, h, w)``.
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
        shape: of the photos' moments, ``(B * k, 8, h, w)``.
        generators: each person's own, B of them.
    """
    num_timesteps = min(max_timestep, base.scheduler.config.num_train_timesteps)
    copies = shape[0] // len(generators)
    size = (copies, shape[1] // 2, *shape[2:])
    latent, added, timesteps = [], [], []
    for generator in generators:
        latent.append(torch.randn(size, generator=generator))
        added.append(torch.randn(size, generator=generator))
        position = (torch.arange(copies) + torch.rand(copies, generator=generator)) / copies
        timesteps.append((position * num_timesteps).long().clamp(max=num_timesteps - 1))
    return Noise(torch.cat(latent), torch.cat(added), torch.cat(timesteps))


def ask(base: BaseModel, moments: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """The noisy latents of photos and the target for each, as `hypernet.diffusion.question` gives them.

    Args:
        moments: ``(B * k, 8, h, w)``, on the device of ``noise``.
    """
    clean = sample_latents(moments, noise.latent, base.vae.config.scaling_factor)
    return question(base, clean, noise.added, noise.timesteps)


def base_losses(
    base: BaseModel,
    prompt_ids: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    target: Tensor,
    background: float,
    preserved: Preserved | None,
) -> tuple[Tensor, Tensor | None]:
    """Each person's denoising and preservation loss, ``(B,)`` each, under the weights that are applied.

    Both come from one pass of the base. The second is None if nothing is preserved.

    Args:
        prompt_ids: ``(B, E, tokens)``.
        noisy, target: as `ask` gives them, ``(B * k, 4, h, w)``, person by person.
        timesteps: ``(B * k,)``.
    """
    ids, rows = prompt_ids[:, None], torch.arange(len(noisy), device=noisy.device).view(len(prompt_ids), -1)
    copies = rows.shape[1]
    if preserved is not None:
        ids = torch.cat([ids, preserved.token_ids.unflatten(0, (len(ids), -1))], dim=1)
        rows = torch.cat([rows, preserved.rows.view(len(ids), -1)], dim=1)
    prompts = torch.arange(ids.shape[0] * ids.shape[1], device=ids.device).view(ids.shape[:2])
    prompts = torch.cat([prompts[:, :1].expand(-1, copies), prompts[:, 1:]], dim=1)
    embeds = base.encode(ids.flatten(0, 1)).rows(prompts.flatten())
    answers = predict(base, noisy[rows.flatten()], timesteps[rows.flatten()], embeds).unflatten(0, rows.shape)
    plain, styled = answers[:, :copies].flatten(0, 1), answers[:, copies:].flatten(0, 1)
    denoising = denoising_error(plain, target, background).view(-1, copies).mean(dim=1)
    if preserved is None:
        return denoising, None
    return denoising, preserved.loss(plain[preserved.rows], styled).view(len(ids), -1).mean(dim=1)


@contextmanager
def checkpointed(base: BaseModel, enabled: bool) -> Iterator[None]:
    """Gradient checkpointing of the base for a block; diffusers and transformers recompute in training mode only.

    The bases have no dropout, so training mode changes nothing else.
    """
    if not enabled:
        yield
        return
    models = base.adapted.values()
    base.unet.enable_gradient_checkpointing()
    for encoder in base.text_encoders:
        encoder.gradient_checkpointing_enable({"use_reentrant": False})
    for model in models:
        model.train()
    try:
        yield
    finally:
        base.unet.disable_gradient_checkpointing()
        for encoder in base.text_encoders:
            encoder.gradient_checkpointing_disable()
        for model in models:
            model.eval()
