"""Where faces are found, by which detector, and how the crop is turned; the real face is scikit-image's astronaut."""

import hashlib
import math
import os
import re
import socket

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from hypernet.inputs import cascades
from hypernet.inputs import yunet as yunet_module
from hypernet.inputs.crops import find_crops, open_photos
from hypernet.inputs.face import Face
from hypernet.inputs.faces import choose_detector, find_faces
from hypernet.inputs.photos import NoFaceError, prepare_photo
from hypernet.recipe import PersonalizeConfig

FACE = (224, 110)  # the middle of the astronaut's face in the picture of 512 x 512


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(data.astronaut())


@pytest.fixture
def no_copy(monkeypatch, tmp_path):
    """No copy of YuNet's file, and no hub."""
    monkeypatch.delenv("HDB_YUNET", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    yunet_module._fetch.cache_clear()
    yield
    yunet_module._fetch.cache_clear()


def distance(face: Face, point: tuple[float, float]) -> float:
    return math.dist(face.centre, point) / face.side


def turned(point, degrees, size):
    """Where a point of a picture is once that was turned by ``degrees``, counter-clockwise, and enlarged to hold it."""
    angle = math.radians(degrees)
    x, y = point[0] - size[0] / 2, point[1] - size[1] / 2
    width = abs(size[0] * math.cos(angle)) + abs(size[1] * math.sin(angle))
    height = abs(size[0] * math.sin(angle)) + abs(size[1] * math.cos(angle))
    return (
        width / 2 + x * math.cos(angle) + y * math.sin(angle),
        height / 2 - x * math.sin(angle) + y * math.cos(angle),
    )


@pytest.mark.parametrize("degrees", [0, 20, 45, 90, 135, 180, -45, -90])
def test_yunet_finds_a_face_at_any_angle_and_says_which(astronaut, yunet, degrees):
    picture = astronaut.crop((60, 0, 420, 360)).rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    face, *_ = find_faces(picture, "yunet")
    assert distance(face, turned((FACE[0] - 60, FACE[1]), degrees, (360, 360))) < 0.25
    difference = (face.roll_deg + degrees + 180) % 360 - 180  # turned against the clock, it is rolled against it
    assert abs(difference) < 15


@pytest.mark.parametrize("degrees", [90, 180, -90])
@pytest.mark.parametrize("detector", ["yunet", "cascade"])
def test_a_photo_that_lies_on_its_side_is_cropped_as_the_upright_one(astronaut, yunet, detector, degrees):
    if detector == "cascade" and cascades.unavailable():
        pytest.skip(cascades.unavailable())
    upright = astronaut.crop((60, 0, 420, 360))
    expected = np.asarray(prepare_photo(upright, 64, detector=detector).image, dtype=float)
    lying = upright.rotate(degrees, expand=True)
    result = np.asarray(prepare_photo(lying, 64, detector=detector).image, dtype=float)
    assert np.abs(result - expected).mean() < 25  # the upright one is 70 away from itself upside down
    assert np.abs(result[::-1, ::-1] - expected).mean() > 40


@pytest.mark.parametrize("degrees", [20, -45])
def test_the_crop_is_turned_upright_by_the_eyes(astronaut, yunet, degrees):
    # With enough around it that the turned crop lies in the photo.
    around = Image.fromarray(np.pad(np.asarray(astronaut), ((200, 200), (200, 200), (0, 0)), mode="reflect"))
    tilted = around.rotate(degrees, Image.Resampling.BICUBIC, center=(FACE[0] + 200, FACE[1] + 200))
    face = find_faces(prepare_photo(tilted, 256, detector="yunet").image, "yunet")[0]
    assert abs(face.roll_deg) < 20
    assert math.dist(face.centre, (128, 128)) < 40


def test_a_tilted_face_in_a_corner_is_whole_in_the_crop(astronaut, yunet):
    tilted = astronaut.crop((60, 0, 420, 360)).rotate(40, Image.Resampling.BICUBIC, expand=True)
    x, y = turned((FACE[0] - 60, FACE[1]), 40, (360, 360))
    photo = prepare_photo(tilted.crop((round(x - 70), round(y - 75), round(x + 160), round(y + 160))), 128)
    face = find_faces(photo.image, "yunet")[0]
    assert math.dist(face.centre, (64, 64)) < 64 - face.side / 2


def test_a_panorama_is_searched_in_full(astronaut):
    head = astronaut.crop((124, 10, 324, 210)).resize((120, 120))
    rng = np.random.default_rng(0)
    panorama = Image.fromarray(rng.integers(90, 110, (160, 3000, 3), dtype=np.uint8))
    for left in (40, 1321, 2860):
        panorama.paste(head, (left, 20))
    for picture, axis in ((panorama, 0), (panorama.transpose(Image.Transpose.ROTATE_270), 1)):
        faces = find_faces(picture)
        places = sorted(face.centre[axis] for face in faces)
        assert len(places) == 3
        np.testing.assert_allclose(places, [left + 60 for left in (40, 1321, 2860)], atol=15)


def test_a_face_that_fills_the_photo_is_found(astronaut, yunet):
    head = astronaut.crop((170, 50, 280, 170)).resize((1100, 1200), Image.Resampling.BICUBIC)
    assert find_faces(head, "yunet")


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (200, 20)])
def test_what_yunet_sees_in_a_small_picture_does_not_depend_on_what_memory_held(yunet, monkeypatch, size):
    monkeypatch.setattr(yunet_module, "_LEAST_SCORE", 0.001)  # so that something is seen
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    seen = set()
    for _ in range(12):
        yunet_module._detector.cache_clear()
        seen.add(tuple(yunet_module.look(picture)))
        used = [np.full(rng.integers(10, 40_000), 1e3 * rng.random(), np.float32) for _ in range(20)]
        del used
    yunet_module._detector.cache_clear()
    assert len(seen) == 1
    assert seen != {()}


