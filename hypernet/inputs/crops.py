"""The photos of one person: which of them can be used, and what of each is taken.

Photos are not compared with each other: whether they all show the same person is for people to see.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from hypernet.inputs.face import Face
from hypernet.inputs.photos import NoFaceError, OpenPhoto, Photo, image_suffixes, open_photo
from hypernet.inputs.pictures import PhotoLike, list_photos


@dataclass(frozen=True)
class Crop:
    """What is taken of a photo.

    Attributes:
        name: what messages call the photo.
        photo: the square that is taken, with the face that it is cut around and what to know of it; None if the photo
            cannot be used.
        faces: all that were found, from left to right, in pixels of the upright photo.
        problem: why the photo cannot be used, in a sentence; "" if it can be.
    """

    name: str
    photo: Photo | None = None
    faces: tuple[Face, ...] = ()
    problem: str = ""


def find_crops(
    photos: PhotoLike | Iterable[PhotoLike],
    size_px: int = 512,
    crop: bool = True,
    detector: str = "auto",
    face: str = "largest",
) -> list[Crop]:
    """Show how `hypernet.personalize` would crop photos; unusable photos do not raise.

    Args:
        photos: files, folders of one person's photos, or pictures; one or several.
        size_px: side of the squares; with a base model's ``size_px`` they are exactly the pictures it is fitted to.
        crop: crop to a face; False crops the centre square.
        detector: face detector, see `hypernet.inputs.faces.choose_detector`.
        face: which face to use of several, see `hypernet.recipe.PersonalizeConfig`.
    """
    crops = []
    for name, photo in _named(photos):
        try:
            opened = open_photo(photo, crop, detector, name, face)
            faces = sorted(opened.faces or (), key=lambda one: one.centre)
            crops.append(Crop(name, opened.prepare(size_px), tuple(faces)))
        except (ValueError, OSError) as error:
            crops.append(Crop(name, problem=str(error)))
    return crops


def crops_sheet(photos: Sequence[OpenPhoto], size_px: int = 512) -> Image.Image:
    """A picture of each photo with its faces numbered from the left, next to its crop."""
    from hypernet.sheets import contact_sheet

    rows = []
    for photo in photos:
        prepared = photo.prepare(size_px)
        name = photo.name if prepared.note == "" else f"{photo.name}\n({prepared.note.partition(': ')[2]})"
        rows.append((name, [_with_faces(photo, size_px), prepared.image]))
    return contact_sheet(rows, ["photo", "what is taken of it"])


def _with_faces(photo: OpenPhoto, size_px: int) -> Image.Image:
    shown = photo.image.convert("RGB")
    scale = size_px / max(shown.size)
    shown = shown.resize([max(1, round(side * scale)) for side in shown.size], Image.Resampling.LANCZOS)
    pen, font = ImageDraw.Draw(shown), ImageFont.load_default(size=22)
    chosen = photo.faces[0] if photo.faces else None
    for number, face in enumerate(sorted(photo.faces or (), key=lambda one: (one.centre, one.side)), 1):
        left, top, right, bottom = (scale * place for place in (face.left, face.top, face.left + face.side,
                                                                face.top + face.side))  # fmt: skip
        colour = "#00c800" if face is chosen else "#ffb000"
        pen.rectangle([left, top, right, bottom], outline=colour, width=3)
        pen.text((left + 5, top + 3), str(number), fill=colour, font=font, stroke_width=2, stroke_fill="black")
    return shown


def open_photos(
    photos: PhotoLike | Iterable[PhotoLike], crop: bool = True, detector: str = "auto", face: str = "largest"
) -> tuple[tuple[OpenPhoto, ...], tuple[str, ...]]:
    """Read the photos of one person; of several, those that cannot be used are left out.

    Args:
        photos: files, folders or pictures.
        face: which one, of several, see `hypernet.inputs.face.put_first`.

    Returns:
        The photos, at least one, and for each that is left out a sentence that names it.

    Raises:
        NoFaceError: there is no face in any of them.
        ValueError: none can be used, or there is none.
        OSError: a photo that is named is not there or cannot be opened.
    """
    listed = list(_named(photos))
    opened, errors = [], []
    for name, photo in listed:
        try:
            opened.append(open_photo(photo, crop, detector, name, face))
        except ValueError as error:
            errors.append(error)
    if not opened:
        if len(errors) == 1:
            raise errors[0]
        kind = NoFaceError if all(isinstance(error, NoFaceError) for error in errors) else ValueError
        raise kind(f"no photo of {len(errors)} can be used: {errors[-1]}")
    return tuple(opened), tuple(f"left out: {error}" for error in errors)


def _named(photos: PhotoLike | Iterable[PhotoLike]) -> Iterator[tuple[str, PhotoLike]]:
    """Each photo with what messages call it; a folder stands for the photos in it.

    Raises:
        ValueError: there is none.
    """
    listed = list_photos(photos)
    if not listed:
        raise ValueError("there is no photo; pass at least one")
    for number, photo in enumerate(listed, 1):
        if not isinstance(photo, str | os.PathLike):
            yield f"photo {number}", photo
        elif Path(photo).is_dir():
            yield from ((str(file), file) for file in _photos_in(Path(photo)))
        else:
            yield str(photo), photo


def _photos_in(folder: Path) -> list[Path]:
    """The images in a folder, sorted; hidden files and other kinds, such as captions, are passed over."""
    suffixes = image_suffixes()
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in suffixes and file.name[0] != ".")
    if not files:
        raise ValueError(f"{folder} holds no photos (JPEG, PNG, WebP); name photos, or the folder of one person's")
    return files
