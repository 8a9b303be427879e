"""How to fit and how to personalise: plain configs, light to import, so that `hdb --help` shows their defaults."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

DEFAULT_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DEFAULT_ENCODER = "google/vit-huge-patch14-224-in21k"

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all) after every step."""
TARGET_STEPS = 100
"""Steps of the LiDB fit that makes a target, by default."""

NUM_TIMESTEPS = 1000
"""Of a Stable Diffusion's noise schedule."""

StageProgress = Callable[[str, int, int | None], None]
"""Called with (stage, steps done, steps in all or None if nobody knows) after every step."""

PRESERVED = (
    "a pencil drawing of {}", "a watercolour painting of {}", "an oil painting of {}", "a cartoon of {}",
    "{} at night", "{} on a beach", "{} in a forest", "{} in a city", "{} wearing a hat", "{} wearing sunglasses",
)  # fmt: skip
"""Prompts whose effect a fit preserves, by default; others gain from it too."""


ATTENTIONS = ("auto", "sdpa", "xformers")
AUTO = ("auto", "on", "off")
OPTIMIZERS = ("auto", "adamw", "adamw8bit")
FACE_DETECTORS = ("auto", "yunet", "cascade")
FACES = ("largest", "leftmost", "rightmost")
CROP_CHOICES = {"face_detector": FACE_DETECTORS}
QUANTIZATIONS = ("nf4", "int8")
FIT_CHOICES = {"optimizer": OPTIMIZERS, "gradient_checkpointing": AUTO, "graph": AUTO}
PERSONALIZE_CHOICES = {"adapt": ("denoiser", "all")}
TRAIN_CHOICES = {"schedule": ("cosine", "linear"), "optimizer": OPTIMIZERS, "compare": ("updates", "factors")}


Config = TypeVar("Config", bound="FitConfig | PersonalizeConfig | PreoptimizeConfig | TrainConfig")


def changed(config: Config, options: Mapping[str, Any]) -> Config:
    """Return a config with other values of some fields.

    Raises:
        ValueError: it has no such field, or the value is out of range.
    """
    known = [field.name for field in fields(config)]
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0) or known
            raise ValueError(f"{name!r} is not an option of {type(config).__name__}; did you mean {nearest[0]!r}?")
    return replace(config, **options)


def _check_choices(config: object, choices: dict[str, tuple[str, ...]]) -> None:
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is {getattr(config, name)!r}; choose {', '.join(known[:-1])} or {known[-1]}")


def check_face(face: str) -> None:
    """Raise ValueError unless ``face`` is one of `FACES` or a number from 1 on, as text."""
    if face not in FACES and not (face.isdecimal() and int(face)):
        raise ValueError(f"face is {face!r}; choose {', '.join(FACES)}, or its number from the left, such as 2")


@dataclass(frozen=True)
class FitConfig:
    """How to fit.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate of AdamW; decays linearly to a tenth.
        timesteps_per_step: noisy copies of a photo in each step.
        max_timestep: noisy copies are of timesteps below this one of the schedule's 1,000.
        background: how much the photo's background counts; 1 as much as the head.
        preservation: weight of prompt preservation, see `hypernet.fitting.preservation`; 0 leaves it out.
        preserved: the prompts whose effect is preserved; ``{}`` stands for the subject.
        max_grad_norm: each identity's gradient is clipped to this norm.
        seed: keys the noise, together with the identity's key.
        optimizer: ``adamw``, which ``auto`` is, or ``adamw8bit`` by bitsandbytes, no saving on so few numbers.
        gradient_checkpointing: recompute activations in the backward pass, for less memory: ``on``, ``off``, or
            ``auto``, on if a step does not fit into the memory of a CUDA device otherwise.
        graph: replay the step as a CUDA graph, see `hypernet.fitting.replay`: ``on``, ``off``, or ``auto``, on where
            it can be done and nothing is recomputed.
    """

    steps: int
    lr: float
    timesteps_per_step: int = 1
    max_timestep: int = NUM_TIMESTEPS
    background: float = 1.0
    preservation: float = 0.0
    preserved: tuple[str, ...] = PRESERVED
    max_grad_norm: float = 1.0
    seed: int = 0
    optimizer: str = "adamw"
    gradient_checkpointing: str = "auto"
    graph: str = "auto"

    def __post_init__(self):
        _check_choices(self, FIT_CHOICES)
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; expected 0 or more")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; expected a finite number above 0")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; expected more than 0")
        for name in ("background", "preservation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number, 0 or more")
        if self.preservation and not all("{}" in prompt for prompt in self.preserved or ("",)):
            raise ValueError(f"preserved is {self.preserved}; expected prompts with {{}}, which stands for the subject")
        if self.timesteps_per_step < 1:
            raise ValueError(f"timesteps_per_step is {self.timesteps_per_step}; expected 1 or more")
        if not 1 <= self.max_timestep <= NUM_TIMESTEPS:
            raise ValueError(f"max_timestep is {self.max_timestep}; expected 1 to {NUM_TIMESTEPS}")