def test_both_detectors_draw_the_same_square(astronaut, yunet):
    if cascades.unavailable():
        pytest.skip(cascades.unavailable())
    one, other = (find_faces(astronaut, detector)[0] for detector in ("yunet", "cascade"))
    assert distance(one, other.centre) < 0.15
    assert one.side == pytest.approx(other.side, rel=0.3)


# ---- which detector ----


def test_the_file_is_the_one_that_the_hash_names(yunet):
    content, _ = yunet_module._fetch(os.environ.get("HDB_YUNET"))
    assert hashlib.sha256(content).hexdigest() == yunet_module.SHA256
    assert choose_detector("auto") == "yunet"


def test_another_file_in_its_place_is_refused(no_copy, monkeypatch, tmp_path, astronaut):
    wrong = tmp_path / "other.onnx"
    wrong.write_bytes(b"not YuNet")
    monkeypatch.setenv("HDB_YUNET", str(wrong))
    with pytest.raises(ValueError, match=r"other\.onnx is damaged or another file"):
        find_faces(astronaut, "yunet")
    yunet_module._fetch.cache_clear()
    monkeypatch.setenv("HDB_YUNET", str(tmp_path / "gone.onnx"))
    with pytest.raises(ValueError, match="is not a file"):
        find_faces(astronaut, "yunet")


def test_without_a_copy_auto_takes_the_cascades_and_says_so(no_copy, astronaut):
    if cascades.unavailable():
        pytest.skip(cascades.unavailable())
    with pytest.warns(UserWarning, match=r"cascades, which miss more.*233 KB.*HF_HUB_OFFLINE"):
        assert choose_detector("auto") == "cascade"
    with pytest.raises(ValueError, match=r"YuNet.*connect to the internet once, or set HDB_YUNET.*--no-crop"):
        choose_detector("yunet")


