"""The fitting engine: N identities at once on one frozen base, each with weights of its own.

Pre-optimising thousands, personalising one and personalising a folder are the same call with different N. It fits
either LiDB's theta (paper, section 4.1) or, on top of a frozen theta, LoRA factors of rank r > 1 (section 4.3). The
result for one identity does not depend on who shares the batch: noise is keyed by identity, losses are summed,
gradients are clipped per identity and Adam works elementwise.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hypernet.base_models.base import BaseModel, Prompts
from hypernet.devices import release_memory
from hypernet.errors import is_out_of_memory
from hypernet.fitting.likeness import Drawn, Likeness
from hypernet.fitting.losses import base_losses
from hypernet.fitting.noise import Noise, draw_noise, noise_photos
from hypernet.fitting.preservation import Choice, PromptPreservation
from hypernet.fitting.replay import Replay
from hypernet.fitting.running import Observer, RunningFit
from hypernet.inputs.people import derive_seed
from hypernet.inputs.recognition import Recogniser
from hypernet.optimizers import make_adamw, set_learning_rate
from hypernet.recipe import FitConfig, Progress
from lidb_peft import LiDBSpace, LoraFactors, combine
from lidb_peft.stacks import Stacks

FP16_LOSS_SCALE = 1024.0
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Subject:
    """One identity to fit.

    Attributes:
        key: identifies the person; noise and timesteps follow from the key and the seed.
        moments: VAE moments of its photos, ``(photos, 2 * c, h, w)``.
        prompt: what the photos show, e.g. ``a sks face``.
        class_prompt: the same without the subject, ``a face``; prompt preservation needs it.
        embedding: of the person in the photos, ``(width,)`` of unit length, by the network that recognises people;
            likeness needs it.
    """

    key: str
    moments: Tensor
    prompt: str
    class_prompt: str = ""
    embedding: Tensor | None = None


class DivergedError(ValueError):
    """The fits of some subjects diverged.

    Attributes:
        failed: row -> reason.
        fitted, losses: what the fit returns; rows that are not in ``failed`` are valid.
    """

    def __init__(self, failed: dict[int, str], fitted: Tensor, losses: Tensor) -> None:
        super().__init__(next(iter(failed.values())))
        self.failed, self.fitted, self.losses = failed, fitted, losses


@dataclass
class KeptStep:
    """The step of the last fit with its CUDA graph, for reuse by the next people with as many photos and the same
    prompts.

    Capturing takes three eager steps and as long as about 40 replayed ones. The graph holds the memory of the step's
    activations, so drop this before something else, such as drawing, needs it.
    """

    key: tuple = ()
    step: "_Step | None" = None

    def release(self) -> None:
        self.key, self.step = (), None


def fit_theta(
    base: BaseModel,
    space: LiDBSpace,
    subjects: Sequence[Subject],
    config: FitConfig,
    start: Tensor | None = None,
    progress: Progress | None = None,
    bases: Mapping[str, Tensor] | None = None,
    failed: dict[int, str] | None = None,
    kept: KeptStep | None = None,
    observe: Observer | None = None,
    resume: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit one theta per subject, all from the same starting vector.

    Args:
        start: ``(N, L, row)`` or ``(L, row)``; default ``space.theta_0``.
        bases: learned bases by label; None uses the frozen ones.
        failed: filled with the subjects whose fit diverged, row -> reason; their results are not finite. None raises
            instead.
        kept: step of the previous fit, reused and replaced; None keeps nothing.
        observe: called with the `RunningFit` after each step; True ends the fit early.
        resume: the state of a fit that ended early, see `RunningFit.state`, to continue.

    Returns:
        theta ``(N, L, row)`` and losses ``(steps, N)``, both float32 on the CPU.

    Raises:
        ValueError: ``start``, ``resume`` or the subjects do not fit, or the fit diverged.
    """
    _check_subjects(subjects)
    start = space.theta_0 if start is None else start
    _check_thetas(space, start, len(subjects))
    start = start.expand(len(subjects), *start.shape[-2:]).to(base.device, torch.float32)
    bases = _frozen(bases, base.device)
    trained = _Trained(start, lambda values: space.expand(values, bases), bases)
    return _fit(_Fit(base, space, subjects, config, trained), progress, failed, kept, observe, resume)


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
    kept: KeptStep | None = None,
    observe: Observer | None = None,
    resume: Mapping[str, Any] | None = None,
    recogniser: Recogniser | None = None,
) -> tuple[list[LoraFactors], Tensor]:
    """Rank-relaxed finetuning: fit a LoRA of rank ``rank`` per subject on top of its frozen theta.

    Args:
        theta: ``(N, L, row)`` or ``(L, row)``, frozen; None fits a plain LoRA.
        bases: learned bases by label; None uses the frozen ones.
        start: the LoRA that every fit starts from, ``(lora_size(rank),)`` as `LiDBSpace.split_lora` views it; None
            initialises each subject's at random, with a zero update.
        failed, kept, observe, resume: as for `fit_theta`.
        recogniser: whose embeddings the subjects have; required if ``config.likeness``.

    Returns:
        Per subject the exact factors of theta and LoRA together, of rank r + ``rank``, and losses ``(steps, N)``, all
        on the CPU.

    Raises:
        ValueError: rank < 1, theta or the subjects do not fit, or the fit diverged.
    """
    lora, losses = fit_flat_lora(
        base, space, subjects, config, rank, theta, progress, bases, start, failed, kept, observe, resume, recogniser
    )
    thetas = [None] * len(subjects) if theta is None else theta.expand(len(subjects), *theta.shape[-2:])
    return [relaxed_factors(space, own, rank, one, bases) for own, one in zip(lora, thetas, strict=True)], losses


