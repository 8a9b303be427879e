"""Who is in a picture of the miniature world: the measuring network for `hdb eval`, another one for finetunings."""

import hashlib

import torch
from PIL import Image
from torch import Tensor

from hypernet.evaluation.faces import SeenFace
from testbed import MINIATURE_SIZE_PX
from testbed.measuring import attributes_together, load_measuring_network, load_recogniser, measuring_path, to_pixels

# Where the face is: the same place in all portraits.
_BOX = (0.28, 0.25, 0.72, 0.85)


class DrawnFaces:
    """Assumes a face in the middle of every picture, and computes its embedding of 64 numbers."""

    source = "testbed"
    same = None
    measure = "the cosine of the measuring network's embeddings"

    def __init__(self) -> None:
        """Load the bundled measuring network."""
        self._network = load_measuring_network()
        self.revision = f"sha256:{hashlib.sha256(measuring_path().read_bytes()).hexdigest()[:16]}"

    @torch.no_grad()
    def see(self, picture: Image.Image) -> SeenFace:
        small = picture.convert("RGB").resize((MINIATURE_SIZE_PX,) * 2, Image.Resampling.LANCZOS)
        return SeenFace(self._network(to_pixels([small])).embedding[0], None, _BOX)

    def similarity(self, first: Tensor, second: Tensor) -> Tensor:
        return first @ second.T


class DrawnRecogniser:
    """The bundled recogniser, which is none of the networks that measure; see `testbed.likeness`."""

    def __init__(self) -> None:
        """Load it."""
        self._network = load_recogniser()

    def embed(self, pixels: Tensor) -> Tensor:
        """Embeddings ``(n, 101)``: half of their similarity is that of faces, half that of attributes."""
        found = self._network(pixels)
        return torch.cat([found.embedding, attributes_together(found.continuous, found.logits)], dim=1) * 0.5**0.5
