"""Prompt preservation: what a prompt changes in the base model, it goes on changing in the personalised one.

At one noisy latent x_t the base answers "a pencil drawing of a face" otherwise than "a face"; the personalised model is
to answer "a pencil drawing of a sks face" otherwise than "a sks face" by that same difference:

    || v(x_t, styled [V]) - sg[v(x_t, [V]) + v_base(x_t, styled) - v_base(x_t, plain)] ||^2

DreamBooth's prior preservation (Ruiz et al. 2023, equation 2) needs pictures of the class, and holds styled prompts at
the class: in our measurement they were obeyed, and showed strangers (docs/how-it-works.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


class PromptPreservation:
    """Draws, step by step, what is to be preserved of a base model."""

    def __init__(
        self, base: BaseModel, prompts: Sequence[str], class_prompts: Sequence[str], templates: Sequence[str]
    ) -> None:
        """Ask the base's text encoder once for all prompts.

        Args:
            prompts: what each subject's photos show, e.g. ``a sks face``.
            class_prompts: the same without the subject, e.g. ``a face``.
            templates: prompts whose effect is preserved, with ``{}`` for the subject: ``a pencil drawing of {}``.
        """
        self.base, self.prompts, self.class_prompts, self.templates = base, prompts, class_prompts, templates
        self.token_ids = {t.format(prompt): base.token_ids(t.format(prompt)) for prompt in prompts for t in templates}
        texts = dict.fromkeys(t.format(prompt) for prompt in class_prompts for t in ("{}", *templates))
        with torch.no_grad():
            self.embeds = {text: base.encode(base.token_ids(text)) for text in texts}

    @torch.no_grad()
    def draw(self, noisy: Tensor, timesteps: Tensor, generators: Sequence[torch.Generator]) -> Preserved:
        """Choose, for each subject, half of its noisy latents (rounded up) and a prompt for each; ask the base there.

        Args:
            noisy: the step's ``(N * k, 4, h, w)``.
            timesteps: ``(N * k,)``.
            generators: each subject's own.
        """
        copies = len(noisy) // len(self.prompts)
        count = (copies + 1) // 2
        token_ids, plain, styled, rows = [], [], [], []
        for subject, generator in enumerate(generators):
            rows.append(subject * copies + torch.randperm(copies, generator=generator)[:count])
            for choice in torch.randint(len(self.templates), (count,), generator=generator).tolist():
                template, class_prompt = self.templates[choice], self.class_prompts[subject]
                token_ids.append(self.token_ids[template.format(self.prompts[subject])])
                plain.append(self.embeds[class_prompt])
                styled.append(self.embeds[template.format(class_prompt)])
        chosen = torch.cat(rows).to(noisy.device)
        twice = torch.cat([chosen, chosen])
        embeds = PromptEmbeds.concatenate(plain + styled)
        before, after = predict(self.base, noisy[twice], timesteps[twice], embeds).chunk(2)
        return Preserved(torch.cat(token_ids), chosen, after - before)
