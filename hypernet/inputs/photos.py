"""A photo as a person has it -> the square face image that personalisation starts from.

Whatever the file holds (turned by EXIF, transparent, grey, CMYK, 16 bits, Display P3), what leaves here is an upright
sRGB square; whatever is wrong with it is said in one sentence that names the file.
"""

import importlib.util
import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from hypernet.errors import first_line
from hypernet.inputs.faces import Face, find_faces

SMALLEST_SIDE_PX = 32
_LARGEST_PIXELS = 179_000_000  # Pillow's own limit, rounded up
_DECODED_SIDE_PX = 4096  # a JPEG of more is decoded at a half, a quarter or an eighth, but not below this
_CROP_PER_FACE = 2.2  # the head with its hair and some of the shoulders, as portraits for DreamBooth show it
_CROP_DROP = 0.05  # of the face: the crop's centre lies this much below the face's
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What the decoders of Pillow and libheif raise on damaged data; 20,000 cut and corrupted files raised nothing else.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    LookupError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class Photo:
    """One prepared photo.

    Attributes:
        image: RGB, ``size_px`` squared.
        name: the file's name, for messages.
        face: the face that was cropped to, in pixels of the upright photo; None if it was not asked for.
        note: what the person should know, in a sentence (several faces, a face too small); "" if nothing.
    """

    image: Image.Image
    name: str
    face: Face | None = None
    note: str = ""

    def to_tensor(self) -> Tensor:
        """Return the image as ``(3, size_px, size_px)`` float32 in [-1, 1]."""
        return torch.from_numpy(np.array(self.image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


class NamedImage(NamedTuple):
    """An upright RGB picture, and what messages call it."""

    name: str
    image: Image.Image


def open_photo(path: str | os.PathLike) -> NamedImage:
    """Read a photo of a person; raises as `read_image` does."""
    return NamedImage(str(path), read_image(path))


def load_photo(path: str | os.PathLike, size_px: int, crop: bool = True) -> Photo:
    """Read a photo of a person and prepare it: ``prepare_photo(read_image(path), ...)``."""
    return prepare_photo(read_image(path), size_px, crop, name=str(path))


def prepare_photo(image: Image.Image, size_px: int, crop: bool = True, name: str = "the photo") -> Photo:
    """Square a photo and scale it to ``size_px``, antialiased.

    Args:
        image: an upright RGB photo.
        crop: square it around the largest face, with hair and shoulders; otherwise take the centre of the whole photo.
        name: what messages call the photo.

    Raises:
        ValueError: ``size_px`` is not positive, the photo is too small, or ``crop`` finds no face.
    """
    if size_px < 1:
        raise ValueError(f"size_px is {size_px}; give the side of the square in pixels, 512 for Stable Diffusion 1.5")
    width, height = image.size
    if min(width, height) < SMALLEST_SIDE_PX:
        raise ValueError(
            f"{name} is {width} x {height} pixels; use a photo of at least {SMALLEST_SIDE_PX} on either side"
        )
    image = image.convert("RGB")
    if not crop:
        square = ImageOps.fit(image, (size_px, size_px), Image.Resampling.LANCZOS)
        return Photo(square, name, note=_note(name, 1, min(width, height), size_px))
    faces = find_faces(image)
    if not faces:
        raise ValueError(
            f"{name}: no face found; use a photo in which the face is upright, looks at the camera and is well lit, "
            "or crop it to the face yourself and pass --no-crop"
        )
    box = _portrait_box(faces[0], width, height)
    square = image.resize((size_px, size_px), Image.Resampling.LANCZOS, box=box)
    return Photo(square, name, faces[0], _note(name, len(faces), box[2] - box[0], size_px))


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read an image file as upright sRGB; a transparent one is laid on white, of an animation the first frame is taken.

    Opens what Pillow opens, and HEIC where pillow-heif is installed.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the path.
        ValueError: empty, not an image, damaged, or of more than 179 million pixels.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the photos in it")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; check the photo's path")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name a photo")
    try:
        file = open(path, "rb")  # noqa: SIM115 - only the opening is guarded here
    except PermissionError as error:
        raise PermissionError(f"{path} cannot be read; change its permissions") from error
    with file:
        return decode_image(file, str(path))


def decode_image(file: BinaryIO, name: str) -> Image.Image:
    """Read an open image file, or the bytes of one, as `read_image` does; ``name`` is what messages call it."""
    start = file.read(12)
    file.seek(0)
    if not start:
        raise ValueError(f"{name} is empty (0 bytes); copy the photo again")
    is_heif = start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS
    if is_heif and not importlib.util.find_spec("pillow_heif"):
        raise ValueError(f"{name} is a HEIC photo; run pip install pillow-heif, or save the photo as JPEG")
    return _to_srgb(_decode(file, name, is_heif))


def _decode(file: BinaryIO, name: str, is_heif: bool) -> Image.Image:
    """Decode an open image file and turn it upright; anything the decoders raise becomes one sentence."""
    too_large = f"{name} has more than {_LARGEST_PIXELS // 10**6} million pixels; scale the photo down first"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large but accepted, or odd EXIF: nothing the person can act on
            if is_heif:
                import pillow_heif

                image = pillow_heif.open_heif(file)
                if image.size[0] * image.size[1] <= _LARGEST_PIXELS:
                    return _upright(image.to_pillow())
            else:
                image = Image.open(file)
                image.draft(None, (_DECODED_SIDE_PX, _DECODED_SIDE_PX))
                image.load()
                return _upright(image)
    except Image.DecompressionBombError as error:
        raise ValueError(too_large) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that can be read; use a JPEG, PNG or WebP") from error
    except _DAMAGED as error:
        raise ValueError(f"{name} is damaged ({first_line(error)}); copy the photo again or save it anew") from error
    raise ValueError(too_large)


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF says; unreadable EXIF says nothing, and the image itself may be sound."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except _DAMAGED:
        return image
    return image if turn is None else image.transpose(turn)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow's to RGB: 16 bits scaled, alpha on white, an embedded colour profile applied."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_grey(image)
    if image.mode in {"RGBA", "RGBa", "LA", "La", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if profile and image.mode in {"RGB", "CMYK"} and features.check("littlecms2"):
        image = _apply_profile(image, profile)
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits, 32 bits or floating point to 8 bits; Pillow's own conversion clips it at 255."""
    grey = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    ranges = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
    white = next((white for white in ranges if grey.max() <= white), grey.max())
    return Image.fromarray((grey * (255 / white)).clip(0, 255).round().astype(np.uint8))


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from the colours of the embedded ICC profile to sRGB; an unusable profile is as good as none."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image


def _portrait_box(face: Face, width: int, height: int) -> tuple[int, int, int, int]:
    """Square the face with hair and shoulders: ``(left, top, right, bottom)``, moved or shrunk to lie in the photo."""
    side = min(round(_CROP_PER_FACE * face.side), width, height)
    x, y = face.centre
    left = min(max(round(x - side / 2), 0), width - side)
    top = min(max(round(y + _CROP_DROP * face.side - side / 2), 0), height - side)
    return left, top, left + side, top + side


def _note(name: str, num_faces: int, cut_px: int, size_px: int) -> str:
    notes = []
    if num_faces > 1:
        notes.append(f"{num_faces} faces found, the largest clear one is taken")
    if cut_px < size_px / 2:
        notes.append(f"{cut_px} pixels are enlarged to {size_px}, a larger photo would be sharper")
    return f"{name}: {'; '.join(notes)}" if notes else ""
