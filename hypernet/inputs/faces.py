"""Where the faces in a photo are: which detector looks for them, and at what.

A photo may be turned by 90 or 180 degrees, and a panorama is searched in windows. What the detectors find, measured on
real photographs: ``benchmarks/results/2026-11-29-faces.md``.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace

from PIL import Image

from hypernet.inputs import cascades, yunet
from hypernet.inputs.face import Face, without_doubles
from hypernet.recipe import FACE_DETECTORS

_LONGER_SIDE_PX, _SHORTER_SIDE_PX = 640, 360  # of the photo that is searched, whichever makes it larger
_WINDOW = 2.5  # shorter sides, and at least the longer side above: of a longer photo that much is searched at once
_TURNS = {
    0: None,
    90: Image.Transpose.ROTATE_90,
    -90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
}  # by how much the photo is turned, counter-clockwise
_LOOK = {"yunet": lambda image, is_turned: yunet.look(image), "cascade": cascades.look}
_SURE = {"yunet": 0.91, "cascade": 0.0}  # with a face of this score the photo is not turned
_TURNED_SCORE = {"yunet": 0.87, "cascade": 11.0}  # a cat upside down has 0.83, and a human turned so that he is, 0.94
_RELATIVE_SCORE = {"yunet": 0.8, "cascade": 0.6}  # of the best: what is further behind is not preferred for its size


def find_faces(image: Image.Image, detector: str = "auto") -> list[Face]:
    """Return the faces of a photo, the largest of the clear ones first; empty if there are none.

    Args:
        image: RGB; it may be turned by 90 or 180 degrees.
        detector: as `choose_detector` takes it.

    Raises:
        ValueError: as `choose_detector`.
    """
    detector = choose_detector(detector)
    small, scale = _searched(image)
    found = _in_turned(small, 0, detector)
    if not found or _best(found) < _SURE[detector]:
        turned = (_in_turned(small, degrees, detector) for degrees in _TURNS if degrees)
        clear = [faces for faces in turned if _best(faces) >= _TURNED_SCORE[detector]]
        found = max([found, *clear], key=_best)
    least = _RELATIVE_SCORE[detector] * _best(found)
    found = sorted(found, key=lambda face: (face.score < least, -face.side, face.left, face.top))
    return [replace(face, left=face.left / scale, top=face.top / scale, side=face.side / scale) for face in found]


def choose_detector(name: str = "auto") -> str:
    """Return ``yunet`` or ``cascade``: what ``name`` means here. ``auto`` is ``yunet``, or else, with a warning, the
    cascades.

    Raises:
        ValueError: an unknown name, or what is asked for cannot be had.
    """
    if name not in FACE_DETECTORS:
        raise ValueError(f"face_detector is {name!r}; choose {', '.join(FACE_DETECTORS[:-1])} or {FACE_DETECTORS[-1]}")
    no_yunet = "" if name == "cascade" else yunet.unavailable()
    no_cascade = "" if name == "yunet" else cascades.unavailable()
    if name == "yunet" and no_yunet:
        raise ValueError(f"faces cannot be found with YuNet: {no_yunet}; or choose another --face-detector, or crop "
                         f"the photo to the face yourself and pass --no-crop")  # fmt: skip
    if name == "cascade" and no_cascade:
        raise ValueError(f"faces cannot be found with cascades: {no_cascade}; choose --face-detector yunet, run pip "
                         f"install 'opencv-python-headless<5', or crop the photo to the face yourself and pass "
                         f"--no-crop")  # fmt: skip
    if name != "auto":
        return name
    if not no_yunet:
        return "yunet"
    if not no_cascade:
        warnings.warn(f"faces are looked for with OpenCV's cascades, which miss more of them than YuNet: {no_yunet}",
                      stacklevel=2)  # fmt: skip
        return "cascade"
    reasons = no_yunet if no_yunet == no_cascade else f"with cascades: {no_cascade}; with YuNet: {no_yunet}"
    raise ValueError(f"faces cannot be found: {reasons}; run pip install opencv-python-headless, or crop the photo to "
                     f"the face yourself and pass --no-crop")  # fmt: skip


def _best(faces: list[Face]) -> float:
    return max((face.score for face in faces), default=0.0)


def _searched(image: Image.Image) -> tuple[Image.Image, float]:
    """Return the photo small enough to be searched, and its scale."""
    scale = min(1.0, max(_LONGER_SIDE_PX / max(image.size), _SHORTER_SIDE_PX / min(image.size)))
    size = [max(1, round(side * scale)) for side in image.size]
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0), scale


def _in_turned(image: Image.Image, degrees: int, detector: str) -> list[Face]:
    """Search the photo turned by ``degrees``; faces come back in coordinates of the photo as it was."""
    turn = _TURNS[degrees]
    turned = image if turn is None else image.transpose(turn)
    faces = [
        replace(face, left=face.left + box[0], top=face.top + box[1])
        for box in _windows(*turned.size)
        for face in _LOOK[detector](turned.crop(box), is_turned=degrees != 0)
    ]
    faces = [_turned_back(face, degrees, *image.size) for face in without_doubles(faces)]
    return [yunet.straighten(image, face, degrees) for face in faces] if detector == "yunet" else faces


def _windows(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a photo along its longer side into overlapping boxes; most are one box."""
    longer, shorter = max(width, height), min(width, height)
    length = max(round(_WINDOW * shorter), _LONGER_SIDE_PX)
    step = length - shorter  # so that a face lies in one of them as a whole
    for start in range(0, max(longer - shorter, 1), step):
        end = min(start + length, longer)
        yield (start, 0, end, height) if width >= height else (0, start, width, end)


def _turned_back(face: Face, degrees: int, width: int, height: int) -> Face:
    x, y = face.centre
    x, y = {0: (x, y), 90: (width - y, x), -90: (y, height - x), 180: (width - x, height - y)}[degrees]
    roll = (face.roll_deg + degrees + 180) % 360 - 180
    return replace(face, left=x - face.side / 2, top=y - face.side / 2, roll_deg=roll)
