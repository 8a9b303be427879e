"""People as the fitting engine takes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hypernet.base_models.base import BaseModel
from hypernet.devices import release_memory
from hypernet.errors import is_out_of_memory
from hypernet.fitting.engine import KeptStep, Subject
from hypernet.inputs.people import People, PreparedPerson
from lidb_peft.record import same_base


def make_subjects(
    base: BaseModel,
    people: Sequence[PreparedPerson],
    prompt: str,
    class_prompt: str = "",
    kept: KeptStep | None = None,
) -> list[Subject]:
    """Make each person a subject, all with one prompt; their photos go through the VAE here, if it is not done yet.

    Args:
        kept: of the people before; it is let go of if the photos do not fit into the memory beside it.
    """
    counts = [len(person.photos) for person in people]
    moments = _encode(base, people, kept)
    return [
        Subject(person.key, own, prompt, class_prompt)
        for person, own in zip(people, moments.split(counts), strict=True)
    ]


def check_moments(people: People, base: BaseModel) -> None:
    """Raise ValueError if a data set holds the moments of another VAE than that of ``base``."""
    if people.vae and not same_base(people.vae, base.vae_fingerprint):
        raise ValueError(f"{people.source} was prepared with the moments of another VAE than that of {base.name}; "
                         f"prepare it again with --base {base.name}, or without --moments")  # fmt: skip


def stored_moments(base: BaseModel, moments: Tensor) -> Tensor:
    """Moments ``(n, 2 * c * h * w)`` of a prepared data set, as `BaseModel.encode_photos` returns them."""
    channels, height, width = base.latent_shape
    return moments.to(base.device).float().unflatten(1, (2 * channels, height, width))


def _encode(base: BaseModel, people: Sequence[PreparedPerson], kept: KeptStep | None) -> Tensor:
    stored = [person.moments for person in people if person.moments is not None]
    if len(stored) == len(people):
        return stored_moments(base, torch.cat(stored))
    pixels = torch.cat([person.pixels for person in people])
    moments = None
    try:
        moments = base.encode_photos(pixels)
    except RuntimeError as error:
        if kept is None or kept.step is None or not is_out_of_memory(error):
            raise
    if moments is None:
        if kept is not None:
            kept.release()
        release_memory(base.device)
        moments = base.encode_photos(pixels)
    return moments
