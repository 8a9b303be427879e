"""From a user's photo to the square face image that personalisation starts from.

Whatever the file holds (rotated by EXIF, transparent, grey, CMYK, 16 bits, Display P3), the result is an upright sRGB
square; any problem is reported in one sentence that names the file.
"""

import importlib.util
import io
import math
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
from hypernet.inputs.face import Face, put_first
from hypernet.inputs.faces import find_faces
from hypernet.inputs.pictures import PhotoLike, to_pillow

SMALLEST_SIDE_PX = 32
_DECODED_SIDE_PX = 4096  # a JPEG of more is decoded at a half, a quarter or an eighth, but not below this
_KEPT_PIXELS = 50_000_000  # a decoded image of more is reduced
_MEMORY = 560_000_000  # bytes that decoding an image may take
_CROP_PER_FACE = 2.2  # the head with its hair and some of the shoulders, as portraits for DreamBooth show it
_CROP_DROP = 0.05  # of the face: the crop's centre lies this much below the face's
_CHOSEN = {"largest": "the largest clear one", "leftmost": "the leftmost", "rightmost": "the rightmost"}
_LEAST_ROLL_DEG = 2  # no head is straighter; a smaller roll is not undone, which would blur the picture for nothing
_QUARTERS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
# Raster images only: Pillow hands EPS to Ghostscript and WMF to Windows, and leaves other kinds to other libraries.
# With each, the bytes that decoding takes for a pixel, as measured (benchmarks/photo_memory.py); 0: as many as a pixel
# of its mode has.
RASTER_FORMATS = {
    "JPEG": 0, "MPO": 0, "PNG": 0, "TIFF": 0, "BMP": 0, "DIB": 0, "GIF": 0, "PPM": 0, "TGA": 0, "PCX": 0, "SGI": 0,
    "QOI": 0, "JPEG2000": 20, "WEBP": 17, "AVIF": 16, "HEIF": 11,
}  # fmt: skip
_PROGRESSIVE_JPEG = 6  # more bytes for a pixel, for all coefficients are kept until the last scan
_MODE_BYTES = {
    "1": 1,
    "L": 1,
    "P": 1,
    "I;16": 2,
    "I;16B": 2,
    "I;16L": 2,
    "I;16N": 2,
    "RGBA": 8,
    "LA": 8,
    "PA": 8,
}  # others take 4; those with alpha are copied where they are reduced
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
    ImageCms.PyCMSError,
)


def image_suffixes() -> set[str]:
    """Suffixes of the files that may be photos; of HEIC too, which without pillow-heif is refused by name."""
    known = Image.registered_extensions().items()
    return {suffix for suffix, kind in known if kind in RASTER_FORMATS} | {".heic", ".heif"}


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
        return to_pixels(self.image)


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as ``(3, h, w)`` float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


class NoFaceError(ValueError):
    """A photo in which no face is found."""


class OpenPhoto(NamedTuple):
    """An upright RGB photo.

    Attributes:
        name: what messages call it.
        faces: those in it, the one to take first; None if none is asked for.
        face: which one that is, as `put_first` takes it.
    """

    name: str
    image: Image.Image
    faces: tuple[Face, ...] | None = None
    face: str = "largest"

    def prepare(self, size_px: int) -> Photo:
        """Square the photo and scale it to ``size_px``, antialiased.

        Raises:
            ValueError: ``size_px`` is not positive.
        """
        if size_px < 1:
            raise ValueError(
                f"size_px is {size_px}; give the side of the square in pixels, 512 for Stable Diffusion 1.5"
            )
        if self.faces is None:
            square = ImageOps.fit(self.image.convert("RGB"), (size_px, size_px), Image.Resampling.LANCZOS)
            return Photo(square, self.name, note=_note(self.name, "", min(self.image.size), size_px))
        square, cut_px = _portrait(self.image, self.faces[0], size_px)
        which = _CHOSEN.get(self.face, f"number {self.face} from the left")
        choice = f"{len(self.faces)} faces found, {which} is taken" if len(self.faces) > 1 else ""
        return Photo(square, self.name, self.faces[0], _note(self.name, choice, cut_px, size_px))


def open_photo(
    photo: PhotoLike, crop: bool = True, detector: str = "auto", name: str = "the photo", face: str = "largest"
) -> OpenPhoto:
    """Read a photo of a person, ``look_at(read_image(path), ...)``, or take a picture that is in memory.

    Args:
        name: what messages call a picture in memory.
    """
    if isinstance(photo, str | os.PathLike):
        return look_at(read_image(photo), crop, str(photo), detector, face=face)
    return look_at(_to_srgb(_upright(to_pillow(photo, name))), crop, name, detector, face=face)


