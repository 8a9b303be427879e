"""What of each photo will be learned, before anything is: the faces that are found, and the square that is cut."""

from collections.abc import Sequence

from PIL import Image

from cli.web.sentences import in_words_of_the_page

SHOWN_PX = 256


def show_crops(
    photos: Sequence[str], crop: bool, face: str = "largest"
) -> tuple[list[tuple[Image.Image, str]], list[str]]:
    """The squares that are taken of photos, with what to know of each, and a sentence for each that is left out.

    Raises:
        ValueError: faces cannot be looked for.
    """
    from pathlib import Path

    from hypernet import find_crops

    shown, problems = [], []
    for one in find_crops(photos, SHOWN_PX, crop, face=face):
        if one.photo is None:
            problems.append(in_words_of_the_page(one.problem.replace(one.name, Path(one.name).name)))
            continue
        found = f"{len(one.faces)} faces found" if len(one.faces) > 1 else ""
        note = one.photo.note.replace(one.name, Path(one.name).name)
        caption = note or found or ("face found" if one.faces else "the middle of the photo")
        shown.append((one.photo.image, in_words_of_the_page(caption)))
    return shown, problems