def relaxed_factors(
    space: LiDBSpace, lora: Tensor, rank: int, theta: Tensor | None = None, bases: Mapping[str, Tensor] | None = None
) -> LoraFactors:
    """The exact factors, on the CPU, of a flat LoRA ``(lora_size(rank),)`` and theta ``(L, row)`` together."""
    factors = space.lora_factors(lora, rank)
    return factors if theta is None else combine(space.factors(theta.cpu(), _frozen(bases, _CPU)), factors)


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
    kept: KeptStep | None = None,
    observe: Observer | None = None,
    resume: Mapping[str, Any] | None = None,
    recogniser: Recogniser | None = None,
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
    frozen = None if theta is None else space.expand(theta.to(base.device, torch.float32), bases)
    trained = _Trained(first.to(base.device), lambda values: space.split_lora(values, rank), frozen=frozen)
    return _fit(_Fit(base, space, subjects, config, trained, recogniser), progress, failed, kept, observe, resume)


class _Trained(NamedTuple):
    """What a fit trains.

    Attributes:
        start: one flat buffer of parameters, ``(N, ...)``.
        to_factors: maps it to the factors to apply.
        bases: learned ones that ``to_factors`` reads.
        frozen: further factors that are applied.
    """

    start: Tensor
    to_factors: Callable[[Tensor], Stacks]
    bases: Mapping[str, Tensor] | None = None
    frozen: Stacks | None = None


class _Fit(NamedTuple):
    """What is fitted to whom, and how."""

    base: BaseModel
    space: LiDBSpace
    subjects: Sequence[Subject]
    config: FitConfig
    trained: _Trained
    recogniser: Recogniser | None = None