@dataclass(frozen=True)
class PersonalizeConfig:
    """How to personalise.

    Attributes:
        token: the rare word that will mean this person.
        prompt: what the photos show; ``[V]`` stands for the token.
        adapt: which layers, where no hypernetwork and no theta file says so: those of the ``denoiser``, or
            ``all``, those of the text encoders too, which forget prompts sooner than they learn a person.
        theta_steps, theta_lr: the LiDB fit; 0 steps leaves theta at the identity, or at its prediction. What it adds,
            as many steps of finetuning add sooner.
        steps, lr, rank: the rank-relaxed finetuning; 0 steps leaves it out.
        timesteps_per_step: noisy copies of the photos in each step.
        max_timestep: the finetuning's noisy copies are of timesteps below this one of the schedule's 1,000. What
            pictures owe to more noise than that, their composition and much of what a prompt asks for, is not learned
            from the photos.
        background, preservation, optimizer, gradient_checkpointing: of both fits, see `FitConfig`.
        seed: random seed.
        crop: find the face and crop to it; False takes the middle square of the photo.
        face_detector: ``yunet``, OpenCV's ``cascade``, or ``auto``, YuNet where it can be had.
        face: which face of a photo with several: the ``largest`` clear one, ``leftmost``, ``rightmost``, or its number,
            counted from the left from 1.
        guidance: guidance scale of the preview pictures; None is the base's own, such as 7.5 for Stable Diffusion.
    """

    token: str = "sks"
    prompt: str = "a [V] face"
    adapt: str = "all"
    theta_steps: int = 0
    theta_lr: float = 5e-3
    steps: int = 80
    lr: float = 5e-4
    rank: int = 4
    timesteps_per_step: int = 1
    max_timestep: int = NUM_TIMESTEPS
    background: float = 0.0
    preservation: float = 1.0
    optimizer: str = "adamw"
    gradient_checkpointing: str = "auto"
    seed: int = 0
    crop: bool = True
    face_detector: str = "auto"
    face: str = "largest"
    guidance: float | None = None

    def __post_init__(self):
        _check_choices(self, PERSONALIZE_CHOICES | CROP_CHOICES)
        check_face(self.face)
        if "[V]" not in self.prompt:
            raise ValueError(f"prompt is {self.prompt!r}; it must hold [V], which stands for the person")
        if not self.token.strip():
            raise ValueError("token is empty; pass a rare word such as sks")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected 1 or more")
        if self.preservation and not self.class_prompt:
            raise ValueError(
                f"prompt is {self.prompt!r}, of which nothing is left without the person; say what the person is, as "
                "in 'a [V] face', or set preservation to 0"
            )
        _ = self.theta_fit, self.lora_fit  # they check the rest

    @property
    def trigger(self) -> str:
        """The prompt that calls the person up, e.g. ``a sks face``."""
        return self.prompt.replace("[V]", self.token)

    @property
    def class_prompt(self) -> str:
        """The prompt without the person, e.g. ``a face``."""
        return " ".join(self.prompt.replace("[V]", "").split())

    @property
    def theta_fit(self) -> FitConfig:
        return self._fit(self.theta_steps, self.theta_lr, self.seed)

    @property
    def lora_fit(self) -> FitConfig:
        return self._fit(self.steps, self.lr, self.seed + 1, max_timestep=self.max_timestep)

    def _fit(self, steps: int, lr: float, seed: int, **own: Any) -> FitConfig:
        shared = ("timesteps_per_step", "background", "preservation", "optimizer", "gradient_checkpointing")
        return FitConfig(steps, lr, seed=seed, **own, **{name: getattr(self, name) for name in shared})


@dataclass(frozen=True)
class PreoptimizeConfig:
    """How to fit a theta to each person of a data set.

    Attributes:
        recipe: its LiDB fit, prompt and cropping are everybody's.
        batch: people fitted at once; None is as many as fit into the GPU's memory, or a few on a CPU.
    """

    recipe: PersonalizeConfig = PersonalizeConfig(theta_steps=TARGET_STEPS)
    batch: int | None = None

    def __post_init__(self):
        if self.recipe.theta_steps < 1:
            raise ValueError(f"theta_steps is {self.recipe.theta_steps}; choose 1 or more, or nothing would be fitted")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch is {self.batch}; expected 1 or more, or None for auto")


