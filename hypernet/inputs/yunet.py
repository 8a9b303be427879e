"""Faces by YuNet (Wu, Peng and Yu 2023), which OpenCV runs as `FaceDetectorYN`: with eyes, nose and mouth.

Its file (233 KB) is downloaded from the Hugging Face hub on first use, at a fixed revision, and verified by its hash.
"""

import hashlib
import importlib.util
import math
import os
import socket
import threading
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
from PIL import Image

from hypernet.errors import first_sentence
from hypernet.inputs.face import SMALLEST_FACE, Face

if TYPE_CHECKING:
    import cv2

REPOSITORY = "opencv/face_detection_yunet"
REVISION = "3cc26e7f1014a5ee5d74a42acee58bafc9d0a310"
FILE = "face_detection_yunet_2023mar.onnx"
SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
OWN_COPY = "HDB_YUNET"
"""The environment variable that names a copy of `FILE`, for machines without the hub."""

_LEAST_SCORE = 0.6
_OVERLAP = 0.3  # of two boxes of one face; the weaker is dropped
_SIDE_PER_EYES, _SIDE_PER_FACE = 2.6, 2.34  # from brows to chin, in distances between eyes, eyes and mouth
_CENTRE = 0.3  # fraction of the way from the eyes to the mouth
_LEAST_SIDE_PX = 64  # in smaller ones OpenCV's network reads uninitialised memory, and may find a face in it
_LARGEST_FACE_PX, _SECOND_LOOK = 320, 0.5  # larger faces may be missed at full size; half the size is searched too
_STRAIGHT_DEG, _STRAIGHT_SCORE = 4, 0.92  # a head with less roll and a higher score is not checked again
_ROLLS_DEG = (-45.0, -22.5, 0.0, 22.5, 45.0)  # of these checks, besides the one at which it was found
_PATCH, _FACE_PX = 3.2, 115  # their patch: its side in faces, and the size of the face in it
_PER_DEGREE = 0.003  # score that a degree of remaining roll costs
_UNDERSTATED = 1.2  # a head's roll, relative to what its points show
_lock = threading.Lock()  # a network holds its intermediate results


def unavailable() -> str:
    """Why YuNet is not available, as text; empty if it is. Downloads the file."""
    if not importlib.util.find_spec("cv2"):
        return "OpenCV is not installed"
    import cv2

    if not hasattr(cv2, "FaceDetectorYN"):
        return f"OpenCV {cv2.__version__} does not know it"
    return _fetch(os.environ.get(OWN_COPY))[1]


def look(image: Image.Image) -> list[Face]:
    """Return the faces of a small RGB photo, rotated by any angle, each with its score in [0, 1].

    Raises:
        ValueError: `unavailable`.
    """
    faces = _detect(image, 1.0)
    if not faces and min(image.size) > _LARGEST_FACE_PX:
        faces = _detect(image, _SECOND_LOOK)
    return faces


def straighten(image: Image.Image, face: Face, turn_deg: float) -> Face:
    """Check a tilted face again with the head upright, because its points show less than half of a large roll.

    Args:
        image: the picture in which the face was found.
        turn_deg: the roll of a face that was upright when it was found.

    Returns:
        The face with the roll, place and size of the best check.
    """
    tilt = (face.roll_deg - turn_deg + 180) % 360 - 180
    if abs(tilt) < _STRAIGHT_DEG and face.score > _STRAIGHT_SCORE:
        return face
    looks = [look for roll in _ROLLS_DEG for look in _look_again(image, face, turn_deg + roll)]
    value, straight = max(looks, key=lambda look: look[0], default=(0.0, face))
    return replace(straight, score=face.score) if value > face.score - _PER_DEGREE * abs(tilt) else face


