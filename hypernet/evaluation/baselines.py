"""DreamBooth and Textual Inversion on a base, to compare with: plain denoising loss, one timestep a step.

Both are context managers: what they have learned holds inside, and the base is as it was afterwards.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from hypernet.base_models.base import BaseModel
from hypernet.fitting.engine import Subject
from hypernet.fitting.losses import denoising_error
from hypernet.fitting.noise import draw_noise, noise_photos
from hypernet.inputs.people import derive_seed

PRIOR_WEIGHT = 1.0


@contextmanager
def dreambooth(
    base: BaseModel, subject: Subject, class_moments: Tensor, steps: int, lr: float, seed: int
) -> Iterator[None]:
    """All weights of the models that are adapted, with prior preservation (Ruiz et al. 2023, equation 2), by AdamW.

    Args:
        subject: one person with one photo.
        class_moments: VAE moments of the base's own pictures of the class, ``(n, 8, h, w)``; one each step.
        lr: at the start; it decays linearly to a tenth, as the fits' does.

    Raises:
        ValueError: the base is not in float32, in which alone so small steps are not lost.
    """
    if base.dtype != torch.float32:
        raise ValueError("DreamBooth trains the base's own weights, and half precision would round its steps away; "
                         "pass --precision fp32")  # fmt: skip
    generator = torch.Generator().manual_seed(derive_seed(seed, "dreambooth", subject.key))
    prompts = base.prepare_prompts([subject.prompt, subject.class_prompt])
    weights = torch.tensor([1.0, PRIOR_WEIGHT], device=base.device)

    def loss() -> Tensor:
        chosen = torch.randint(len(class_moments), (1,), generator=generator)
        moments = torch.cat([subject.moments, class_moments[chosen]]).to(base.device)
        noise = draw_noise(base, moments.shape, [generator, generator]).to(base.device)
        noisy_latents, target = noise_photos(base, moments, noise)
        noise_pred = base.denoise(noisy_latents, noise.timesteps, base.encode_prompts(prompts))
        return (weights * denoising_error(noise_pred, target)).sum()

    with _restored(*base.adapted.values()):
        _train([weight for model in base.adapted.values() for weight in model.parameters()], loss, steps, lr)
        yield


@contextmanager
def textual_inversion(
    base: BaseModel, subjects: Sequence[Subject], token: str, start: str, steps: int, lr: float, seed: int
) -> Iterator[None]:
    """One new embedding for ``token`` per person (Gal et al. 2023), all people at once.

    Inside, the text encoder reads B * k prompts as k of each person's.

    Args:
        subjects: each with one photo.
        start: the word whose embedding the new ones start from.
        lr: as for `dreambooth`.

    Raises:
        ValueError: ``token`` or ``start`` is not a single token, or the base has several text encoders that are
            adapted, or none.
    """
    generators = [torch.Generator().manual_seed(derive_seed(seed, "inversion", each.key)) for each in subjects]
    moments = torch.cat([subject.moments for subject in subjects]).to(base.device)
    prompts = base.prepare_prompts([subject.prompt for subject in subjects])
    embedding = _text_encoder(base).get_input_embeddings()
    vectors = nn.Parameter(embedding.weight[_token_id(base, start)].float().repeat(len(subjects), 1))
    token_id = _token_id(base, token)

    def read_as_vectors(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (ids,) = inputs
        own = vectors.repeat_interleave(len(ids) // len(vectors), dim=0)[:, None]
        return torch.where((ids == token_id)[..., None], own.to(output.dtype), output)

    def loss() -> Tensor:
        noise = draw_noise(base, moments.shape, generators).to(base.device)
        noisy_latents, target = noise_photos(base, moments, noise)
        noise_pred = base.denoise(noisy_latents, noise.timesteps, base.encode_prompts(prompts))
        return denoising_error(noise_pred, target).sum()

    hook = embedding.register_forward_hook(read_as_vectors)
    try:
        _train([vectors], loss, steps, lr)
        yield
    finally:
        hook.remove()


def _train(parameters: list[nn.Parameter], loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - 0.9 * step / steps)
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def _restored(*models: nn.Module) -> Iterator[None]:
    """Inside, the models' weights may be trained; afterwards they are frozen and have every bit they had."""
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    for model in models:
        model.requires_grad_(True)
    try:
        yield
    finally:
        for model, state in zip(models, before, strict=True):
            model.requires_grad_(False)
            model.load_state_dict(state)
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def _text_encoder(base: BaseModel) -> Any:
    encoders = [model for model in base.adapted.values() if model is not base.denoiser]
    if len(encoders) != 1:
        raise ValueError(f"Textual Inversion is for bases with one text encoder that is adapted, and {base.name} has "
                         f"{len(encoders)}; leave the method out")  # fmt: skip
    return encoders[0]


def _token_id(base: BaseModel, word: str) -> int:
    ids = cast(Any, base).tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens; choose a word that is one")
    return ids[0]