def test_a_machine_without_a_network_is_not_kept_waiting(no_copy, monkeypatch):
    def nobody(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    def asked(*arguments, local_files_only=False, **options):
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert local_files_only
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr(yunet_module, "getproxies", dict)
    assert "Name or service not known" in yunet_module.unavailable()


def test_the_hub_is_asked_for_one_revision(no_copy, monkeypatch, tmp_path):
    asked = []

    def download(repository, name, revision, local_files_only=False):
        asked.append((repository, name, revision))
        (tmp_path / name).write_bytes(b"x")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert "damaged" in yunet_module.unavailable()
    ((repository, name, revision),) = asked
    assert (repository, name) == ("opencv/face_detection_yunet", "face_detection_yunet_2023mar.onnx")
    assert len(revision) == 40


def test_opencv_5_has_no_cascades(no_copy, monkeypatch, astronaut):
    monkeypatch.delattr(cv2, "CascadeClassifier", raising=False)
    with pytest.raises(ValueError, match=r"has no cascades \(5\.0 dropped them\).*233 KB.*--no-crop"):
        find_faces(astronaut)
    with pytest.raises(ValueError, match=r"--face-detector yunet.*--no-crop"):
        find_faces(astronaut, "cascade")
    assert prepare_photo(astronaut, 32, crop=False).face is None  # needs no detector


def test_an_unknown_detector_is_refused():
    with pytest.raises(ValueError, match="choose auto, yunet or cascade"):
        choose_detector("dlib")


# ---- several photos of one person ----


def test_of_several_photos_one_without_a_face_is_left_out_and_named(astronaut, tmp_path):
    for name, picture in {"a": data.coffee(), "b": data.astronaut(), "c": data.rocket()}.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    photos, left_out = open_photos([tmp_path / f"{name}.png" for name in "abc"])
    assert [photo.name for photo in photos] == [str(tmp_path / "b.png")]
    assert [sentence.split(": ")[1] for sentence in left_out] == [f"{tmp_path / name}.png" for name in "ac"]
    with pytest.raises(NoFaceError, match=r"no photo of 2 can be used: .*c\.png: no face found"):
        open_photos([tmp_path / "a.png", tmp_path / "c.png"])
    with pytest.raises(FileNotFoundError):  # what is not there is a mistake, not a bad photo
        open_photos([tmp_path / "b.png", tmp_path / "gone.png"])


def test_a_folder_is_one_persons_photos_and_bad_ones_are_named(astronaut, tmp_path):
    folder = tmp_path / "me"
    folder.mkdir()
    for name in ("b.png", "a.JPG"):
        astronaut.save(folder / name)
    (folder / "cut.jpg").write_bytes((folder / "a.JPG").read_bytes()[:4000])
    Image.fromarray(data.coffee()).save(folder / "cup.png")
    Image.new("RGB", (8, 8)).save(folder / "tiny.png")
    (folder / "a.txt").write_text("a caption")
    (folder / ".hidden.png").write_bytes(b"no picture")
    photos, left_out = open_photos(folder)
    assert [photo.name for photo in photos] == [str(folder / name) for name in ("a.JPG", "b.png")]
    assert [re.search(r"(\w+\.\w+).* (damaged|no face|at least 32)", sentence).groups() for sentence in left_out] == [
        ("cup.png", "no face"), ("cut.jpg", "damaged"), ("tiny.png", "at least 32"),
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no photos"):
        open_photos(tmp_path / "empty")


@pytest.fixture
def group(astronaut):
    """A small head at the left, a large one in the middle, one of middling size at the right; their centres."""
    head = astronaut.crop((100, 0, 350, 220))
    picture, centres = Image.new("RGB", (1400, 500), "gray"), []
    for left, scale in ((20, 0.75), (330, 2.0), (1000, 1.2)):
        size = (round(250 * scale), round(220 * scale))
        picture.paste(head.resize(size, Image.Resampling.LANCZOS), (left, 30))
        centres.append((left + (FACE[0] - 100) * scale, 30 + FACE[1] * scale))
    return picture, centres


@pytest.mark.parametrize(
    ("face", "index", "words"),
    [
        ("largest", 1, "the largest clear one"),
        ("leftmost", 0, "the leftmost"),
        ("rightmost", 2, "the rightmost"),
        ("1", 0, "number 1 from the left"),
        ("3", 2, "number 3 from the left"),
    ],
)
def test_the_face_that_is_wanted_is_taken(group, yunet, face, index, words):
    picture, centres = group
    photo = prepare_photo(picture, 64, name="group.jpg", face=face)
    assert distance(photo.face, centres[index]) < 0.3
    assert photo.note == f"group.jpg: 3 faces found, {words} is taken"


def test_crops_show_every_photo_and_what_is_wrong_with_it(group, astronaut, yunet, tmp_path):
    picture, centres = group
    picture.save(tmp_path / "group.png")
    photos = [tmp_path / "group.png", astronaut, data.coffee(), tmp_path / "gone.png"]
    crops = find_crops(photos, 64, face="3")
    assert [crop.name for crop in crops] == [str(photos[0]), "photo 2", "photo 3", str(photos[3])]
    assert [distance(face, centre) < 0.3 for face, centre in zip(crops[0].faces, centres, strict=True)] == [True] * 3
    assert crops[0].photo.image.size == (64, 64)
    assert crops[0].photo.face == crops[0].faces[2]
    assert "1 face found, and face 3 from the left was asked for" in crops[1].problem
    assert "no face found" in crops[2].problem
    assert "does not exist" in crops[3].problem
    (used,), left_out = open_photos(photos[:3], face="3")  # what is used is what was shown
    assert used.prepare(64).image.tobytes() == crops[0].photo.image.tobytes()
    assert len(left_out) == 2


@pytest.mark.parametrize("face", ["0", "-1", "middle", "1.5", ""])
def test_a_face_that_cannot_be_meant_is_refused(face):
    with pytest.raises(ValueError, match="choose largest, leftmost, rightmost, or its number"):
        PersonalizeConfig(face=face)