def _look_again(image: Image.Image, face: Face, roll_deg: float) -> list[tuple[float, Face]]:
    """The face as found in a patch that is rotated back by ``roll_deg``, with the score of that check."""
    (x, y), step = face.centre, face.side / _FACE_PX
    middle = _PATCH * _FACE_PX / 2
    along, across = step * math.cos(math.radians(roll_deg)), step * math.sin(math.radians(roll_deg))
    back = (along, -across, x - middle * (along - across), across, along, y - middle * (across + along))
    patch = image.transform((round(2 * middle),) * 2, Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
    found = []
    for seen in _detect(patch, 1.0):
        right, down = seen.centre[0] - middle, seen.centre[1] - middle
        if math.hypot(right, down) > seen.side / 2:
            continue
        side = seen.side * step
        left = x + along * right - across * down - side / 2
        top = y + across * right + along * down - side / 2
        roll = (roll_deg + _UNDERSTATED * seen.roll_deg + 180) % 360 - 180
        found.append((seen.score - _PER_DEGREE * abs(seen.roll_deg), Face(left, top, side, seen.score, roll)))
    return found


def _detect(image: Image.Image, scale: float) -> list[Face]:
    size = [max(1, round(side * scale)) for side in image.size]
    small = image if scale == 1 else image.resize(size, Image.Resampling.LANCZOS)
    width, height = (max(side, _LEAST_SIDE_PX) for side in size)
    if small.size != (width, height):
        small = small.crop((0, 0, width, height))  # black beyond its edges, as OpenCV's own padding is
    pixels = np.ascontiguousarray(np.asarray(small)[..., ::-1])  # OpenCV's colours are BGR
    with _lock:
        detector = _detector(os.getpid())
        detector.setInputSize((width, height))
        _, rows = detector.detect(pixels)
    faces = [_face(row, scale) for row in (() if rows is None else rows)]
    return [face for face in faces if face.side >= SMALLEST_FACE * min(image.size)]


def _face(row: np.ndarray, scale: float) -> Face:
    """A row of OpenCV's result: a box, five points (the eyes, the nose, the corners of the mouth) and a score.

    Side and centre follow from the points, so that they hold for a head at any angle: in profile the eyes come close,
    with an open mouth it goes away from them.
    """
    eye, other_eye, _, corner, other_corner = (row[4:14].reshape(5, 2) / scale).astype(float)
    eyes, mouth = (eye + other_eye) / 2, (corner + other_corner) / 2
    across, down = other_eye - eye, mouth - eyes
    side = max(_SIDE_PER_EYES * math.hypot(*across), _SIDE_PER_FACE * math.hypot(*down))
    x, y = eyes + _CENTRE * down
    # Both show the roll; in profile eyes to mouth is more accurate, from the front the line of the eyes.
    roll_deg = math.degrees(math.atan2(across[1] - down[0], across[0] + down[1]))
    return Face(float(x - side / 2), float(y - side / 2), side, float(row[14]), roll_deg)


@lru_cache(maxsize=1)
def _detector(process: int) -> "cv2.FaceDetectorYN":
    """One for each process, because OpenCV's threads do not survive a fork."""
    import cv2

    content, reason = _fetch(os.environ.get(OWN_COPY))
    if content is None:
        raise ValueError(reason)
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns that the network runs on the CPU
    try:
        network = np.frombuffer(content, dtype=np.uint8)
        nothing = np.empty(0, dtype=np.uint8)
        return cv2.FaceDetectorYN.create("onnx", network, nothing, (320, 320), _LEAST_SCORE, _OVERLAP)
    finally:
        cv2.utils.logging.setLogLevel(level)


@lru_cache(maxsize=1)
def _fetch(own_copy: str | None) -> tuple[bytes | None, str]:
    """The network, or None and why it is not available; tried once, because an unreachable hub takes long."""
    if own_copy:
        path = Path(own_copy)
        if not path.is_file():
            return None, f"{OWN_COPY} names {own_copy}, which is not a file"
    else:
        try:
            path = _from_hub()
        except OSError as error:
            return None, (
                f"its file (233 KB) could not be downloaded from the Hugging Face hub ({first_sentence(error)}); "
                f"connect to the internet once, or set {OWN_COPY} to a copy of {FILE}"
            )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        return None, f"{path} is damaged or another file than {FILE} of {REPOSITORY}; delete it"
    return content, ""


def _from_hub() -> Path:
    """The file in the hub's cache, downloaded on first use.

    Raises:
        OSError: it is not there, and the hub cannot be reached.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(REPOSITORY, FILE, revision=REVISION, local_files_only=True))
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set") from None
    if not getproxies():  # without a network, the hub's library retries for half a minute and reports each attempt
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    return Path(hf_hub_download(REPOSITORY, FILE, revision=REVISION))
