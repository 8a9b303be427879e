"""Prompt preservation: what a prompt changes in the base model, it goes on changing in the personalised one.

At one noisy latent x_t the base answers "a pencil drawing of a face" otherwise than "a face"; the personalised model is
to answer "a pencil drawing of a sks face" otherwise than "a sks face" by that same difference:

    || v(x_t, styled [V]) - sg[v(x_t, [V]) + v_base(x_t, styled) - v_base(x_t, plain)] ||^2

DreamBooth's prior preservation (Ruiz et al. 2023, equation 2) needs pictures of the class, and holds styled prompts at
the class: in our measurement they were obeyed, and showed strangers (docs/results.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hypernet.base_models import BaseModel, PromptEmbeds
from hypernet.diffusion import predict


@dataclass(frozen=True)
class Preserved:
    """What one step preserves: N subjects, m prompts each.

    Attributes:
        token_ids: the subjects' styled prompts, ``(N * m, E, tokens)``, subject by subject.
        rows: which noisy latents of the step's batch they are asked at, ``(N * m,)``.
        change: by how much the base's answer changes there, ``(N * m, 4, h, w)`` float32.
    """

    token_ids: Tensor
    rows: Tensor
    change: Tensor

    def loss(self, plain: Tensor, styled: Tensor) -> Tensor:
        """Mean squared error ``(N * m,)`` of the change from the plain to the styled predictions ``(N * m, ...)``."""
        return (styled - (plain.detach() + self.change)).square().mean(dim=(1, 2, 3))


class Choice(NamedTuple):
    """What is random in a step's preservation, for N subjects with m prompts each.

    Attributes:
        rows: which noisy latents of the step's batch are asked, ``(N * m,)``, subject by subject.
        templates: with which prompt each, ``(N * m,)``.
    """

    rows: Tensor
    templates: Tensor

    def to(self, device: torch.device) -> "Choice":
        return Choice(*(tensor.to(device) for tensor in self))


class PromptPreservation:
    """Says, step by step, what is to be preserved of a base model."""

    def __init__(
        self, base: BaseModel, prompts: Sequence[str], class_prompts: Sequence[str], templates: Sequence[str]
    ) -> None:
        """Ask the base's text encoder once for all prompts.

        Args:
            prompts: what each subject's photos show, e.g. ``a sks face``.
            class_prompts: the same without the subject, e.g. ``a face``.
            templates: prompts whose effect is preserved, with ``{}`` for the subject: ``a pencil drawing of {}``.
        """
        self.base, self.num_subjects, self.num_templates = base, len(prompts), len(templates)
        styled = [template.format(prompt) for prompt in prompts for template in templates]
        ids = {text: base.token_ids(text) for text in dict.fromkeys(styled)}
        self.token_ids = torch.cat([ids[text] for text in styled]).unflatten(0, (-1, len(templates)))
        texts = [t.format(prompt) for prompt in dict.fromkeys(class_prompts) for t in ("{}", *templates)]
        self.plain = torch.tensor([texts.index(prompt) for prompt in class_prompts], device=base.device)
        with torch.no_grad():  # one by one, for together they may be more than a step's
            self.embeds = PromptEmbeds.concatenate([base.encode(base.token_ids(text)) for text in texts])

    def choose(self, copies: int, generators: Sequence[torch.Generator]) -> Choice:
        """Choose, for each subject, half of its ``copies`` noisy latents (rounded up) and prompts; on the CPU.

        Args:
            generators: each subject's own.
        """
        count = (copies + 1) // 2
        rows, templates = [], []
        for subject, generator in enumerate(generators):
            rows.append(subject * copies + torch.randperm(copies, generator=generator)[:count])
            templates.append(torch.randint(self.num_templates, (count,), generator=generator))
        return Choice(torch.cat(rows), torch.cat(templates))

    @torch.no_grad()
    def preserve(self, noisy: Tensor, timesteps: Tensor, choice: Choice) -> Preserved:
        """Ask the base what it answers there.

        Args:
            noisy: the step's ``(N * k, 4, h, w)``.
            timesteps: ``(N * k,)``.
            choice: on their device.
        """
        rows, templates = choice
        subjects = rows // (len(noisy) // self.num_subjects)
        twice, plain = torch.cat([rows, rows]), self.plain[subjects]
        embeds = self.embeds.rows(torch.cat([plain, plain + 1 + templates]))
        before, after = predict(self.base, noisy[twice], timesteps[twice], embeds).chunk(2)
        return Preserved(self.token_ids[subjects, templates], rows, after - before)
