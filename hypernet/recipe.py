"""How to fit and how to personalise: plain configs, light to import, so that `hdb --help` shows their defaults."""

import math
from collections.abc import Callable
from dataclasses import dataclass

DEFAULT_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all) after every step."""


@dataclass(frozen=True)
class FitConfig:
    """How to fit.

    Attributes:
        steps: optimiser steps.
        lr: peak learning rate of AdamW; decays linearly to a tenth.
        timesteps_per_step: noisy copies of a photo in each step.
        max_grad_norm: each identity's gradient is clipped to this norm.
        seed: keys the noise, together with the identity's key.
        gradient_checkpointing: recompute activations in the backward pass, for less memory.
    """

    steps: int
    lr: float
    timesteps_per_step: int = 1
    max_grad_norm: float = 1.0
    seed: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; expected 0 or more")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; expected a finite number above 0")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; expected more than 0")
        if self.timesteps_per_step < 1:
            raise ValueError(f"timesteps_per_step is {self.timesteps_per_step}; expected 1 or more")


@dataclass(frozen=True)
class PersonalizeConfig:
    """How to personalise.

    Attributes:
        token: the rare word that will mean this person.
        prompt: what the photos show; ``[V]`` stands for the token.
        theta_steps, theta_lr: the LiDB fit; 0 steps leaves theta at the identity.
        steps, lr, rank: the rank-relaxed finetuning; 0 steps leaves it out.
        timesteps_per_step: noisy copies of the photos in each step.
        seed: keys all noise.
        crop: find the face and crop to it; False takes the middle square of the photo.
        guidance: classifier-free guidance of the preview pictures.
    """

    token: str = "sks"
    prompt: str = "a [V] face"
    theta_steps: int = 100
    theta_lr: float = 5e-3
    steps: int = 40
    lr: float = 5e-4
    rank: int = 4
    timesteps_per_step: int = 1
    seed: int = 0
    crop: bool = True
    guidance: float = 7.5

    def __post_init__(self):
        if "[V]" not in self.prompt:
            raise ValueError(f"prompt is {self.prompt!r}; it must hold [V], which stands for the person")
        if not self.token.strip():
            raise ValueError("token is empty; pass a rare word such as sks")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected 1 or more")
        _ = self.theta_fit, self.lora_fit  # they check the rest

    @property
    def trigger(self) -> str:
        """The prompt that calls the person up, e.g. ``a sks face``."""
        return self.prompt.replace("[V]", self.token)

    @property
    def theta_fit(self) -> FitConfig:
        return FitConfig(self.theta_steps, self.theta_lr, self.timesteps_per_step, seed=self.seed)

    @property
    def lora_fit(self) -> FitConfig:
        return FitConfig(self.steps, self.lr, self.timesteps_per_step, seed=self.seed + 1)