@dataclass(frozen=True)
class StartConfig:
    """How to learn where finetunings start.

    Attributes:
        rounds: in each, some people are finetuned from the present start, which moves towards what becomes of them.
        people: in each round.
        inner_steps: of their finetuning.
        rate: how far the start moves at first, 1 all the way to the mean; it decays linearly to 0.
        seed: keys who is in which round, and all noise.
    """

    rounds: int = 50
    people: int = 16
    inner_steps: int = 10
    rate: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name in ("rounds", "people", "inner_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is {self.rate}; expected more than 0 and at most 1")

    def inner_fit(self, fit: FitConfig, number: int) -> FitConfig:
        """How round ``number`` finetunes: as ``fit`` does, for fewer steps and with noise of its own."""
        return replace(fit, steps=self.inner_steps, seed=self.seed * 1_000_003 + number)


@dataclass(frozen=True)
class TrainConfig:
    """How to train a hypernetwork.

    Attributes:
        steps: optimiser steps.
        lr, warmup_steps, schedule: peak learning rate, linear steps up to it, and ``cosine`` or ``linear`` to zero.
        batch, accumulation: people in each process and pass, and passes in each step.
        optimizer: ``adamw``, which ``auto`` is, or ``adamw8bit`` by bitsandbytes.
        denoising, weights, preservation: what each term of the loss counts (paper, equation 2: alpha and beta); 0
            leaves it out. ``weights`` needs targets; of preservation see `hypernet.fitting.preservation`.
        compare: what ``weights`` compares with the targets: the ``updates``, or theta's own numbers, the ``factors``.
        deep_supervision: the loss is on every round of refinement, not on the last alone.
        timesteps_per_step, background, preserved: of the base's losses, see `FitConfig`.
        same_photo: the photo that is denoised is the one the encoder sees, also of a person with several.
        flip: mirror half of the photos.
        jitter: up to this fraction of a photo's side is cut off.
        caption_dropout: how often the prompt is the empty one.
        validation: the fraction of the people that is held out.
        crop: find each face and crop to it; False takes the middle square.
        face_detector: ``yunet``, OpenCV's ``cascade``, or ``auto``, YuNet where it can be had.
        seed: keys the order of people, all noise and what is held out.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
        log_every, checkpoint_every: steps; each checkpoint comes with a validation and sample pictures.
        workers: processes that decode photos; 0 decodes between the steps.
    """

    steps: int = 20_000
    lr: float = 1e-4
    warmup_steps: int = 200
    schedule: str = "cosine"
    batch: int = 4
    accumulation: int = 1
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    denoising: float = 1.0
    weights: float = 0.0
    preservation: float = 0.0
    compare: str = "updates"
    deep_supervision: bool = False
    timesteps_per_step: int = 1
    background: float = 1.0
    preserved: tuple[str, ...] = PRESERVED
    same_photo: bool = False
    flip: bool = False
    jitter: float = 0.0
    caption_dropout: float = 0.0
    validation: float = 0.02
    crop: bool = True
    face_detector: str = "auto"
    seed: int = 0
    gradient_checkpointing: bool = False
    log_every: int = 10
    checkpoint_every: int = 500
    workers: int = 4

    def __post_init__(self):
        for name in ("steps", "batch", "accumulation", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("denoising", "weights", "weight_decay", "warmup_steps", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number, 0 or more")
        for name in ("jitter", "caption_dropout", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more and less than 1")
        _check_choices(self, TRAIN_CHOICES | CROP_CHOICES)
        if not self.denoising and not self.weights:
            raise ValueError("denoising and weights are both 0; nothing would be learned: choose at least one above 0")
        # What it has in common with a fit is checked there.
        FitConfig(
            self.steps, self.lr, self.timesteps_per_step, background=self.background, preservation=self.preservation,
            preserved=self.preserved, max_grad_norm=self.max_grad_norm,
        )  # fmt: skip

    @property
    def augments(self) -> bool:
        """Whether a photo differs from step to step."""
        return self.flip or self.jitter > 0

    @property
    def needs_base(self) -> bool:
        """Whether a term asks the base; comparing weights alone does not."""
        return self.denoising > 0 or self.preservation > 0
