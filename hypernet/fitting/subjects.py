"""People as the fitting engine takes them."""

from collections.abc import Sequence

import torch

from hypernet.base_models.base import BaseModel
from hypernet.devices import release_memory
from hypernet.errors import is_out_of_memory
from hypernet.fitting.engine import KeptStep, Subject
from hypernet.inputs.people import PreparedPerson


def make_subjects(
    base: BaseModel,
    people: Sequence[PreparedPerson],
    prompt: str,
    class_prompt: str = "",
    kept: KeptStep | None = None,
) -> list[Subject]:
    """Make each person a subject, all with one prompt; their photos go through the VAE here.

    Args:
        kept: of the people before; it is let go of if the photos do not fit into the memory beside it.
    """
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
    counts = [len(person.photos) for person in people]
    return [
        Subject(person.key, own, prompt, class_prompt)
        for person, own in zip(people, moments.split(counts), strict=True)
    ]
