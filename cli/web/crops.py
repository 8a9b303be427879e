"""What of each photo will be learned, before anything is: the faces that are found, and the square that is cut."""

from collections.abc import Sequence

from PIL import Image

from cli.web.sentences import in_words_of_the_page

SHOWN_PX = 256


def show_crops(
    photos: Sequence[str], crop: bool, face: str = "largest"
) -> tuple[list[tuple[Image.Image, str]], list[str]]:
    """The squares that are taken of photos, and sentences of what is left out or should be known.

    Raises:
        ValueError: faces cannot be looked for.
    """
    from pathlib import Path

    from hypernet import find_crops

    shown, sentences = [], []
    for one in find_crops(photos, SHOWN_PX, crop, face=face):
        told = one.problem if one.photo is None else one.photo.note
        if told:
            sentences.append(in_words_of_the_page(told.replace(one.name, Path(one.name).name)))
        if one.photo is not None:
            caption = f"{len(one.faces)} faces" if len(one.faces) > 1 else "face" if one.faces else "middle"
            shown.append((one.photo.image, caption))
    return shown, sentences
