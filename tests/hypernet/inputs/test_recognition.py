"""Where faces are cut for a network that recognises people, and that gradients reach the picture."""

import math

import pytest
import torch

from hypernet.inputs import recognition
from hypernet.inputs.face import Face
from hypernet.inputs.recognition import FacenetRecogniser, check_facenet, cut_face


class Mean(torch.nn.Module):
    def forward(self, faces):
        return faces.mean(dim=(2, 3))


@pytest.fixture
def recogniser(monkeypatch):
    """Sees a face in the left half of every picture that is not black."""

    def find(image, detector):
        return [Face(8.0, 8.0, 16.0, 1.0)] if image.getextrema() != ((0, 0),) * 3 else []

    monkeypatch.setattr(recognition, "find_faces", find)
    return FacenetRecogniser(Mean())


def test_a_face_is_cut_with_what_is_around_it():
    pixels = torch.zeros(3, 64, 96)
    pixels[0, 20:44, 10:34] = 1.0  # 1.2 times the square of 20 pixels at (12, 22)
    (cut,) = cut_face(pixels, Face(12.0, 22.0, 20.0, 1.0), 24)
    assert torch.allclose(cut[0], torch.ones(24, 24), atol=1e-5)
    assert not cut[1:].any()


@pytest.mark.parametrize("roll_deg", [0.0, 30.0, 90.0, 180.0])
def test_a_turned_head_is_cut_upright(roll_deg):
    """A spot above the middle of the face, in the face's own upright frame, comes out above the middle."""
    angle, centre, above = math.radians(roll_deg), (40.0, 30.0), 8.0
    x, y = centre[0] + above * math.sin(angle), centre[1] - above * math.cos(angle)
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    spot = torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 4)
    (cut,) = cut_face(spot.expand(3, -1, -1), Face(centre[0] - 10, centre[1] - 10, 20.0, 1.0, roll_deg), 48)
    place = divmod(int(cut[0].argmax()), 48)
    # 24 pixels of the photo are 48 of the cut: the spot is 16 above its middle.
    assert abs(place[0] - 7.5) <= 1
    assert abs(place[1] - 23.5) <= 1


def test_embeddings_have_unit_length_and_zeros_stand_for_nobody(recogniser):
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures[1] = -1.0
    found = recogniser.embed(pictures)
    assert found.shape == (3, 3)
    assert torch.allclose(found.norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))
    assert torch.equal(recogniser.embed(pictures[1:2]), torch.zeros(1, 3))


def test_a_gradient_reaches_the_face_and_nothing_else(recogniser):
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    recogniser.embed(pictures)[:, 0].sum().backward()
    gradient = pictures.grad.abs().sum(dim=(0, 1))
    assert gradient[9:23, 9:23].min() > 0
    assert not gradient[:, 28:].any()


def test_what_is_not_installed_is_named_with_both_remedies(monkeypatch):
    monkeypatch.setattr(recognition.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"facenet-pytorch and torchvision is not installed; run pip .*, or sing$"):
        check_facenet("sing")
