"""Prompt preservation: a prompt has the same effect on the personalised model as on the base model.

At a noisy latent x_t, the base's predictions for "a pencil drawing of a face" and "a face" differ; the personalised
model's predictions for "a pencil drawing of a sks face" and "a sks face" should differ by the same amount:

    || v(x_t, styled [V]) - sg[v(x_t, [V]) + v_base(x_t, styled) - v_base(x_t, plain)] ||^2

DreamBooth's prior preservation (Ruiz et al. 2023, equation 2) needs pictures of the class, and holds styled prompts at
the class: in our measurement they were obeyed, and showed strangers (docs/results.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hypernet.base_models.base import BaseModel, PromptEmbeds, Prompts


@dataclass(frozen=True)
class Preserved:
    """What one step preserves: N subjects, m prompts each.

    Attributes:
        prompts: the subjects' styled ones, N * m, subject by subject.
        rows: at which noisy latents of the step's batch, ``(N * m,)``.
        change: by how much the base's prediction changes there, ``(N * m, c, h, w)`` float32.
    """

    prompts: Prompts
    rows: Tensor
    change: Tensor


class Choice(NamedTuple):
    """What is random in a step's preservation, for N subjects with m prompts each.

    Attributes:
        rows: which noisy latents of the step's batch, ``(N * m,)``, subject by subject.
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
        """Encode all prompts once.

        Args:
            prompts: what each subject's photos show, e.g. ``a sks face``.
            class_prompts: the same without the subject, e.g. ``a face``.
            templates: prompts whose effect is preserved, with ``{}`` for the subject: ``a pencil drawing of {}``.
        """
        self.base, self.num_subjects, self.num_templates = base, len(prompts), len(templates)
        styled = [template.format(prompt) for prompt in prompts for template in templates]
        self.styled, rows = base.prepare_each_once(styled)
        self.styled_rows = rows.view(len(prompts), -1)
        texts = [t.format(prompt) for prompt in dict.fromkeys(class_prompts) for t in ("{}", *templates)]
        self.plain = torch.tensor([texts.index(prompt) for prompt in class_prompts], device=base.device)
        plain = base.prepare_prompts(texts)
        with torch.no_grad():  # one by one, for together they may be more than a step's
            rows = torch.arange(len(texts), device=base.device).split(1)
            self.prompt_embeds = PromptEmbeds.concatenate([base.encode_prompts(plain.rows(row)) for row in rows])

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
    def preserve(self, noisy_latents: Tensor, timesteps: Tensor, choice: Choice) -> Preserved:
        """Find out what the base itself predicts there.

        Args:
            noisy_latents: the step's ``(N * k, c, h, w)``.
            timesteps: ``(N * k,)``.
            choice: on their device.
        """
        rows, templates = choice
        subjects = rows // (len(noisy_latents) // self.num_subjects)
        twice, plain = torch.cat([rows, rows]), self.plain[subjects]
        prompt_embeds = self.prompt_embeds.rows(torch.cat([plain, plain + 1 + templates]))
        before, after = self.base.denoise(noisy_latents[twice], timesteps[twice], prompt_embeds).chunk(2)
        return Preserved(self.styled.rows(self.styled_rows[subjects, templates]), rows, after - before)
