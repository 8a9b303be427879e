"""The losses of a step, person by person: denoising, prompt preservation, and the distance to a target.

A fit takes the first two; training a hypernetwork may take all three (`hypernet.training.objective`).
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from hypernet.base_models.base import BaseModel, Prompts
from hypernet.fitting.preservation import Preserved
from lidb_peft import LiDBSpace, squared_distance

# Of a portrait as `prepare_photo` crops it, in halves of the picture.
HEAD_HALF_WIDTH, HEAD_HALF_HEIGHT = 0.725, 0.9
SMALLEST_SCALE = 1e-3  # of the layers' mean; or a layer that no target changes would outweigh all others


def base_losses(
    base: BaseModel,
    prompts: Prompts,
    noisy_latents: Tensor,
    timesteps: Tensor,
    target: Tensor,
    background: float,
    preserved: Preserved | None,
) -> tuple[Tensor, Tensor | None]:
    """Each person's denoising and preservation loss, ``(B,)`` each, under the weights that are applied.

    Both come from one pass of the base. The second is None if nothing is preserved.

    Args:
        prompts: B of them.
        noisy_latents, target: as `noise_photos` gives them, ``(B * k, c, h, w)``, person by person.
        timesteps: ``(B * k,)``.
    """
    people, device = len(prompts), noisy_latents.device
    rows = torch.arange(len(noisy_latents), device=device).view(people, -1)
    places = torch.arange(people, device=device)[:, None]  # in `prompts`, a person's plain and styled ones together
    copies = rows.shape[1]
    if preserved is not None:
        prompts = Prompts.concatenate([prompts, preserved.prompts])
        places = torch.cat([places, people + torch.arange(len(preserved.rows), device=device).view(people, -1)], dim=1)
        rows = torch.cat([rows, preserved.rows.view(people, -1)], dim=1)
    encoded = torch.arange(places.numel(), device=device).view(places.shape)
    encoded = torch.cat([encoded[:, :1].expand(-1, copies), encoded[:, 1:]], dim=1)
    prompt_embeds = base.encode_prompts(prompts.rows(places.flatten())).rows(encoded.flatten())
    rows_flat = rows.flatten()
    noise_pred = base.denoise(noisy_latents[rows_flat], timesteps[rows_flat], prompt_embeds).unflatten(0, rows.shape)
    plain, styled = noise_pred[:, :copies].flatten(0, 1), noise_pred[:, copies:].flatten(0, 1)
    denoising = denoising_error(plain, target, background).view(-1, copies).mean(dim=1)
    if preserved is None:
        return denoising, None
    change = preservation_error(plain[preserved.rows], styled, preserved.change)
    return denoising, change.view(people, -1).mean(dim=1)


def denoising_error(noise_pred: Tensor, target: Tensor, background: float = 1.0) -> Tensor:
    """Mean squared error per sample, ``(n,)``; the background counts ``background`` times as much as the head.

    The head is the ellipse in which prepared portraits show it with its hair; the loss weights have mean 1.
    """
    error = (noise_pred - target).square()
    if background != 1:
        error = error * _loss_weights(*error.shape[-2:], background, error.device)
    return error.mean(dim=(1, 2, 3))


def preservation_error(plain: Tensor, styled: Tensor, change: Tensor) -> Tensor:
    """Mean squared error per sample, ``(n,)``, of the change from the plain to the styled predictions ``(n, ...)``.

    Only the styled ones get a gradient: see `hypernet.fitting.preservation`.
    """
    return (styled - (plain.detach() + change)).square().mean(dim=(1, 2, 3))


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


@lru_cache(maxsize=8)  # a copy to the device would make every step wait for it
def _loss_weights(height: int, width: int, background: float, device: torch.device) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 2 * height + 1)[1::2], torch.linspace(-1, 1, 2 * width + 1)[1::2],
                          indexing="ij")  # fmt: skip
    inside = (x / HEAD_HALF_WIDTH) ** 2 + (y / HEAD_HALF_HEIGHT) ** 2 < 1
    loss_weights = torch.where(inside, 1.0, background)
    return (loss_weights / loss_weights.mean()).to(device)
