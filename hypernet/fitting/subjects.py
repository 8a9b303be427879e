"""People as the fitting engine takes them."""

from collections.abc import Sequence

import torch

from hypernet.bases.base import BaseModel
from hypernet.fitting.engine import Subject
from hypernet.inputs.people import PreparedPerson


def make_subjects(
    base: BaseModel, people: Sequence[PreparedPerson], prompt: str, class_prompt: str = ""
) -> list[Subject]:
    """Make each person a subject, all with one prompt; their photos go through the VAE here."""
    moments = base.encode_photos(torch.cat([person.pixels for person in people]))
    counts = [len(person.photos) for person in people]
    return [
        Subject(person.key, own, prompt, class_prompt)
        for person, own in zip(people, moments.split(counts), strict=True)
    ]