def look_at(
    image: Image.Image,
    crop: bool = True,
    name: str = "the photo",
    detector: str = "auto",
    known: tuple[Face, ...] | None = None,
    face: str = "largest",
) -> OpenPhoto:
    """Find the face in a photo.

    Args:
        image: an upright RGB photo.
        crop: the photo will be squared around one face, with hair and shoulders, turned upright by its eyes;
            otherwise its centre will be taken.
        name: what messages call the photo.
        detector: of faces, see `hypernet.inputs.faces.choose_detector`.
        known: the faces, of an earlier look; None looks for them.
        face: which one is taken, see `put_first`.

    Raises:
        NoFaceError: ``crop`` finds no face, or not the one that is wanted.
        ValueError: the photo is too small, or faces cannot be looked for.
    """
    width, height = image.size
    if min(width, height) < SMALLEST_SIDE_PX:
        raise ValueError(
            f"{name} is {width} x {height} pixels; use a photo of at least {SMALLEST_SIDE_PX} on either side"
        )
    if not crop:
        return OpenPhoto(name, image)
    faces = find_faces(image, detector) if known is None else known
    if not faces:
        raise NoFaceError(
            f"{name}: no face found; use a photo in which the face is upright, looks at the camera and is well lit, "
            "or crop it to the face yourself and pass --no-crop"
        )
    try:
        return OpenPhoto(name, image, put_first(faces, face), face)
    except ValueError as error:
        raise NoFaceError(f"{name}: {error}") from error


def load_photo(path: str | os.PathLike, size_px: int, crop: bool = True, detector: str = "auto") -> Photo:
    """Read a photo of a person and prepare it: `open_photo` and `OpenPhoto.prepare`."""
    return open_photo(path, crop, detector).prepare(size_px)


def prepare_photo(
    image: Image.Image,
    size_px: int,
    crop: bool = True,
    name: str = "the photo",
    detector: str = "auto",
    face: str = "largest",
) -> Photo:
    """Square a photo and scale it to ``size_px``: `look_at` and `OpenPhoto.prepare`."""
    return look_at(image, crop, name, detector, face=face).prepare(size_px)


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read an image file as upright sRGB; a transparent one is laid on white, of an animation the first frame is taken.

    Opens raster formats (`RASTER_FORMATS`), and HEIC where pillow-heif is installed. A large image comes back smaller.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: the path.
        ValueError: empty, not a raster image, damaged, or so large that decoding it would take too much memory.
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
    return _decode(file, name, is_heif)


