"""The measuring networks: who is in a picture of the miniature world, and in which style, place and attire.

The first predicts an identity embedding, which is similar for two pictures of one person and different for two people
(trained contrastively, like face recognition), and each attribute by name. The second differs in kind: a residual
network that predicts only attributes, of which eyes and jaw count as much as skin and hair. Both were trained on
portraits that the base never saw, each on different ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
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
CHOICE_SHARES = {
    "hair_colour": (1 / 9,) * 9, "hair_style": (1 / 8,) * 8, "eye_colour": (1 / 3,) * 3,
    "beard": (0.55, 0.15, 0.1, 0.2), "glasses": (0.6, 0.2, 0.2), "freckles": (0.75, 0.25),
}  # fmt: skip
"""Choices of an identity -> how common each value is."""
POSE = {
    "roll": (0.0, 0.08),
    "yaw": (0.0, 0.35),
    "zoom": (1.075, 0.0433),
    "shift_x": (0.0, 0.025),
    "shift_y": (0.0, 0.02),
}
"""How a scene is posed: mean and standard deviation over random scenes."""
EMBEDDING_DIM = 64
RECOGNISER_WIDTH = 160


@dataclass(frozen=True)
class Measurement:
    """The network's output for ``n`` pictures.

    Attributes:
        embedding: identity, ``(n, dim)``, of unit length; the inner product of two is their identity similarity.
        continuous: attributes of `CONTINUOUS`, each ``(n,)``, 0 to 1.
        logits: choices of `CHOICES`, each ``(n, choices)``.
        pose: `POSE`, each ``(n,)`` with variance 1 over random scenes; empty if the network does not predict it.
    """

    embedding: Tensor
    continuous: dict[str, Tensor]
    logits: dict[str, Tensor]
    pose: dict[str, Tensor] = field(default_factory=dict)

    def choice(self, name: str) -> list:
        """The most likely value of an attribute, style, place or attire for each picture."""
        return [CHOICES[name][i] for i in self.logits[name].argmax(dim=1).tolist()]


class MeasuringNetwork(nn.Module):
    """Predicts who and what is in 32 x 32 pictures from the features of a trunk."""

    def __init__(self, trunk: nn.Module | None = None, width: int = 320):
        """Put new heads on ``trunk``, which maps pictures to ``(n, width)``; by default a small convolutional one."""
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


class AttributeNetwork(nn.Module):
    """Predicts attributes and pose from 32 x 32 pictures; identity is all attributes together."""

    def __init__(self, width: int = 160):
        super().__init__()
        self.trunk = residual_trunk(width)
        self.continuous = nn.Linear(width, len(CONTINUOUS))
        self.choices = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in CHOICES.items()})
        self.pose = nn.Linear(width, len(POSE))

    def forward(self, pixels: Tensor) -> Measurement:
        """Measure pictures ``(n, 3, 32, 32)`` in [-1, 1]."""
        features = self.trunk(pixels)
        pose = dict(zip(POSE, self.pose(features).unbind(1), strict=True))
        continuous = dict(zip(CONTINUOUS, self.continuous(features).unbind(1), strict=True))
        logits = {name: head(features) for name, head in self.choices.items()}
        return Measurement(attributes_together(continuous, logits), continuous, logits, pose)


def attributes_together(continuous: dict[str, Tensor], logits: dict[str, Tensor]) -> Tensor:
    """All attributes of an `Identity` as numbers around 0 of equal variance over people: ``(n, 37)``, unit length."""
    parts = [(value - 0.5)[:, None] * 12**0.5 for value in continuous.values()]  # uniform in [0, 1]
    for name, shares in CHOICE_SHARES.items():
        share = torch.tensor(shares)
        parts.append((logits[name].softmax(dim=1) - share) / (1 - share.square().sum()).sqrt())
    return F.normalize(torch.cat(parts, dim=1), dim=1)


class _ResidualBlock(nn.Module):
    """He et al. 2016, arXiv:1603.05027: x + f(x), with normalisation and activation first."""

    def __init__(self, width: int):
        super().__init__()
        self.change = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


def residual_trunk(width: int) -> nn.Sequential:
    """Features ``(n, width)`` of pictures ``(n, 3, 32, 32)`` by residual blocks at 16, 8 and 4 pixels."""

    def level(fan_in: int, fan_out: int) -> list[nn.Module]:
        return [nn.Conv2d(fan_in, fan_out, 4, stride=2, padding=1), _ResidualBlock(fan_out)]

    return nn.Sequential(
        *level(3, 48), *level(48, 96), *level(96, 112), nn.GroupNorm(8, 112), nn.SiLU(), nn.Flatten(),
        nn.Linear(112 * 16, width), nn.LayerNorm(width), nn.SiLU(),
    )  # fmt: skip


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


def to_images(pixels: Tensor) -> np.ndarray:
    """Float ``(n, 3, h, w)`` in [-1, 1], or a little outside -> uint8 ``(n, h, w, 3)``."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def measuring_path() -> Path:
    return Path(__file__).parent / "measuring.safetensors"


def attributes_path() -> Path:
    return Path(__file__).parent / "attributes.safetensors"


def load_measuring_network(path: Path | None = None) -> MeasuringNetwork:
    """The bundled measuring network, or the one at ``path``, ready to measure."""
    network = MeasuringNetwork()
    network.load_state_dict(load_file(path or measuring_path()))
    return network.eval().requires_grad_(False)


def recogniser_path() -> Path:
    return Path(__file__).parent / "recogniser.safetensors"


def load_recogniser(path: Path | None = None) -> MeasuringNetwork:
    """The bundled network that training and finetunings recognise people with (`testbed.likeness`), or another one."""
    network = MeasuringNetwork(residual_trunk(RECOGNISER_WIDTH), RECOGNISER_WIDTH)
    network.load_state_dict(load_file(path or recogniser_path()))
    return network.eval().requires_grad_(False)


def load_attribute_network(path: Path | None = None) -> AttributeNetwork:
    """The bundled second measuring network, or the one at ``path``, ready to measure."""
    network = AttributeNetwork()
    network.load_state_dict(load_file(path or attributes_path()))
    return network.eval().requires_grad_(False)


def save_measuring_network(network: nn.Module, path: Path) -> None:
    """Write the network's weights in float16."""
    with atomic_path(path) as temporary:
        save_file({name: value.half().contiguous() for name, value in network.state_dict().items()}, temporary)


def labels(who: Identity, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The labels of a portrait: `CONTINUOUS` as float32, and the index of each of `CHOICES`."""
    choices = {name: getattr(who if hasattr(who, name) else scene, name) for name in CHOICES}
    continuous = np.array([getattr(who, name) for name in CONTINUOUS], np.float32)
    return continuous, np.array([values.index(choices[name]) for name, values in CHOICES.items()])


def pose(scene: Scene) -> np.ndarray:
    """The true `POSE` of a scene, float32."""
    found = {
        "roll": scene.roll,
        "yaw": scene.yaw,
        "zoom": scene.zoom,
        "shift_x": scene.shift[0],
        "shift_y": scene.shift[1],
    }
    return np.array([(found[name] - mean) / deviation for name, (mean, deviation) in POSE.items()], np.float32)
