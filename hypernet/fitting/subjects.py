"""People as the fitting engine takes them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hypernet.base_models.base import BaseModel
from hypernet.devices import release_memory
from hypernet.errors import is_out_of_memory
from hypernet.fitting.engine import KeptStep, Subject
from hypernet.inputs.people import People, PreparedPerson
from hypernet.inputs.recognition import Recogniser
from lidb_peft.record import same_base


def make_subjects(
    base: BaseModel,
    people: Sequence[PreparedPerson],
    prompt: str,
    class_prompt: str = "",
    kept: KeptStep | None = None,
    recogniser: Recogniser | None = None,
    failed: dict[int, str] | None = None,
) -> list[Subject]:
    """Make each person a subject, all with one prompt; their photos go through the VAE here, if it is not done yet.

    Args:
        kept: of the people before; it is let go of if the photos do not fit into the memory beside it.
        recogniser: computes their embeddings.
        failed: filled with the people in whose photos it sees nobody, row -> reason; None raises instead.

    Raises:
        ValueError: the recogniser sees nobody in a person's photos.
    """
    counts = [len(person.photos) for person in people]
    moments = _encode(base, people, kept)
    subjects = [
        Subject(person.key, own, prompt, class_prompt)
        for person, own in zip(people, moments.split(counts), strict=True)
    ]
    if recogniser is None:
        return subjects
    for row, person in enumerate(people):
        embedding = _embedding(recogniser, person, base.device)
        subjects[row] = replace(subjects[row], embedding=embedding)
        if not embedding.any():
            reason = f"nobody is recognised in the photos of {person.name}; choose others, or pass --likeness 0"
            if failed is None:
                raise ValueError(reason)
            failed[row] = reason
    return subjects


@torch.no_grad()
def _embedding(recogniser: Recogniser, person: PreparedPerson, device: torch.device) -> Tensor:
    """The mean of a person's photos, ``(width,)``; zeros if nobody is seen in them."""
    return normalize(recogniser.embed(person.pixels.to(device)).sum(dim=0), dim=0)


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