_too_large: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Denoiser -> the size of a step that did not fit into memory without checkpointing, so that it is not tried again."""


def _fit(
    fit: _Fit,
    progress: Progress | None,
    failed: dict[int, str] | None,
    kept: KeptStep | None,
    observe: Observer | None,
    resume: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """Optimise; returns the trained ``trained.start`` and losses ``(steps, N)``, on the CPU."""
    base, subjects, config = fit.base, fit.subjects, fit.config
    if resume is not None:
        kept = None  # resuming puts other tensors into the optimiser's state, which a kept step's graph would not see
    is_auto = config.gradient_checkpointing == "auto"
    size = len(subjects) * config.timesteps_per_step
    # An Apple GPU shares the machine's memory, which swaps long before an allocation fails.
    at_once = base.device.type == "mps" or size >= _too_large.get(base.denoiser, size + 1)
    attempts = (True,) if at_once else (False, True)
    for recomputes in attempts if is_auto else (config.gradient_checkpointing == "on",):
        try:
            fitted, losses = _optimize(fit, recomputes, progress, kept, observe, resume)
        except (RuntimeError, MemoryError) as error:
            if kept is not None:
                kept.release()
            if recomputes or not is_auto or not is_out_of_memory(error):
                raise
        else:
            if kept is None and base.device.type == "cuda":
                torch.cuda.empty_cache()  # leaves memory for drawing and other programs
            _note_failures(fit, fitted, losses, failed)
            return fitted, losses
        release_memory(base.device)  # only here has the failed attempt released its tensors
        _too_large[base.denoiser] = size
        warnings.warn(
            f"a step of {len(subjects)} identities does not fit into the memory of {base.device}; gradient "
            f"checkpointing is on now, which takes less memory and more time",
            stacklevel=3,
        )
    raise AssertionError("the last attempt returns or raises")


def _optimize(
    fit: _Fit,
    recomputes: bool,
    progress: Progress | None,
    kept: KeptStep | None,
    observe: Observer | None,
    resume: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    steps, lr = fit.config.steps, fit.config.lr
    with fit.base.checkpointed(recomputes):
        step = _take_step(fit, recomputes, kept)
        run = RunningFit(step.parameters, step.optimizer, step.all_generators, steps)
        if resume is not None:
            run.load(resume)
        for number in range(run.step, steps):
            run.losses.append(step(lr * (1 - 0.9 * number / steps)))
            is_ended = observe is not None and observe(run)
            if progress is not None:
                progress(number + 1, steps)
            if is_ended:
                break
    return run.weights(), run.all_losses()


def _note_failures(fit: _Fit, fitted: Tensor, losses: Tensor, failed: dict[int, str] | None) -> None:
    """Find the fits that diverged, and why; fits do not affect each other, so the others are valid."""
    is_good = torch.isfinite(fitted).flatten(1).all(dim=1) & torch.isfinite(losses).all(dim=0)
    bad = (~is_good).nonzero().flatten().tolist()
    reasons = {row: _why_not_finite(fit.base, fit.subjects[row], fit.config, losses[:, row]) for row in bad}
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


def _take_step(fit: _Fit, recomputes: bool, kept: KeptStep | None) -> "_Step":
    """A new step, or the kept one if it reads and writes exactly the same tensors."""
    if kept is None:
        return _Step(fit, recomputes)
    key = _key(fit, recomputes)
    if kept.step is None or kept.key != key:
        kept.release()  # before another one allocates as much memory
        kept.step = _Step(fit, recomputes)
        kept.key = key if kept.step.steps_inside else ()  # the state of bitsandbytes' optimiser is its own
    else:
        kept.step.restart(fit)
    return kept.step


def _key(fit: _Fit, recomputes: bool) -> tuple:
    """Everything that a step depends on: shapes, texts, settings, and addresses of weights, which may have moved."""
    base, space, subjects, config, trained, _ = fit
    weights = [tensor for model in base.adapted.values() for tensor in (*model.parameters(), *model.buffers())]
    weights += list((trained.bases or {}).values())
    return (
        id(base),
        id(space),
        replace(config, steps=0, lr=1.0, seed=0),
        recomputes,
        trained.start.shape,
        trained.frozen is None,
        sum(len(subject.moments) for subject in subjects),
        tuple((subject.prompt, subject.class_prompt) for subject in subjects),
        tuple(tensor.data_ptr() for tensor in weights),
    )


class _Step:
    """One step of N identities.

    Random numbers are drawn on the CPU and copied to where `_compute` reads them; it works on tensors at fixed
    addresses, so that it can be replayed.
    """

    def __init__(self, fit: _Fit, recomputes: bool = False) -> None:
        base, _, subjects, config, trained, _ = fit
        self.base, self.space, self.config, self.trained = base, fit.space, config, trained
        self.parameters = trained.start.clone().requires_grad_(True)
        self.moments = torch.cat([subject.moments for subject in subjects]).to(base.device)
        self.prompts = _prepare_prompts(base, subjects)
        self.preservation = _make_preservation(base, subjects, config)
        self.likeness = _make_likeness(fit)
        self.drawn: Drawn | None = None
        self._begin(subjects, config.seed)
        self.loss_scale = FP16_LOSS_SCALE if base.dtype == torch.float16 else 1.0
        options = {"betas": (0.9, 0.99), "weight_decay": 0.0}
        self.optimizer = make_adamw(config.optimizer, [self.parameters], config.lr, capturable=True, **options)
        self.steps_inside = isinstance(self.optimizer, torch.optim.AdamW)  # bitsandbytes' cannot be captured
        # Recomputing saves and restores random states, which a capture does not take; pictures are not drawn alike.
        is_steady = not recomputes and self.likeness is None
        graph = config.graph if is_steady or config.graph != "auto" else "off"
        self.replay = Replay(base.device, graph)
        self.inputs: list[Tensor] = []

    def _begin(self, subjects: Sequence[Subject], seed: int) -> None:
        self.num_photos = [len(subject.moments) for subject in subjects]
        self.generators = [_generator(seed, subject.key, "noise") for subject in subjects]
        self.shared_generator = _generator(seed, "", "stop")

    @property
    def all_generators(self) -> list[torch.Generator]:
        """Those that a resumed fit needs."""
        return self.generators if self.likeness is None else [*self.generators, self.shared_generator]

    @torch.no_grad()
    def restart(self, fit: _Fit) -> None:
        """Start again with other people, in the existing tensors."""
        self._begin(fit.subjects, fit.config.seed)
        self.likeness = _make_likeness(fit)
        self.moments.copy_(torch.cat([subject.moments for subject in fit.subjects]))
        self.parameters.copy_(fit.trained.start)
        if fit.trained.frozen is not None and self.trained.frozen is not None:
            for place, factors in zip(_tensors(self.trained.frozen), _tensors(fit.trained.frozen), strict=True):
                place.copy_(factors)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    def __call__(self, lr: float) -> Tensor:
        """Take a step; returns each identity's denoising loss, ``(N,)``."""
        set_learning_rate(self.optimizer, lr)
        self._load(self._draw())
        losses = self.replay(self._compute)
        if not self.steps_inside:
            self.optimizer.step()
        return losses

    def _draw(self) -> list[Tensor]:
        """The random part of a step, on the CPU: photos by row, noise, and preserved prompts."""
        copies, most, photos, first = self.config.timesteps_per_step, self.config.max_timestep, [], 0
        for generator, count in zip(self.generators, self.num_photos, strict=True):
            photos.append(first + torch.randint(0, count, (copies,), generator=generator))
            first += count
        rows = torch.cat(photos)
        noise = draw_noise(self.base, (len(rows), *self.moments.shape[1:]), self.generators, most)
        choice = () if self.preservation is None else self.preservation.choose(copies, self.generators)
        if self.likeness is not None:
            self.drawn = self.likeness.choose(self.generators, self.shared_generator)
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
        preserved = None
        if self.preservation is not None:
            preserved = self.preservation.preserve(noisy_latents, noise.timesteps, Choice(*choice))
        with self._applied():
            denoising, change = base_losses(
                base, self.prompts, noisy_latents, noise.timesteps, target, config.background, preserved
            )
        gradient = self._gradient(denoising if change is None else denoising + config.preservation * change)
        if self.likeness is not None:
            assert self.drawn is not None, "pictures of which nothing was chosen"
            with self._applied():
                unlike = self.likeness(self.drawn)
            if unlike.requires_grad:  # somebody is seen in the pictures
                gradient += self._gradient(config.likeness * unlike)
        _clip_per_identity(gradient, config.max_grad_norm)
        self.parameters.grad = gradient
        if self.steps_inside:
            self.optimizer.step()
        return denoising.detach()

    def _applied(self) -> AbstractContextManager[None]:
        beside = [] if self.trained.frozen is None else [self.trained.frozen]
        return self.space.apply(*beside, self.trained.to_factors(self.parameters))

    def _gradient(self, losses: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(losses.sum() * self.loss_scale, self.parameters)
        return gradient.div_(self.loss_scale)


def _tensors(stacks: Stacks) -> tuple[Tensor, ...]:
    return (*stacks.lora_A, *stacks.lora_B)


def _prepare_prompts(base: BaseModel, subjects: Sequence[Subject]) -> Prompts:
    """Each subject's prompt; a text shared by many is encoded once."""
    prompts, rows = base.prepare_each_once([subject.prompt for subject in subjects])
    return prompts.rows(rows)


def _make_preservation(base: BaseModel, subjects: Sequence[Subject], config: FitConfig) -> PromptPreservation | None:
    if not config.preservation:
        return None
    nameless = [subject.key for subject in subjects if not subject.class_prompt]
    if nameless:
        raise ValueError(
            f"the subject {nameless[0]!r} has no class_prompt; prompt preservation needs it, e.g. 'a face'"
        )
    prompts, class_prompts = zip(*((subject.prompt, subject.class_prompt) for subject in subjects), strict=True)
    return PromptPreservation(base, prompts, class_prompts, config.preserved)


def _make_likeness(fit: _Fit) -> Likeness | None:
    config, subjects = fit.config, fit.subjects
    if not (config.likeness and config.steps):
        return None
    if fit.recogniser is None:
        raise ValueError("likeness needs a network that recognises people; pass a recogniser, or set likeness to 0")
    embeddings = [subject.embedding for subject in subjects if subject.embedding is not None]
    if len(embeddings) < len(subjects):
        raise ValueError("a subject has no embedding, which likeness needs; make subjects with the recogniser")
    guidance = fit.base.guidance if config.guidance is None else config.guidance
    templates = config.preserved if config.preservation else ()
    prompts = [subject.prompt for subject in subjects]
    return Likeness(fit.base, fit.recogniser, prompts, torch.stack(embeddings), templates, guidance)


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
    """An identity's own generator, on the CPU so that the numbers are the same for every device."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, key))


def _clip_per_identity(gradient: Tensor, max_norm: float) -> None:
    norms = gradient.flatten(1).norm(dim=1)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
