"""Likeness: pictures that a fit's weights draw are compared with the photos by a network that recognises people.

Most of a photo's denoising loss is about its wall, pose and light. So each step also draws the person, for the prompt
or for one whose effect is preserved: from noise, with guidance, as users do, up to a step chosen at random; there the
finished picture is predicted, decoded and recognised (like ReFL, arXiv:2304.05977, and PuLID, arXiv:2404.16022). Only
the denoiser's last step is differentiated.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hypernet.base_models.base import BaseModel, PromptEmbeds
from hypernet.inputs.recognition import Recogniser
from hypernet.recipe import NUM_TIMESTEPS

STEPS = 8
"""Of drawing a picture to its end."""
FIRST_STOP = 5  # before it, at more noise, pose and background are settled, which are not to be the photo's
PICTURES = 2  # of each person and step
_PLAIN = 0.5  # of them, on average, for the prompt itself
_PIXELS_AT_ONCE = 512 * 512  # that are decoded together: a picture of 512 pixels takes gigabytes
_SMALLEST_STEP = 1e-6  # below 1 is the last timestep


class Drawn(NamedTuple):
    """What is random in the pictures of a step, of N people.

    Attributes:
        noise: ``(N * PICTURES, c, h, w)``, person by person.
        prompts: which of the person's prompts, ``(N * PICTURES,)``; 0 is the plain one.
        stop: the step of `STEPS` at which the finished pictures are predicted.
    """

    noise: Tensor
    prompts: Tensor
    stop: int


class Likeness:
    """How unlike their photos the people are whom a fit's weights draw."""

    def __init__(
        self,
        base: BaseModel,
        recogniser: Recogniser,
        prompts: Sequence[str],
        embeddings: Tensor,
        templates: Sequence[str],
        guidance: float,
    ) -> None:
        """Prepare for N people.

        Args:
            prompts: what each person's photos show, e.g. ``a sks face``.
            embeddings: of their photos, ``(N, width)``.
            templates: further prompts to draw, with ``{}`` for the person.
        """
        self.base, self.recogniser, self.guidance = base, recogniser, guidance
        self.num_templates = len(templates)
        self.embeddings = embeddings.to(base.device)
        texts = [template.format(prompt) for prompt in prompts for template in ("{}", *templates)]
        self.prompts, rows = base.prepare_each_once(texts)
        self.rows = rows.view(len(prompts), -1)

    def choose(self, generators: Sequence[torch.Generator], shared: torch.Generator) -> Drawn:
        """Choose what is random in a step, on the CPU.

        Args:
            generators: each person's own.
            shared: for the step at which all pictures stop.
        """
        noise, prompts = [], []
        for generator in generators:
            noise.append(torch.randn(PICTURES, *self.base.latent_shape, generator=generator))
            is_plain = torch.rand(PICTURES, generator=generator) < _PLAIN
            chosen = 1 + torch.randint(max(self.num_templates, 1), (PICTURES,), generator=generator)
            prompts.append(torch.where(is_plain, 0, chosen) if self.num_templates else torch.zeros_like(chosen))
        stop = int(torch.randint(FIRST_STOP, STEPS, (), generator=shared))
        return Drawn(torch.cat(noise), torch.cat(prompts), stop)

    def __call__(self, drawn: Drawn) -> Tensor:
        """1 - the similarity of the drawn people to their photos, ``(N,)``, under the weights that are applied."""
        device = self.base.device
        people = torch.arange(len(self.rows), device=device).repeat_interleave(PICTURES)
        asked = self.base.encode_prompts(self.prompts.rows(self.rows[people, drawn.prompts.to(device)]))
        latents = half_drawn(self.base, drawn.noise.to(device), asked, drawn.stop, self.guidance)
        own = self.embeddings[people]
        at_once = max(1, _PIXELS_AT_ONCE // self.base.size_px**2)
        if len(latents) <= at_once:
            unlike = self._unlike(latents, own)
        else:  # recomputed, so that one part's activations are there at a time
            parts = zip(latents.split(at_once), own.split(at_once), strict=True)
            unlike = torch.cat([cast(Tensor, checkpoint(self._unlike, *part, use_reentrant=False)) for part in parts])
        return unlike.view(-1, PICTURES).mean(dim=1)

    def _unlike(self, latents: Tensor, own: Tensor) -> Tensor:
        found = self.recogniser.embed(self.base.decode_latents(latents))
        return 1 - (found * own).sum(dim=1)


def half_drawn(base: BaseModel, noise: Tensor, asked: PromptEmbeds, stop: int, guidance: float) -> Tensor:
    """The finished latents ``(n, c, h, w)`` as predicted at step ``stop`` of `STEPS` from ``noise``, by DDIM's way.

    Args:
        asked: the prompts' conditioning, of n.
    """
    positions = 1 - torch.arange(STEPS, device=noise.device) / STEPS - _SMALLEST_STEP
    timesteps = base.timesteps(positions, NUM_TIMESTEPS)  # "trailing", as users' sampling
    told = _with_no_prompt(base, asked)
    latents = noise
    for step in range(stop):
        with torch.no_grad():
            found, rest = guided(base, latents, timesteps[step], told, guidance)
            latents = base.add_noise(found, rest, timesteps[step + 1].expand(len(noise)))
    return guided(base, latents, timesteps[stop], told, guidance)[0]


def guided(
    base: BaseModel, latents: Tensor, timestep: Tensor, told: PromptEmbeds, guidance: float
) -> tuple[Tensor, Tensor]:
    """The finished latents and the noise in ``latents`` ``(n, c, h, w)``, with classifier-free guidance.

    Args:
        told: conditioning of n; or of 2 n, without and with a prompt for each.
    """
    times = len(told) // len(latents)
    noisy = latents.repeat_interleave(times, dim=0)
    found = base.denoise(noisy, timestep.expand(len(noisy)), told)
    if times == 2:
        without, with_prompt = found.unflatten(0, (-1, 2)).unbind(1)
        found = without + guidance * (with_prompt - without)
    return base.finished(latents, found, timestep.expand(len(latents)))


def _with_no_prompt(base: BaseModel, asked: PromptEmbeds) -> PromptEmbeds:
    """Conditioning for `guided`: person by person, for each has weights of their own."""
    nothing = base.encode_no_prompt(asked)
    if nothing is None:
        return asked
    order = torch.arange(2 * len(asked), device=asked.prompt_embeds.device).view(2, -1).T.flatten()
    return PromptEmbeds.concatenate([nothing, asked]).rows(order)
