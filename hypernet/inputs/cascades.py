"""Faces by two of the cascades that OpenCV 4 ships, which must agree: the fallback if YuNet's file is not available.

One cascade alone takes ties, curtains and knees for faces and misses a tilted head. Measured on 35 photographs of
people in ten variants each (plain, grey, dark, bright, noisy, small, mirrored, tilted by 10, -20 and 30 degrees), the
frontal-face cascade alone at its best threshold finds the right face in 81 % and a wrong place in 2 %; with the
contrast stretched, a second cascade to confirm it and a second look at the tilted photo, in 98 % and 0.3 %. The
constants below were chosen on the same photographs; rates of 0.5 to 0.7 and scores of 7 to 9 give nearly the same.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from hypernet.inputs.face import SMALLEST_FACE, Face, overlap

if TYPE_CHECKING:
    import cv2

_SMALLEST_FACE_PX = 24  # side of the searched photo; size of the cascades' window
_TILTS_DEG = (22, -22)  # a cascade finds heads tilted by up to about 20 degrees
_CONFIRMED = 6.0  # added to the first cascade's score if the second finds the face too
_UPRIGHT_SCORE, _TILTED_SCORE = 8.0, 9.0  # that is: confirmed and at least 2 and 3, or very certain alone


def unavailable() -> str:
    """Why the cascades are not available, as text; empty if they are."""
    if not importlib.util.find_spec("cv2"):
        return "OpenCV is not installed"
    import cv2

    missing = [name for name in ("default", "alt") if not _cascade_file(name).is_file()]
    if not hasattr(cv2, "CascadeClassifier") or missing:
        return f"OpenCV {cv2.__version__} has no cascades (5.0 dropped them)"
    return ""


def look(image: Image.Image, is_turned: bool = False) -> list[Face]:
    """Return the faces of a small RGB photo, each with its score.

    Args:
        is_turned: the photo was already rotated; then heads tilted by up to about 40 degrees are not searched for.
    """
    grey = _stretched(image)
    cascades = _load_cascade("default"), _load_cascade("alt")
    faces = [face for face in _look(grey, cascades, 0) if face.score >= _UPRIGHT_SCORE]
    if not faces and not is_turned:
        tilted = [face for degrees in _TILTS_DEG for face in _look(grey, cascades, degrees)]
        faces = [face for face in tilted if face.score >= _TILTED_SCORE]
    return faces


def _cascade_file(name: str) -> Path:
    import cv2

    return Path(cv2.__file__).parent / "data" / f"haarcascade_frontalface_{name}.xml"


def _load_cascade(name: str) -> "cv2.CascadeClassifier":
    """Read a frontal-face cascade out of the OpenCV package, as text: its C++ cannot open every Windows path."""
    import cv2

    text = _cascade_file(name).read_text(encoding="utf-8")
    storage = cv2.FileStorage(text, cv2.FILE_STORAGE_READ | cv2.FILE_STORAGE_MEMORY)
    cascade = cv2.CascadeClassifier()
    cascade.read(storage.getFirstTopLevelNode())
    return cascade


def _stretched(image: Image.Image) -> np.ndarray:
    """Return the photo in grey with its contrast stretched, ``(height, width)`` uint8."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    dark, bright = np.percentile(grey, (1, 99))
    grey = (grey - dark) * (255 / max(bright - dark, 1))
    return grey.clip(0, 255).astype(np.uint8)


def _look(grey: np.ndarray, cascades: "Sequence[cv2.CascadeClassifier]", degrees: float) -> list[Face]:
    """Search the photo rotated by ``degrees``; faces are returned in coordinates of the original photo."""
    import cv2

    height, width = grey.shape
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
    if degrees:
        grey = cv2.warpAffine(grey, turn, (width, height), borderMode=cv2.BORDER_REPLICATE)
    first, second = (_detect(cascade, grey) for cascade in cascades)
    back = cv2.invertAffineTransform(turn)
    faces = []
    for face in first:
        confirmed = any(overlap(face, other) > 0.35 for other in second)
        x, y = back @ (*face.centre, 1.0)
        score = face.score + _CONFIRMED * confirmed
        faces.append(Face(float(x) - face.side / 2, float(y) - face.side / 2, face.side, score, float(degrees)))
    return faces


def _detect(cascade: "cv2.CascadeClassifier", grey: np.ndarray) -> list[Face]:
    smallest = max(_SMALLEST_FACE_PX, int(SMALLEST_FACE * min(grey.shape)))
    boxes, _, scores = cascade.detectMultiScale3(
        grey, scaleFactor=1.1, minNeighbors=2, minSize=(smallest, smallest), outputRejectLevels=True
    )
    # With no face both are empty tuples; otherwise (n, 4) and, depending on the version, (n,) or (n, 1).
    pairs = zip(boxes, np.ravel(scores), strict=True)
    return [Face(float(left), float(top), float(side), float(score)) for (left, top, side, _), score in pairs]
