"""Learns where finetunings of the miniature start, from the results after some steps.

First-order MAML (Finn et al. 2017, arXiv:1703.03400): people are finetuned on one photo for some steps, as a user
would; then the loss is that of `testbed.lessons`, on other photos of them, on pictures of prompts, on prompt
preservation and on the likeness of drawn pictures; and the start moves against its gradient at the end of the
finetuning. It continues from the result of Reptile (`hypernet.training.start`), which knows only the finetuning's own
loss and therefore ignores prompts that are lost on the way.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from hypernet.fitting.engine import Subject, fit_flat_lora
from hypernet.network.hypernetwork import HyperNetwork
from testbed import MINIATURE_RECIPE
from testbed.lessons import Lessons


class Start(nn.Module):
    """Flat LoRA factors ``(lora_size(rank),)`` to be learned."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__()
        self.flat = nn.Parameter(flat.clone())


class StartLessons:
    """Step number -> loss."""

    def __init__(self, lessons: Lessons, start: Start, network: HyperNetwork | None, most_steps: int) -> None:
        """Train ``start``.

        Args:
            network: finetune on top of its predictions; None uses no predictions.
            most_steps: finetunings have from 1 to this many steps.
        """
        self.lessons, self.start, self.network, self.most_steps = lessons, start, network, most_steps

    def __call__(self, step: int) -> Tensor:
        """The loss of eight finetuned people, with its first-order gradient with respect to the start."""
        lesson, base, space = self.lessons.draw(step), self.lessons.base, self.lessons.space
        recipe = MINIATURE_RECIPE
        moments = base.encode_photos(lesson.shown)
        people = [
            Subject(str(row), each[None], recipe.trigger, recipe.class_prompt) for row, each in enumerate(moments)
        ]
        steps = int(np.random.default_rng((step, 0x57A7)).integers(1, self.most_steps + 1))
        fit = replace(recipe.lora_fit, steps=steps, seed=step)
        theta = bases = None
        if self.network is not None:
            bases = self.network.bases
            with torch.no_grad():
                theta = self.network(lesson.shown)
        begun = self.start.flat
        fitted, _ = fit_flat_lora(base, space, people, fit, recipe.rank, theta, bases=bases, start=begun.detach())
        fitted = fitted + begun - begun.detach()

        def parts(rows: slice) -> list:
            frozen = [] if theta is None else [space.expand(theta[rows], bases)]
            return [*frozen, space.split_lora(fitted[rows], recipe.rank)]

        return self.lessons.loss(lesson, parts)
