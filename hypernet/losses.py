"""The terms of a hypernetwork's loss (HyperDreamBooth, arXiv:2307.06949, equation 2).

alpha times the base's denoising loss under the predicted weights, plus beta times the distance of the prediction to a
pre-optimised target; and prompt preservation, which is ours.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hypernet.base_models import BaseModel
from hypernet.diffusion import denoising_error, predict, sample_latents
from hypernet.preservation import Preserved
from lidb_peft import LiDBSpace, squared_distance

SMALLEST_SCALE = 1e-3  # of the layers' mean; or a layer that no target changes would outweigh all others


def draw_noise(
    base: BaseModel, moments: Tensor, generators: Sequence[torch.Generator], copies: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents, noise ``(B * copies, 4, h, w)`` and timesteps ``(B * copies,)``, person by person.

    The timesteps of one person's copies are stratified, so that every step sees the whole schedule.

    Args:
        moments: of one photo of each person, ``(B, 8, h, w)``.
        generators: each person's own, on the CPU, so that every device draws the same.
    """
    num_timesteps = base.scheduler.config.num_train_timesteps
    shape = (copies, moments.shape[1] // 2, *moments.shape[2:])
    latent_noise, noise, timesteps = [], [], []
    for generator in generators:
        latent_noise.append(torch.randn(shape, generator=generator))
        noise.append(torch.randn(shape, generator=generator))
        position = (torch.arange(copies) + torch.rand(copies, generator=generator)) / copies
        timesteps.append((position * num_timesteps).long().clamp(max=num_timesteps - 1))
    latent_noise, noise, timesteps = (torch.cat(part).to(base.device) for part in (latent_noise, noise, timesteps))
    clean = sample_latents(moments.repeat_interleave(copies, dim=0), latent_noise, base.vae.config.scaling_factor)
    return clean, noise, timesteps


def base_losses(
    base: BaseModel,
    prompt_ids: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    target: Tensor,
    background: float = 1.0,
    preserved: Preserved | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Each person's denoising and preservation loss, ``(B,)`` each, under the weights that are applied.

    Both come from one pass of the base. The second is None if nothing is preserved.

    Args:
        prompt_ids: ``(B, tokens)``.
        noisy, target: as `hypernet.diffusion.question` gives them, ``(B * k, 4, h, w)``, person by person.
        timesteps: ``(B * k,)``.
    """
    ids, rows = prompt_ids[:, None], torch.arange(len(noisy), device=noisy.device).view(len(prompt_ids), -1)
    copies = rows.shape[1]
    if preserved is not None:
        ids = torch.cat([ids, preserved.token_ids.unflatten(0, (len(ids), -1))], dim=1)
        rows = torch.cat([rows, preserved.rows.view(len(ids), -1)], dim=1)
    embeds = base.text_encoder(ids.flatten(0, 1))[0].unflatten(0, ids.shape[:2])
    embeds = torch.cat([embeds[:, :1].expand(-1, copies, -1, -1), embeds[:, 1:]], dim=1).flatten(0, 1)
    answers = predict(base, noisy[rows.flatten()], timesteps[rows.flatten()], embeds).unflatten(0, rows.shape)
    plain, styled = answers[:, :copies].flatten(0, 1), answers[:, copies:].flatten(0, 1)
    denoising = denoising_error(plain, target, background).view(-1, copies).mean(dim=1)
    if preserved is None:
        return denoising, None
    return denoising, preserved.loss(plain[preserved.rows], styled).view(len(ids), -1).mean(dim=1)


def layer_distance(
    space: LiDBSpace, theta: Tensor, target: Tensor, compare: str, bases: Mapping[str, Tensor] | None = None
) -> Tensor:
    """How far each layer of theta ``(*batch, L, row)`` is from the target's, ``(*batch, L)``.

    Args:
        compare: ``updates``, ||dW - dW'||_F^2; or ``factors``, the mean square of theta - target.
        bases: the learned ones of theta; the target's are the frozen ones.
    """
    if compare == "updates":
        return squared_distance(space, theta, target, bases)
    mask = space.mask.to(theta.device)
    return ((theta - target) * mask).square().sum(dim=-1) / mask.sum(dim=-1)


def layer_scale(space: LiDBSpace, targets: Tensor, compare: str) -> Tensor:
    """What `layer_distance` is divided by, ``(L,)``: the mean distance of targets ``(n, L, row)`` from theta_0."""
    scale = layer_distance(space, targets, space.theta_0.to(targets.device), compare).mean(dim=0)
    return scale.clamp(min=(SMALLEST_SCALE * scale.mean()).clamp(min=torch.finfo(scale.dtype).tiny))


@contextmanager
def checkpointed(base: BaseModel, enabled: bool = True) -> Iterator[None]:
    """Gradient checkpointing of the base for a block; diffusers and transformers recompute in training mode only.

    The bases have no dropout, so training mode changes nothing else.
    """
    if not enabled:
        yield
        return
    base.unet.enable_gradient_checkpointing()
    base.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    base.unet.train()
    base.text_encoder.train()
    try:
        yield
    finally:
        base.unet.disable_gradient_checkpointing()
        base.text_encoder.gradient_checkpointing_disable()
        base.unet.eval()
        base.text_encoder.eval()
