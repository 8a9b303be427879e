"""The fitting engine: N identities at once on one frozen base, each with weights of its own.

Pre-optimising thousands, personalising one and personalising a folder are this call with different N. What is fitted is
either LiDB's theta (paper, section 4.1) or, beside a frozen theta, LoRA factors of rank r > 1 (section 4.3).
The result for one identity does not depend on who shares the batch: noise is keyed by identity, losses are summed,
gradients are clipped per identity and Adam works number by number.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hypernet.bases.base import BaseModel, Prompts
from hypernet.devices import release_memory
from hypernet.errors import is_out_of_memory
from hypernet.fitting.losses import base_losses
from hypernet.fitting.noise import Noise, draw_noise, noise_photos
from hypernet.fitting.preservation import Choice, PromptPreservation
from hypernet.fitting.replay import Replay
from hypernet.inputs.people import derive_seed
from hypernet.optimizers import make_adamw, set_learning_rate
from hypernet.recipe import FitConfig, Progress
from lidb_peft import LiDBSpace, LoraFactors, combine
from lidb_peft.stacks import Stacks

FP16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class Subject:
    """One identity to fit.

    Attributes:
        key: names the identity; its noise and timesteps follow from the key and the seed.
        moments: VAE moments of its photos, ``(photos, 2 * c, h, w)``.
        prompt: what the photos show, e.g. ``a sks face``.
        class_prompt: the same without the subject, ``a face``; prompt preservation needs it.
    """

    key: str
    moments: Tensor
    prompt: str
    class_prompt: str = ""


class DivergedError(ValueError):
    """The fits of some subjects diverged.

    Attributes:
        failed: row -> reason.
        fitted, losses: what the fit returns; the rows that are not in ``failed`` are right.
    """

    def __init__(self, failed: dict[int, str], fitted: Tensor, losses: Tensor) -> None:
        super().__init__(next(iter(failed.values())))
        self.failed, self.fitted, self.losses = failed, fitted, losses


def fit_theta(
    base: BaseModel,
    space: LiDBSpace,
    subjects: Sequence[Subject],
    config: FitConfig,
    start: Tensor | None = None,
    progress: Progress | None = None,
    bases: Mapping[str, Tensor] | None = None,
    failed: dict[int, str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit one theta per subject, all from the same starting vector.

    Args:
        start: ``(N, L, row)`` or ``(L, row)``; default ``space.theta_0``.
        bases: learned ones, by label, that theta is fitted in; None takes the frozen ones.
        failed: takes the subjects whose fit diverged, row -> reason; their results are not finite. None raises instead.

    Returns:
        theta ``(N, L, row)`` and losses ``(steps, N)``, both float32 on the CPU.

    Raises:
        ValueError: ``start`` or the subjects do not fit, or the fit diverged.
    """
    _check_subjects(subjects)
    start = space.theta_0 if start is None else start
    _check_thetas(space, start, len(subjects))
    start = start.expand(len(subjects), *start.shape[-2:]).to(base.device, torch.float32)
    bases = _frozen(bases, base.device)
    return _fit(base, space, subjects, config, start, lambda values: [space.expand(values, bases)], progress, failed)


def fit_lora(
    base: BaseModel,
    space: LiDBSpace,
    subjects: Sequence[Subject],
    config: FitConfig,
    rank: int,
    theta: Tensor | None = None,
    progress: Progress | None = None,
    bases: Mapping[str, Tensor] | None = None,
    start: Tensor | None = None,
    failed: dict[int, str] | None = None,
) -> tuple[list[LoraFactors], Tensor]:
    """Rank-relaxed finetuning: fit a LoRA of rank ``rank`` per subject beside its frozen theta.

    Args:
        theta: ``(N, L, row)`` or ``(L, row)``, frozen; None fits a plain LoRA.
        bases: learned ones, by label, that theta is expanded with; None takes the frozen ones.
        start: the LoRA that every fit starts from, ``(lora_size(rank),)`` as `LiDBSpace.split_lora` views it; None
            draws each subject a fresh one, which changes nothing yet.
        failed: as for `fit_theta`.

    Returns:
        Per subject the exact factors of theta and LoRA together, of rank r + ``rank``, and losses ``(steps, N)``, all
        on the CPU.

    Raises:
        ValueError: rank < 1, theta or the subjects do not fit, or the fit diverged.
    """
    lora, losses = fit_flat_lora(base, space, subjects, config, rank, theta, progress, bases, start, failed)
    results = []
    for i in range(len(subjects)):
        factors = space.lora_factors(lora[i], rank)
        if theta is not None:
            own = theta if theta.dim() == 2 else theta[i]
            factors = combine(space.factors(own.cpu(), _frozen(bases, torch.device("cpu"))), factors)
        results.append(factors)
    return results, losses


