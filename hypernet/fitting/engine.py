"""The fitting engine: N identities at once on one frozen base, each with weights of its own.

Pre-optimising thousands, personalising one and personalising a folder are this call with different N. What is fitted is
either LiDB's theta (paper, section 4.1) or, beside a frozen theta, LoRA factors of rank r > 1 (section 4.3).
The result for one identity does not depend on who shares the batch: noise is keyed by identity, losses are summed,
gradients are clipped per identity and Adam works number by number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypernet.base_models import BaseModel
from hypernet.diffusion import question
from hypernet.fitting.losses import base_losses, checkpointed, draw_noise
from hypernet.fitting.preservation import PromptPreservation
from hypernet.inputs.people import derive_seed
from hypernet.recipe import FitConfig, Progress
from lidb_peft import LiDBSpace, LoraFactors, combine
from lidb_peft.stacks import Stacks

FP16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class Subject:
    """One identity to fit.

    Attributes:
        key: names the identity; its noise and timesteps follow from the key and the seed.
        moments: VAE moments of its photos, ``(photos, 8, h, w)``.
        prompt: what the photos show, e.g. ``a sks face``.
        class_prompt: the same without the subject, ``a face``; prompt preservation needs it.
    """

    key: str
    moments: Tensor
    prompt: str
    class_prompt: str = ""


def fit_theta(
    base: BaseModel,
    space: LiDBSpace,
    subjects: Sequence[Subject],
    config: FitConfig,
    start: Tensor | None = None,
    progress: Progress | None = None,
    bases: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit one theta per subject, all from the same starting vector.

    Args:
        start: ``(N, L, row)`` or ``(L, row)``; default ``space.theta_0``.
        bases: learned ones, by label, that theta is fitted in; None takes the frozen ones.

    Returns:
        theta ``(N, L, row)`` and losses ``(steps, N)``, both float32 on the CPU.

    Raises:
        ValueError: ``start`` or the subjects do not fit, or the fit diverged.
    """
    _check_subjects(subjects)
    start = space.theta_0 if start is None else start
    _check_thetas(space, start, len(subjects))
    theta = start.expand(len(subjects), *start.shape[-2:]).to(base.device, torch.float32).clone()
    bases = _frozen(bases, base.device)
    losses = _fit(base, space, subjects, config, theta, lambda values: [space.expand(values, bases)], progress)
    return theta.detach().cpu(), losses