def _decode(file: BinaryIO, name: str, is_heif: bool) -> Image.Image:
    """Decode an open image file, a large one smaller, as upright sRGB; what Pillow raises becomes a sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large but accepted, or odd EXIF: nothing the person can act on
            if is_heif:
                import pillow_heif

                image = pillow_heif.open_heif(file)
                _check_memory(name, "HEIF", image.size, RASTER_FORMATS["HEIF"])
                image = image.to_pillow()
            else:
                image = Image.open(file, formats=_readable_formats())
                _check_memory(name, str(image.format), image.size, _bytes_per_pixel(image))
                image.draft(None, (_DECODED_SIDE_PX, _DECODED_SIDE_PX))
                image.load()
            return _to_srgb(_upright(_reduced(image)))
    except _TooLargeError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more than 179 million pixels; scale the photo down first") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that can be read; use a JPEG, PNG or WebP") from error
    except _DAMAGED as error:
        raise ValueError(f"{name} is damaged ({first_line(error)}); copy the photo again or save it again") from error


class _TooLargeError(ValueError):
    pass


def _readable_formats() -> list[str]:
    """Those of `RASTER_FORMATS` that the installed Pillow reads."""
    Image.init()
    return [name for name in RASTER_FORMATS if name in Image.OPEN]


def _bytes_per_pixel(image: Image.Image) -> int:
    """What decoding an image that is open takes; a JPEG is decoded smaller, but for coefficients that it keeps."""
    if image.format in ("JPEG", "MPO"):
        return 1 + _PROGRESSIVE_JPEG * ("progressive" in image.info)
    return RASTER_FORMATS[str(image.format)] or _MODE_BYTES.get(image.mode, 4)


def _check_memory(name: str, kind: str, size: tuple[int, int], bytes_per_pixel: int) -> None:
    pixels, most = math.prod(size), _MEMORY // bytes_per_pixel
    if pixels > most:
        raise _TooLargeError(
            f"{name} has {size[0]} x {size[1]} = {pixels / 1e6:.0f} million pixels, and of a {kind} like it at most "
            f"{most / 1e6:.0f} million are read; scale the photo down first"
        )


def _reduced(image: Image.Image) -> Image.Image:
    """Scale a large image down, in its own mode and so without a copy of its size."""
    factor = math.ceil(math.sqrt(math.prod(image.size) / _KEPT_PIXELS))
    if factor < 2:
        return image
    if image.mode in ("1", "P", "PA") or image.mode.startswith("I;16"):  # which Pillow cannot average
        size = [max(1, side // factor) for side in image.size]
        return _described(image, image.resize(size, Image.Resampling.NEAREST))
    return _described(image, image.reduce(factor))


def _described(image: Image.Image, smaller: Image.Image) -> Image.Image:
    """Give a reduced image what is known of the whole one: how it is turned, its colours, what is transparent."""
    smaller.info = image.info
    smaller.getexif().update(image.getexif())
    return smaller


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF says; unreadable EXIF says nothing, and the image itself may be sound."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGED:
        return image
    return image if turn is None else image.transpose(turn)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow's to RGB: 16 bits scaled, alpha on white, an embedded colour profile applied."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_grey(image)
    if image.mode in {"RGBA", "RGBa", "LA", "La", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA") if image.mode != "RGBA" else image
        on_white = Image.new("RGB", image.size, "white")
        on_white.paste(image, mask=image.getchannel("A"))
        image = on_white
    if features.check("littlecms2"):
        if image.mode == "LAB":
            image = _to_srgb_from(ImageCms.createProfile("LAB"), image)
        elif profile and image.mode in {"RGB", "CMYK"}:
            image = _apply_profile(image, profile)
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits, 32 bits or floating point to 8 bits; Pillow's own conversion clips it at 255."""
    grey = np.nan_to_num(np.array(image, dtype=np.float32), copy=False, posinf=0, neginf=0)
    ranges = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
    white = next((white for white in ranges if grey.max() <= white), grey.max())
    grey *= 255 / white
    return Image.fromarray(np.rint(np.clip(grey, 0, 255, out=grey), out=grey).astype(np.uint8))


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from the colours of the embedded ICC profile to sRGB; an unusable profile is as good as none."""
    try:
        return _to_srgb_from(ImageCms.ImageCmsProfile(io.BytesIO(profile)), image)
    except (ImageCms.PyCMSError, OSError):
        return image


def _to_srgb_from(profile: "ImageCms.ImageCmsProfile | ImageCms.core.CmsProfile", image: Image.Image) -> Image.Image:
    converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None, "converted in place"
    return converted


def _portrait(image: Image.Image, face: Face, size_px: int) -> tuple[Image.Image, int]:
    """Cut out the face with hair and shoulders, upright, as ``size_px`` squared; and how many pixels its side had."""
    roll_deg = face.roll_deg if abs(face.roll_deg) >= _LEAST_ROLL_DEG else 0.0
    x, y, side = _portrait_square(face, roll_deg, *image.size)
    if not _is_whole(face, x, y, side):  # turned, the square would be too far inside of the photo
        quarter = 90 * round(roll_deg / 90)
        roll_deg = quarter
        x, y, side = _portrait_square(face, roll_deg, *image.size)
    around = side * _reach(roll_deg)
    edges = (x - around / 2, y - around / 2, x + around / 2, y + around / 2)
    left, top, right, bottom = (min(max(edge, 0), most) for edge, most in zip(edges, image.size * 2, strict=True))
    around_px = round(size_px * _reach(roll_deg))
    part = image.convert("RGB").resize((around_px, around_px), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    if roll_deg % 90:
        part = part.rotate(roll_deg, Image.Resampling.BICUBIC)
        start = (around_px - size_px) // 2
        part = part.crop((start, start, start + size_px, start + size_px))
    elif roll_deg:
        part = part.transpose(_QUARTERS[round(roll_deg) % 360])
    return part, round(side)


def _portrait_square(face: Face, roll_deg: float, width: int, height: int) -> tuple[float, float, float]:
    """Return the centre and side of the square, turned by ``roll_deg``, moved or shrunk to lie in the photo."""
    reach = _reach(roll_deg)
    side = min(round(_CROP_PER_FACE * face.side), int(width / reach), int(height / reach))
    roll, drop = math.radians(roll_deg), _CROP_DROP * face.side
    x, y = face.centre[0] - drop * math.sin(roll), face.centre[1] + drop * math.cos(roll)
    margin = side * reach / 2
    left, top = round(x - side / 2), round(y - side / 2)  # whole pixels, so that an upright one is not resampled
    x = min(max(left + side / 2, margin), width - margin)
    y = min(max(top + side / 2, margin), height - margin)
    return x, y, side


def _reach(roll_deg: float) -> float:
    """Return the side of the upright square around a turned one, in sides of that."""
    roll = math.radians(roll_deg)
    return abs(math.cos(roll)) + abs(math.sin(roll)) if roll_deg % 90 else 1.0


def _is_whole(face: Face, x: float, y: float, side: float) -> bool:
    """Whether a turned square of that centre and side holds the face, whatever the angle."""
    distance = math.hypot(face.centre[0] - x, face.centre[1] - y)
    return distance + face.side / 2 <= side / 2


def _note(name: str, choice: str, cut_px: int, size_px: int) -> str:
    notes = [choice] if choice else []
    if cut_px < size_px / 2:
        notes.append(f"{cut_px} pixels are enlarged to {size_px}, a larger photo would be sharper")
    return f"{name}: {'; '.join(notes)}" if notes else ""
