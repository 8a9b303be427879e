"""The measuring network: who is in a picture of the miniature world, and in which style, place and attire.

It reads an identity embedding, in which two pictures of one person are alike and two people's are not (trained by
contrast, as face recognition is), and each attribute by name. It was trained on portraits that the base never saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lidb_peft.files import atomic_path
from testbed.portraits import (
    ATTIRES,
    BEARDS,
    EYE_COLOURS,
    GLASSES,
    HAIR_COLOURS,
    HAIR_STYLES,
    SCENES,
    STYLES,
    Identity,
    Scene,
)

CONTINUOUS = tuple(field.name for field in fields(Identity) if field.type in (float, "float"))
CHOICES = {
    "hair_colour": tuple(HAIR_COLOURS), "hair_style": HAIR_STYLES, "eye_colour": tuple(EYE_COLOURS), "beard": BEARDS,
    "glasses": GLASSES, "freckles": (False, True), "style": STYLES, "place": SCENES, "attire": ATTIRES,
}  # fmt: skip
EMBEDDING_DIM = 64


@dataclass(frozen=True)
class Measurement:
    """What the network says about ``n`` pictures.

    Attributes:
        embedding: who, ``(n, 64)``, of unit length; the inner product of two is their identity similarity.
        continuous: attributes of `CONTINUOUS`, each ``(n,)``, 0 to 1.
        logits: choices of `CHOICES`, each ``(n, choices)``.
    """

    embedding: Tensor
    continuous: dict[str, Tensor]
    logits: dict[str, Tensor]

    def choice(self, name: str) -> list:
        """The likeliest value of an attribute, style, place or attire for each picture."""
        return [CHOICES[name][i] for i in self.logits[name].argmax(dim=1).tolist()]


class MeasuringNetwork(nn.Module):
    """Reads who and what is in 32 x 32 pictures off the features of a trunk."""

    def __init__(self, trunk: nn.Module | None = None, width: int = 320):
        """Put fresh heads on ``trunk``, which makes ``(n, width)`` of pictures; default a small convolutional one."""
        super().__init__()
        self.trunk = _convolutional_trunk(width) if trunk is None else trunk
        self.embedding = nn.Linear(width, EMBEDDING_DIM)
        self.continuous = nn.Linear(width, len(CONTINUOUS))
        self.choices = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in CHOICES.items()})

    def forward(self, pixels: Tensor) -> Measurement:
        """Measure pictures ``(n, 3, 32, 32)`` in [-1, 1]."""
        features = self.trunk(pixels)
        return Measurement(
            embedding=F.normalize(self.embedding(features), dim=1),
            continuous=dict(zip(CONTINUOUS, self.continuous(features).unbind(1), strict=True)),
            logits={name: head(features) for name, head in self.choices.items()},
        )


def _convolutional_trunk(width: int) -> nn.Sequential:
    def block(fan_in: int, fan_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
        convolution = nn.Conv2d(fan_in, fan_out, kernel, stride, padding=1)
        return nn.Sequential(convolution, nn.GroupNorm(8, fan_out), nn.GELU())

    return nn.Sequential(
        block(3, 32, kernel=4, stride=2), block(32, 64), block(64, 96, kernel=4, stride=2), block(96, 96),
        block(96, 96, kernel=4, stride=2), block(96, 96), nn.Flatten(),
        nn.Linear(96 * 16, width), nn.LayerNorm(width), nn.GELU(),
    )  # fmt: skip


def to_pixels(images: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """uint8 ``(n, h, w, 3)`` -> float ``(n, 3, h, w)`` in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def measuring_path() -> Path:
    return Path(__file__).parent / "measuring.safetensors"


def load_measuring_network(path: Path | None = None) -> MeasuringNetwork:
    """The bundled measuring network, or the one at ``path``, ready to measure."""
    network = MeasuringNetwork()
    network.load_state_dict(load_file(path or measuring_path()))
    return network.eval().requires_grad_(False)


def save_measuring_network(network: MeasuringNetwork, path: Path) -> None:
    """Write the network's weights in float16."""
    with atomic_path(path) as temporary:
        save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, temporary)


def labels(who: Identity, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The right answers for a portrait: `CONTINUOUS` as float32, and the index of each of `CHOICES`."""
    choices = {name: getattr(who if hasattr(who, name) else scene, name) for name in CHOICES}
    continuous = np.array([getattr(who, name) for name in CONTINUOUS], np.float32)
    return continuous, np.array([values.index(choices[name]) for name, values in CHOICES.items()])