def fit_lora(
    base: BaseModel,
    space: LiDBSpace,
    subjects: Sequence[Subject],
    config: FitConfig,
    rank: int,
    theta: Tensor | None = None,
    progress: Progress | None = None,
    bases: Mapping[str, Tensor] | None = None,
) -> tuple[list[LoraFactors], Tensor]:
    """Rank-relaxed finetuning: fit a fresh LoRA of rank ``rank`` per subject beside its frozen theta.

    Args:
        theta: ``(N, L, row)`` or ``(L, row)``, frozen; None fits a plain LoRA.
        bases: learned ones, by label, that theta is expanded with; None takes the frozen ones.

    Returns:
        Per subject the exact factors of theta and LoRA together, of rank r + ``rank``, and losses ``(steps, N)``, all
        on the CPU.

    Raises:
        ValueError: rank < 1, theta or the subjects do not fit, or the fit diverged.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected 1 or more")
    _check_subjects(subjects)
    if theta is not None:
        _check_thetas(space, theta, len(subjects))
        theta = theta.expand(len(subjects), *theta.shape[-2:])
    fresh = [space.init_lora(rank, _generator(config.seed, subject.key, "lora")) for subject in subjects]
    lora = torch.stack(fresh).to(base.device)
    bases = _frozen(bases, base.device)
    frozen = [] if theta is None else [space.expand(theta.to(base.device, torch.float32), bases)]

    def parts(values: Tensor) -> list[Stacks]:
        return [*frozen, space.split_lora(values, rank)]

    losses = _fit(base, space, subjects, config, lora, parts, progress)
    lora = lora.cpu()
    results = []
    for i in range(len(subjects)):
        factors = space.lora_factors(lora[i], rank)
        results.append(factors if theta is None else combine(space.factors(theta[i].cpu(), bases), factors))
    return results, losses


def _fit(base, space, subjects, config: FitConfig, parameters: Tensor, parts, progress) -> Tensor:
    """Optimise one flat parameter buffer ``(N, ...)`` in place; ``parts`` maps it to the factors to apply."""
    parameters.requires_grad_(True)
    optimizer = torch.optim.AdamW([parameters], lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    generators = [_generator(config.seed, subject.key, "noise") for subject in subjects]
    preservation = _make_preservation(base, subjects, config)
    prompt_ids = torch.cat([base.token_ids(subject.prompt) for subject in subjects])
    loss_scale = FP16_LOSS_SCALE if base.dtype == torch.float16 else 1.0
    history = []
    with checkpointed(base, config.gradient_checkpointing):
        for step in range(config.steps):
            optimizer.param_groups[0]["lr"] = config.lr * (1 - 0.9 * step / config.steps)
            moments = _draw_moments(subjects, generators, config.timesteps_per_step).to(base.device)
            clean, noise, timesteps = draw_noise(base, moments, generators)
            noisy, target = question(base, clean, noise, timesteps)
            preserved = preservation and preservation.draw(noisy, timesteps, generators)
            with space.apply(*parts(parameters)):
                denoising, change = base_losses(
                    base, prompt_ids, noisy, timesteps, target, config.background, preserved
                )
            losses = denoising if change is None else denoising + config.preservation * change
            (losses.sum() * loss_scale).backward()
            parameters.grad.div_(loss_scale)
            _clip_per_identity(parameters.grad, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            history.append(denoising.detach())
            if progress is not None:
                progress(step + 1, config.steps)
    parameters.requires_grad_(False)
    history = torch.stack(history).cpu() if history else torch.empty(0, len(subjects))
    if not torch.isfinite(parameters).all():
        raise ValueError(f"the fit diverged (losses {history[-1:].tolist()}); lower the learning rate {config.lr}")
    return history


def _make_preservation(base: BaseModel, subjects, config: FitConfig) -> PromptPreservation | None:
    if not config.preservation:
        return None
    nameless = [subject.key for subject in subjects if not subject.class_prompt]
    if nameless:
        raise ValueError(
            f"the subject {nameless[0]!r} has no class_prompt; prompt preservation needs it, e.g. 'a face'"
        )
    prompts, class_prompts = zip(*((subject.prompt, subject.class_prompt) for subject in subjects), strict=True)
    return PromptPreservation(base, prompts, class_prompts, config.preserved)


def _draw_moments(subjects: Sequence[Subject], generators: Sequence[torch.Generator], copies: int) -> Tensor:
    """The moments of ``copies`` photos of each subject, drawn by its own generator: ``(N * copies, 8, h, w)``."""
    moments = []
    for subject, generator in zip(subjects, generators, strict=True):
        photos = torch.randint(0, len(subject.moments), (copies,), generator=generator)
        moments.append(subject.moments[photos.to(subject.moments.device)])
    return torch.cat(moments)


def _frozen(bases: Mapping[str, Tensor] | None, device: torch.device) -> dict[str, Tensor] | None:
    return None if bases is None else {label: basis.detach().to(device) for label, basis in bases.items()}


def _check_subjects(subjects: Sequence[Subject]) -> None:
    if not subjects:
        raise ValueError("there is no subject to fit; pass at least one")
    keys = [subject.key for subject in subjects]
    if len(set(keys)) < len(keys):
        raise ValueError(f"two subjects share the key {max(keys, key=keys.count)!r}; keys name identities")
    empty = [subject.key for subject in subjects if len(subject.moments) == 0]
    if empty:
        raise ValueError(f"the subject {empty[0]!r} has no photos; pass at least one")
    shapes = {tuple(subject.moments.shape[1:]) for subject in subjects}
    if len(shapes) > 1:
        raise ValueError(f"the subjects' latents have shapes {sorted(shapes)}; prepare all photos at one size")


def _check_thetas(space: LiDBSpace, theta: Tensor, num_subjects: int) -> None:
    space.check_theta(theta)
    if theta.dim() > 3 or theta.shape[:-2] not in ((), (num_subjects,)):
        raise ValueError(f"theta has shape {tuple(theta.shape)} for {num_subjects} subjects; pass one each, or one")


def _generator(seed: int, key: str, purpose: str) -> torch.Generator:
    """An identity's own stream, on the CPU so that every device draws the same numbers."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, key))


def _clip_per_identity(gradient: Tensor, max_norm: float) -> None:
    norms = gradient.flatten(1).norm(dim=1)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
