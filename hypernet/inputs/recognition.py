"""Recognising people while a fit runs: embeddings of pictures, through which a gradient flows."""

import importlib.util
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample, normalize

from hypernet.bundles import find_bundle
from hypernet.errors import first_sentence
from hypernet.inputs.face import Face
from hypernet.inputs.faces import find_faces
from hypernet.recipe import PersonalizeConfig
from hypernet.sampling import to_image

_FACENET = {"facenet-pytorch": "facenet_pytorch", "torchvision": "torchvision"}
_FACENET_PX = 160
_FACENET_SCALE = 127.5 / 128  # of pixels in [-1, 1]
_WITHOUT = "leave --likeness out"
_BOX_PER_FACE = 1.2  # what facenet was trained on reaches from the forehead to below the chin


class Recogniser(Protocol):
    """What tells people apart by their pictures."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Embeddings ``(n, width)`` of unit length, whose inner product is similarity; zeros where no face is seen.

        Differentiable.

        Args:
            pixels: ``(n, 3, h, w)`` float32 in [-1, 1].
        """


class FacenetRecogniser:
    """facenet-pytorch's Inception ResNet trained on VGGFace2, on the faces that a detector finds."""

    def __init__(self, network: nn.Module, device: torch.device | str = "cpu", detector: str = "auto") -> None:
        """Take over ``network``, see `load_facenet`; ``detector`` is as `find_faces` takes it."""
        self._network = network.eval().requires_grad_(False).to(device)
        self._detector = detector
        with torch.no_grad():
            self._width = self._network(torch.zeros(1, 3, _FACENET_PX, _FACENET_PX, device=device)).shape[1]

    def embed(self, pixels: Tensor) -> Tensor:
        found = [_first_face(picture, self._detector) for picture in pixels.detach().cpu()]
        seen = [row for row, face in enumerate(found) if face is not None]
        if not seen:
            return pixels.new_zeros(len(pixels), self._width)
        cut = torch.cat([cut_face(pixels[row], face) for row, face in enumerate(found) if face is not None])
        embeddings = normalize(self._network(_FACENET_SCALE * cut), dim=1)
        result = embeddings.new_zeros(len(pixels), self._width)
        return result.index_copy(0, torch.tensor(seen, device=result.device), embeddings)


def load_recogniser(
    base: str | Path, config: PersonalizeConfig, device: torch.device | str = "cpu"
) -> Recogniser | None:
    """Load the network by which a recipe's finetuning recognises people: facenet, or the one that goes with the base.

    Args:
        base: its id, folder or file.

    Returns:
        None if the recipe needs none.

    Raises:
        ValueError: it cannot be had.
    """
    if not config.recognises:
        return None
    own = find_bundle(base).recogniser
    return FacenetRecogniser(load_facenet(_WITHOUT), device, config.face_detector) if own is None else own()


def check_recogniser(base: str | Path, config: PersonalizeConfig) -> None:
    """Raise ValueError if a recipe's finetuning needs facenet and it is not installed."""
    if config.recognises and find_bundle(base).recogniser is None:
        check_facenet(_WITHOUT)


def cut_face(pixels: Tensor, face: Face, side_px: int = _FACENET_PX) -> Tensor:
    """The face in a picture ``(3, h, w)``, upright, ``(1, 3, side_px, side_px)``; differentiable."""
    height, width = pixels.shape[1:]
    centre = pixels.new_tensor(face.centre)
    half = _BOX_PER_FACE * face.side / 2
    roll = torch.deg2rad(pixels.new_tensor(face.roll_deg))
    across = torch.stack([roll.cos(), roll.sin()]) * half
    down = torch.stack([-roll.sin(), roll.cos()]) * half
    size = pixels.new_tensor([width, height])
    # In halves of the picture, as affine_grid takes them.
    matrix = torch.stack([across, down, centre - size / 2], dim=1) / (size / 2)[:, None]
    grid = affine_grid(matrix[None], [1, 3, side_px, side_px], align_corners=False)
    return grid_sample(pixels[None], grid, padding_mode="border", align_corners=False)


def load_facenet(remedy: str) -> Any:
    """Load facenet-pytorch's network trained on VGGFace2, which the library downloads at first use.

    Its weights are not openly licensed, for their faces are not.

    Raises:
        ValueError: the library is not installed, or its weights cannot be had; ``remedy`` says what else to do.
    """
    check_facenet(remedy)
    import facenet_pytorch

    try:
        return facenet_pytorch.InceptionResnetV1(pretrained="vggface2")
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"facenet-pytorch's weights trained on VGGFace2 could not be downloaded ({first_sentence(error)}); connect "
            f"to the internet once, or {remedy}"
        ) from error


def check_facenet(remedy: str) -> None:
    """Raise ValueError if facenet-pytorch is not installed; ``remedy`` says what else to do."""
    missing = [package for package, module in _FACENET.items() if not importlib.util.find_spec(module)]
    if missing:  # facenet-pytorch asks for torch 2.3 at most and NumPy 1, and works with later ones
        raise ValueError(f"faces cannot be recognised with facenet: {' and '.join(missing)} is not installed; run "
                         f"pip install torchvision tqdm requests, then pip install --no-deps facenet-pytorch, or "
                         f"{remedy}")  # fmt: skip


def _first_face(pixels: Tensor, detector: str) -> Face | None:
    return next(iter(find_faces(to_image(pixels), detector)), None)
