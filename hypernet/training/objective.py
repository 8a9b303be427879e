"""What a training step computes: from a batch to its loss (HyperDreamBooth, arXiv:2307.06949, equation 2).

alpha times the base's denoising loss under the predicted weights, plus beta times the distance of the prediction to a
pre-optimised target; and prompt preservation, which is ours.

A module of its own, so that whatever wraps a model (DistributedDataParallel, accelerate's mixed precision) sees all of
the hypernetwork's parameters used in one forward pass, the learned bases included.
"""

import torch
from torch import Tensor, nn

from hypernet.base_models.base import BaseModel
from hypernet.fitting.losses import base_losses, layer_distance
from hypernet.fitting.noise import draw_noise, noise_photos
from hypernet.fitting.preservation import Preserved, PromptPreservation
from hypernet.fitting.subjects import stored_moments
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.recipe import PersonalizeConfig, TrainConfig
from hypernet.training.examples import Batch
from lidb_peft import LiDBSpace

TERMS = ("denoising", "target_distance", "preservation")
SUMMED = (*TERMS, "people")


class Objective(nn.Module):
    """The loss of a hypernetwork on a batch.

    Attributes:
        network: the only part with parameters to train; the base is no sub-module.
    """

    def __init__(
        self,
        base: BaseModel,
        space: LiDBSpace,
        network: HyperNetwork,
        config: TrainConfig,
        scale: Tensor | None = None,
    ) -> None:
        """Compute the loss that ``config`` describes.

        Args:
            scale: of each layer, as `hypernet.fitting.losses.layer_scale` gives it; the distance to targets needs it.
        """
        super().__init__()
        self.network, self.config = network, config
        self.base, self.space = base, space
        self.scale = scale
        self.latents = Latents(base, keep=not config.augments)
        prompt = network.config.trigger
        self.prompts = base.prepare_prompts([prompt, ""])
        self.preservation = None
        if config.preservation:
            recipe = PersonalizeConfig(token=network.config.token, prompt=network.config.prompt)
            self.preservation = PromptPreservation(
                base, [prompt] * config.batch_size, [recipe.class_prompt] * config.batch_size, config.preserved
            )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and what went into it.

        Returns:
            The mean loss over the batch's B places, where a person who cannot be used counts 0; and, without gradient,
            ``(4,)`` as `SUMMED` names them: the sum of each term over the people, and their number.
        """
        thetas = self.network(batch.seen, return_rounds=True)
        rounds = thetas if self.config.deep_supervision else thetas[-1:]
        with torch.autocast(thetas.device.type, enabled=False):
            terms = self.terms(rounds.float(), batch)
        loss = sum(getattr(self.config, name) * (term * batch.counts).mean() for name, term in terms.items())
        absent = torch.zeros_like(batch.counts)
        sums = [(terms.get(name, absent).detach() * batch.counts).sum() for name in TERMS]
        return loss, torch.stack([*sums, batch.counts.sum()])

    def terms(self, rounds: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Each term, ``(B,)``, averaged over rounds of predictions ``(K, B, L, row)``; a further one is added here."""
        terms: dict[str, list[Tensor]] = {}
        noised = self._noise(batch) if self.config.needs_base else None
        for theta in rounds:
            if self.config.target_distance and batch.targets is not None:
                terms.setdefault("target_distance", []).append(self._target_distance(theta, batch.targets))
            if noised is not None:
                for name, term in self._base_terms(theta, batch, *noised).items():
                    terms.setdefault(name, []).append(term)
        return {name: torch.stack(values).mean(dim=0) for name, values in terms.items()}

    def _target_distance(self, theta: Tensor, targets: Tensor) -> Tensor:
        """About 1 for a prediction of theta_0, 0 for the target, whatever a layer's size."""
        distance = layer_distance(self.space, theta, targets, self.config.compare, self.network.bases)
        assert self.scale is not None, "a distance to targets without the layers' scale"
        return (distance / self.scale.to(theta.device)).mean(dim=-1)

    @torch.no_grad()
    def _noise(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Preserved | None]:
        """Noisy latents, timesteps, targets, and what is preserved there: the same for each round."""
        generators = batch.generators()
        if batch.moments is None:
            moments = self.latents.moments(batch.denoised, batch.photos)
        else:
            moments = stored_moments(self.base, batch.moments)
        moments = moments.repeat_interleave(batch.copies, dim=0)
        noise = draw_noise(self.base, moments.shape, generators).to(self.base.device)
        noisy_latents, target = noise_photos(self.base, moments, noise)
        preserved = None
        if self.preservation is not None:
            choice = self.preservation.choose(batch.copies, generators).to(self.base.device)
            preserved = self.preservation.preserve(noisy_latents, noise.timesteps, choice)
        return noisy_latents, noise.timesteps, target, preserved

    def _base_terms(
        self,
        theta: Tensor,
        batch: Batch,
        noisy_latents: Tensor,
        timesteps: Tensor,
        target: Tensor,
        preserved: Preserved | None,
    ) -> dict[str, Tensor]:
        prompts = self.prompts.rows(batch.drops_caption.long())
        with self.space.apply(self.space.expand(theta, self.network.bases)):
            denoising, change = base_losses(
                self.base, prompts, noisy_latents, timesteps, target, self.config.background, preserved
            )
        if change is None:
            return {"denoising": denoising}
        # Without its caption a plain prediction is none that a style could change.
        return {"denoising": denoising, "preservation": change * ~batch.drops_caption}


KEPT_BYTES = 4 * 2**30
"""Of moments that a process remembers: 32,000 photos of Stable Diffusion 1.5."""


class Latents:
    """The VAE's moments of a training's photos, on the base's device; the VAE stays there until it is released."""

    def __init__(self, base: BaseModel, keep: bool) -> None:
        """Encode with the VAE of ``base``; ``keep`` remembers the moments by the photos' names, on the CPU.

        The first `KEPT_BYTES` stay, and none of them makes room for a later one: everybody comes once an epoch, so what
        was used longest ago is the likeliest to come next.
        """
        self.base = base
        self.kept: dict[str, Tensor] | None = {} if keep else None
        self.kept_bytes = 0

    @torch.no_grad()
    def moments(self, pixels: Tensor, photos: tuple[str, ...]) -> Tensor:
        """Moments ``(B, 2 * c, h, w)`` float32 of ``pixels`` ``(B, 3, size, size)`` in [-1, 1], by photo."""
        if self.kept is None:
            return self.base.encode_photos(pixels, release=False)
        missing = {photo: row for row, photo in enumerate(photos) if photo not in self.kept}
        encoded: dict[str, Tensor] = {}
        if missing:
            moments = self.base.encode_photos(pixels[list(missing.values())], release=False).cpu()
            encoded = dict(zip(missing, moments, strict=True))
        for photo, own in encoded.items():
            if self.kept_bytes + own.nbytes <= KEPT_BYTES:
                self.kept[photo] = own.clone()  # of its own, or the whole batch would stay in memory
                self.kept_bytes += own.nbytes
        known = encoded | {photo: self.kept[photo] for photo in photos if photo in self.kept}
        return torch.stack([known[photo] for photo in photos]).to(self.base.device)
