"""What a training step computes: from a batch to its loss (HyperDreamBooth, arXiv:2307.06949, equation 2).

alpha times the base's denoising loss under the predicted weights, plus beta times the distance of the prediction to a
pre-optimised target; and prompt preservation, which is ours.

A module of its own, so that whatever wraps a model (DistributedDataParallel, accelerate's mixed precision) sees all of
the hypernetwork's parameters used in one forward pass, the learned bases included.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hypernet.base_models import BaseModel
from hypernet.diffusion import encode_photos
from hypernet.fitting.losses import ask, base_losses, draw_noise
from hypernet.fitting.preservation import Preserved, PromptPreservation
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.recipe import PersonalizeConfig, TrainConfig
from hypernet.training.examples import Batch
from lidb_peft import LiDBSpace, squared_distance

TERMS = ("denoising", "weights", "preservation")
SUMMED = (*TERMS, "people")
SMALLEST_SCALE = 1e-3  # of the layers' mean; or a layer that no target changes would outweigh all others


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
            scale: of each layer, as `layer_scale` gives it; the weight term needs it.
        """
        super().__init__()
        self.network, self.config = network, config
        self.base, self.space = base, space
        self.scale = scale
        self.latents = Latents(base, keep=not config.augments)
        prompt = network.config.trigger
        self.prompt_ids, self.empty_ids = base.token_ids(prompt), base.token_ids("")
        self.preservation = None
        if config.preservation:
            recipe = PersonalizeConfig(token=network.config.token, prompt=network.config.prompt)
            self.preservation = PromptPreservation(
                base, [prompt] * config.batch, [recipe.class_prompt] * config.batch, config.preserved
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
        asked = self._ask(batch) if self.config.needs_base else None
        for theta in rounds:
            if self.config.weights and batch.targets is not None:
                terms.setdefault("weights", []).append(self._weight_term(theta, batch.targets))
            if asked is not None:
                for name, term in self._base_terms(theta, batch, *asked).items():
                    terms.setdefault(name, []).append(term)
        return {name: torch.stack(values).mean(dim=0) for name, values in terms.items()}

    def _weight_term(self, theta: Tensor, targets: Tensor) -> Tensor:
        """About 1 for a prediction of theta_0, 0 for the target, whatever a layer's size."""
        distance = layer_distance(self.space, theta, targets, self.config.compare, self.network.bases)
        return (distance / self.scale.to(theta.device)).mean(dim=-1)

    @torch.no_grad()
    def _ask(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Preserved | None]:
        """What the base is asked and should answer, the same for each round: noisy latents, timesteps, targets."""
        generators = batch.generators()
        moments = self.latents.moments(batch.denoised, batch.photos).repeat_interleave(batch.copies, dim=0)
        noise = draw_noise(self.base, moments.shape, generators).to(self.base.device)
        noisy, target = ask(self.base, moments, noise)
        preserved = None
        if self.preservation is not None:
            choice = self.preservation.choose(batch.copies, generators).to(self.base.device)
            preserved = self.preservation.preserve(noisy, noise.timesteps, choice)
        return noisy, noise.timesteps, target, preserved

    def _base_terms(
        self, theta: Tensor, batch: Batch, noisy: Tensor, timesteps: Tensor, target: Tensor, preserved: Preserved | None
    ) -> dict[str, Tensor]:
        ids = torch.where(batch.drops_caption[:, None, None], self.empty_ids, self.prompt_ids)
        with self.space.apply(self.space.expand(theta, self.network.bases)):
            denoising, change = base_losses(self.base, ids, noisy, timesteps, target, self.config.background, preserved)
        if change is None:
            return {"denoising": denoising}
        # Without its caption a plain prediction is none that a style could change.
        return {"denoising": denoising, "preservation": change * ~batch.drops_caption}


class Latents:
    """The VAE's moments of a training's photos, on the base's device; the VAE stays there until `release_vae`."""

    def __init__(self, base: BaseModel, keep: bool) -> None:
        """Encode with the VAE of ``base``; ``keep`` remembers the moments by the photos' names, on the CPU."""
        self.base = base
        self.kept: dict[str, Tensor] | None = {} if keep else None

    @torch.no_grad()
    def moments(self, pixels: Tensor, photos: tuple[str, ...]) -> Tensor:
        """Moments ``(B, 8, h, w)`` float32 of ``pixels`` ``(B, 3, size, size)`` in [-1, 1], whose names are given."""
        if self.kept is None:
            return encode_photos(self.base, pixels, release=False)
        missing = {photo: row for row, photo in enumerate(photos) if photo not in self.kept}
        if missing:
            encoded = encode_photos(self.base, pixels[list(missing.values())], release=False).cpu()
            self.kept.update(zip(missing, encoded, strict=True))
        return torch.stack([self.kept[photo] for photo in photos]).to(self.base.device)