def fit_flat_lora(
    base: BaseModel,
    space: LiDBSpace,
    subjects: Sequence[Subject],
    config: FitConfig,
    rank: int,
    theta: Tensor | None = None,
    progress: Progress | None = None,
    bases: Mapping[str, Tensor] | None = None,
    start: Tensor | None = None,
    failed: dict[int, str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit as `fit_lora` does; returns the LoRAs alone, flat ``(N, lora_size(rank))``, and the losses, on the CPU.

    Raises:
        ValueError: as `fit_lora`.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected 1 or more")
    _check_subjects(subjects)
    if theta is not None:
        _check_thetas(space, theta, len(subjects))
        theta = theta.expand(len(subjects), *theta.shape[-2:])
    if start is None:
        first = torch.stack([space.init_lora(rank, _generator(config.seed, s.key, "lora")) for s in subjects])
    elif start.shape == (space.lora_size(rank),):
        first = start.float().expand(len(subjects), -1)
    else:
        raise ValueError(
            f"the start has shape {tuple(start.shape)}; a LoRA of rank {rank} on these {space.num_layers} layers has "
            f"{space.lora_size(rank)} numbers"
        )
    bases = _frozen(bases, base.device)
    frozen = [] if theta is None else [space.expand(theta.to(base.device, torch.float32), bases)]

    def parts(values: Tensor) -> list[Stacks]:
        return [*frozen, space.split_lora(values, rank)]

    return _fit(base, space, subjects, config, first.to(base.device), parts, progress, failed)


_too_large: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""By denoiser, the size of a step that did not fit into memory without checkpointing: it is not tried again."""


def _fit(
    base, space, subjects, config: FitConfig, start: Tensor, parts, progress, failed: dict[int, str] | None = None
) -> tuple[Tensor, Tensor]:
    """Optimise one flat buffer of parameters ``(N, ...)``; ``parts`` maps it to the factors to apply.

    Returns:
        What became of ``start``, and losses ``(steps, N)``, on the CPU.
    """
    is_auto = config.gradient_checkpointing == "auto"
    size = len(subjects) * config.timesteps_per_step
    # An Apple GPU's memory is the machine's own, which swaps long before anything fails.
    at_once = base.device.type == "mps" or size >= _too_large.get(base.denoiser, size + 1)
    attempts = (True,) if at_once else (False, True)
    for recomputes in attempts if is_auto else (config.gradient_checkpointing == "on",):
        try:
            fitted, losses = _optimize(base, space, subjects, config, start.clone(), parts, recomputes, progress)
        except (RuntimeError, MemoryError) as error:
            if recomputes or not is_auto or not is_out_of_memory(error):
                raise
        else:
            _note_failures(base, subjects, config, fitted, losses, failed)
            return fitted, losses
        release_memory(base.device)  # only here has the failed attempt let go of its tensors
        _too_large[base.denoiser] = size
        warnings.warn(
            f"a step of {len(subjects)} identities does not fit into the memory of {base.device}; gradient "
            f"checkpointing is on now, which takes less memory and more time",
            stacklevel=3,
        )


def _optimize(
    base, space, subjects, config: FitConfig, parameters: Tensor, parts, recomputes: bool, progress
) -> tuple[Tensor, Tensor]:
    parameters.requires_grad_(True)
    history = []
    with base.checkpointed(recomputes):
        step = _Step(base, space, subjects, config, parameters, parts, recomputes)
        for number in range(config.steps):
            history.append(step(config.lr * (1 - 0.9 * number / config.steps)))
            if progress is not None:
                progress(number + 1, config.steps)
    fitted = parameters.detach().cpu()
    return fitted, torch.stack(history).cpu() if history else torch.empty(0, len(subjects))


def _note_failures(
    base: BaseModel, subjects, config: FitConfig, fitted: Tensor, losses: Tensor, failed: dict[int, str] | None
) -> None:
    """Say whose fit has diverged and why; nobody's numbers reach another's, so that the others' are right."""
    is_good = torch.isfinite(fitted).flatten(1).all(dim=1) & torch.isfinite(losses).all(dim=0)
    bad = (~is_good).nonzero().flatten().tolist()
    reasons = {row: _why_not_finite(base, subjects[row], config, losses[:, row]) for row in bad}
    if failed is not None:
        failed.update(reasons)
    elif reasons:
        raise DivergedError(reasons, fitted, losses)


def _why_not_finite(base: BaseModel, subject: Subject, config: FitConfig, losses: Tensor) -> str:
    bad = (~torch.isfinite(losses)).nonzero()
    step = int(bad[0]) + 1 if len(bad) else len(losses)
    remedy = f"lower the learning rate {config.lr}"
    if base.dtype == torch.float16:
        remedy = f"half precision cannot hold its numbers: pass --precision fp32 (or bf16), or {remedy}"
    if not torch.isfinite(subject.moments).all():
        remedy = "the base's VAE makes no finite numbers of the photo: try another photo"
        remedy += ", or --precision fp32" if base.dtype == torch.float16 else ", or get the base again"
    elif step == 1 and len(bad) and base.dtype != torch.float16:
        remedy = "the base's answer to the photo is not finite before anything was learned: get the base again"
    return f"the fit diverged at step {step} of {config.steps}; {remedy}"


class _Step:
    """One step of N identities.

    What is random is drawn on the CPU and copied to where `_compute` reads it, which works on tensors that stay in
    place, so that it can be replayed.
    """

    def __init__(
        self, base, space, subjects, config: FitConfig, parameters: Tensor, parts, recomputes: bool = False
    ) -> None:
        self.base, self.space, self.config = base, space, config
        self.parameters, self.parts = parameters, parts
        self.moments = torch.cat([subject.moments for subject in subjects]).to(base.device)
        self.num_photos = [len(subject.moments) for subject in subjects]
        self.prompts = _prepare_prompts(base, subjects)
        self.preservation = _make_preservation(base, subjects, config)
        self.generators = [_generator(config.seed, subject.key, "noise") for subject in subjects]
        self.loss_scale = FP16_LOSS_SCALE if base.dtype == torch.float16 else 1.0
        options = {"betas": (0.9, 0.99), "weight_decay": 0.0}
        self.optimizer = make_adamw(config.optimizer, [parameters], config.lr, capturable=True, **options)
        self.steps_inside = isinstance(self.optimizer, torch.optim.AdamW)  # bitsandbytes' cannot be captured
        # Recomputing saves and restores random states, which a capture does not take.
        graph = "off" if recomputes and config.graph == "auto" else config.graph
        self.replay = Replay(base.device, graph)
        self.inputs: list[Tensor] = []

    def __call__(self, lr: float) -> Tensor:
        """Take a step; returns each identity's denoising loss, ``(N,)``."""
        set_learning_rate(self.optimizer, lr)
        self._load(self._draw())
        losses = self.replay(self._compute)
        if not self.steps_inside:
            self.optimizer.step()
        return losses

    def _draw(self) -> list[Tensor]:
        """What is random in a step, on the CPU: photos by row, noise, and what is preserved."""
        copies, most, photos, first = self.config.timesteps_per_step, self.config.max_timestep, [], 0
        for generator, count in zip(self.generators, self.num_photos, strict=True):
            photos.append(first + torch.randint(0, count, (copies,), generator=generator))
            first += count
        rows = torch.cat(photos)
        noise = draw_noise(self.base, (len(rows), *self.moments.shape[1:]), self.generators, most)
        choice = () if self.preservation is None else self.preservation.choose(copies, self.generators)
        return [rows, *noise, *choice]

    def _load(self, drawn: list[Tensor]) -> None:
        device = self.base.device
        if device.type == "cuda":
            drawn = [tensor.pin_memory() for tensor in drawn]  # so that the copy waits for nothing
        if not self.inputs:
            self.inputs = [torch.empty_like(tensor, device=device) for tensor in drawn]
        for place, tensor in zip(self.inputs, drawn, strict=True):
            place.copy_(tensor, non_blocking=device.type == "cuda")

    def _compute(self) -> Tensor:
        config, base = self.config, self.base
        rows, noise, choice = self.inputs[0], Noise(*self.inputs[1:4]), self.inputs[4:]
        noisy_latents, target = noise_photos(base, self.moments[rows], noise)
        preserved = self.preservation and self.preservation.preserve(noisy_latents, noise.timesteps, Choice(*choice))
        with self.space.apply(*self.parts(self.parameters)):
            denoising, change = base_losses(
                base, self.prompts, noisy_latents, noise.timesteps, target, config.background, preserved
            )
        losses = denoising if change is None else denoising + config.preservation * change
        (gradient,) = torch.autograd.grad(losses.sum() * self.loss_scale, self.parameters)
        gradient.div_(self.loss_scale)
        _clip_per_identity(gradient, config.max_grad_norm)
        self.parameters.grad = gradient
        if self.steps_inside:
            self.optimizer.step()
        return denoising.detach()


def _prepare_prompts(base: BaseModel, subjects: Sequence[Subject]) -> Prompts:
    """Each subject's prompt; a text that many have is read once."""
    places = {text: place for place, text in enumerate(dict.fromkeys(subject.prompt for subject in subjects))}
    rows = torch.tensor([places[subject.prompt] for subject in subjects], device=base.device)
    return base.prepare_prompts(list(places)).rows(rows)


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
