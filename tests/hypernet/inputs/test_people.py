import io
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
from PIL import ExifTags, Image

from hypernet.fitting.subjects import make_subjects
from hypernet.inputs.people import Person, PreparedPerson, RawPhoto, identity_key, open_people, prepare_person
from hypernet.inputs.photos import load_photo

pytestmark = pytest.mark.usefixtures("datasets_cache")


def write_parquet(path, images, with_features=False):
    """Images as ``(name, bytes)``, with or without what `datasets` notes of their type."""
    path.parent.mkdir(exist_ok=True)
    rows = [None if image is None else {"bytes": image[1], "path": image[0]} for image in images]
    if with_features:
        from datasets import Dataset, Features
        from datasets import Image as ImageFeature

        Dataset.from_dict({"image": rows}, features=Features(image=ImageFeature())).to_parquet(path)
    else:
        pq.write_table(pa.table({"image": rows}), path)
    return path


def write_tar(path, images, suffix="png"):
    with tarfile.open(path, "w") as tar:
        for name, data in images:
            entry = tarfile.TarInfo(f"{name}.{suffix}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def keys(people, size_px=32):
    return [prepare_person(person, size_px, crop=False)[0].key for person in people]


def names(people):
    return [person.name for person in people]


# ---- where people come from ----


def test_every_kind_of_data_set_gives_the_same_people_in_the_same_order(drawn_faces, face_folder, tmp_path):
    images = [(str(i), face) for i, face in enumerate(drawn_faces)]
    write_parquet(tmp_path / "parquet [1]" / "a.parquet", images[:2])
    write_parquet(tmp_path / "parquet [1]" / "b.parquet", images[2:])
    sources = [tmp_path / "parquet [1]", write_parquet(tmp_path / "noted.parquet", images, with_features=True),
               write_tar(tmp_path / "faces.tar", images)]  # fmt: skip
    expected, roster = keys(open_people(face_folder)), open_people(face_folder).roster
    assert len(set(expected)) == len({digest for _, digest in roster}) == 5
    for source in sources:
        people = open_people(source)
        assert people.roster == tuple((name, digest) for name, (_, digest) in zip(names(people), roster, strict=True))
        assert keys(people) == keys(people) == expected  # the same every time
        assert people.count() == 5
        streamed = open_people(source, streaming=True)
        assert keys(streamed) == expected
        assert names(streamed) == names(people)
        assert streamed.count() in (None, 5)  # known where a cache of the same files has counted them


def test_a_sub_folder_is_one_person_and_what_is_no_image_is_no_person(face_folder, drawn_faces):
    (face_folder / "Ann" / "more").mkdir(parents=True)
    (face_folder / "Ann" / "2.PNG").write_bytes(drawn_faces[0])
    (face_folder / "Ann" / "more" / "1.png").write_bytes(drawn_faces[1])
    (face_folder / ".thumbnails").mkdir()
    (face_folder / ".thumbnails" / "0.png").write_bytes(drawn_faces[0])
    (face_folder / "._1.png").write_bytes(b"left by a Mac")
    (face_folder / "captions.txt").write_text("a face")
    people = list(open_people(face_folder))
    assert names(people) == ["0.png", "1.png", "2.png", "3.png", "4.png", "Ann"]
    assert [photo.name for photo in people[-1].photos] == ["Ann/2.PNG", "Ann/more/1.png"]
    prepared, skipped = prepare_person(people[-1], 32, crop=False)
    assert prepared.pixels.shape == (2, 3, 32, 32)
    assert not skipped


def test_a_link_to_a_folder_is_a_folder(face_folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "ann").symlink_to(face_folder, target_is_directory=True)
    (ann,) = open_people(tmp_path / "linked")
    assert (ann.name, len(ann.photos)) == ("ann", len(list(face_folder.glob("*.png"))))


def test_one_image_is_a_data_set_too(face_folder):
    assert names(open_people(face_folder / "3.png")) == ["3.png"]


def test_people_have_the_names_of_their_images_or_names_that_no_order_changes(drawn_faces, tmp_path):
    named = [("ann.png", drawn_faces[0]), ("bob.png", drawn_faces[1])]
    assert names(open_people(write_parquet(tmp_path / "a.parquet", named))) == ["ann.png", "bob.png"]
    nameless = write_parquet(tmp_path / "b.parquet", [(None, face) for face in drawn_faces])
    assert len(set(names(open_people(nameless)))) == 5
    swapped = write_parquet(tmp_path / "c.parquet", [(None, face) for face in drawn_faces[::-1]])
    assert names(open_people(swapped)) == names(open_people(nameless))[::-1]
    (tmp_path / "tars").mkdir()
    for tar in ("0.tar", "1.tar"):  # keys may start afresh in every tar
        write_tar(tmp_path / "tars" / tar, [("ann", drawn_faces[0])])
    assert names(open_people(tmp_path / "tars")) == ["0.tar/ann.png", "1.tar/ann.png"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_that_is_none_is_named(face_folder, drawn_faces, tmp_path, streaming):
    def message(source, kind=ValueError):
        with pytest.raises(kind) as caught:
            list(open_people(source, streaming))
        assert str(source) in str(caught.value)
        return str(caught.value)

    assert "could not be downloaded from the Hugging Face hub" in message("nobody/faces", FileNotFoundError)
    assert "could not be downloaded from the Hugging Face hub" in message(tmp_path / "faecs", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in message(tmp_path / "empty")
    write_tar(face_folder / "more.tar", [])
    assert "holds images and webdataset" in message(face_folder)
    pq.write_table(pa.table({"age": [30]}), tmp_path / "ages.parquet")
    assert "has no column of images, but age" in message(tmp_path / "ages.parquet")
    whole = write_tar(tmp_path / "whole.tar", [(str(i), drawn_faces[i % 5]) for i in range(20)])
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:-20_000])
    assert "is damaged or no data set" in message(tmp_path / "cut.tar")


def test_a_damaged_parquet_is_no_traceback(drawn_faces, tmp_path):
    whole = write_parquet(tmp_path / "a.parquet", [("a", drawn_faces[0])])
    whole.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a\.parquet"):
        list(open_people(whole))


# ---- what becomes of their photos ----


def test_the_key_is_that_of_a_subject_of_the_same_photos(base, face_folder):
    photos = [load_photo(face_folder / name, 32, crop=False) for name in ("0.png", "1.png")]
    pixels = torch.stack([photo.to_tensor() for photo in photos])
    (subject,) = make_subjects(base, [PreparedPerson("ann", tuple(photos))], "a sks face")
    assert identity_key(pixels) == subject.key


def test_what_cannot_be_used_is_skipped_with_its_reason(drawn_faces, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "dot.png")
    good = RawPhoto("good.png", drawn_faces[0])
    data = {"text.png": b"no picture", "empty.png": b"", "cut.png": drawn_faces[1][:400],
            "gone.png": str(tmp_path / "gone.png"), "dot.png": str(tmp_path / "dot.png")}  # fmt: skip
    bad = tuple(map(RawPhoto, data, data.values()))
    prepared, skipped = prepare_person(Person("ann", (*bad, good)), 32, crop=False)
    assert prepared.name == "ann"
    assert prepared.pixels.shape == (1, 3, 32, 32)
    assert [entry.name for entry in skipped] == list(data)
    reasons = ("not an image", "empty", "damaged", "does not exist", "9 x 9 pixels")
    assert all(reason in entry.reason for reason, entry in zip(reasons, skipped, strict=True))
    assert prepare_person(Person("ann", bad), 32, crop=False)[0] is None


def test_whatever_files_a_folder_holds_they_cost_nobody_else(drawn_faces, tmp_path):
    """Photos as cameras, scanners, editors, messengers and failed downloads leave them."""
    folder, face = tmp_path / "faces", Image.open(io.BytesIO(drawn_faces[0])).convert("RGB").resize((48, 48))
    folder.mkdir()
    sound = {
        "cmyk.jpg": face.convert("CMYK"), "palette.gif": face.quantize(), "grey.png": face.convert("L"),
        "bits.png": face.convert("1"), "alpha.png": face.convert("LA"), "deep.png": Image.new("I;16", (40, 40), 30000),
        "float.tiff": face.convert("F"), "thin.png": Image.new("RGB", (33, 4000)),
    }  # fmt: skip
    for name, image in sound.items():
        image.save(folder / name)
    face.save(folder / "moves.webp", save_all=True, append_images=[face.rotate(90)])
    turn = Image.Exif()
    turn[ExifTags.Base.Orientation] = 6
    face.save(folder / "turned.jpg", exif=turn)
    photo = (folder / "turned.jpg").read_bytes()
    broken = {
        "empty.jpg": b"", "cut.jpg": photo[: len(photo) // 3], "page.jpg": b"<!DOCTYPE html><title>404</title>",
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "program.png": b"MZ" + bytes(90),
        "text.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n", "header.png": drawn_faces[1][:40],
    }  # fmt: skip
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    found = {person.name: prepare_person(person, 32, crop=False) for person in open_people(folder)}
    assert {name for name, (prepared, _) in found.items() if prepared} == {*sound, "moves.webp", "turned.jpg"}
    reasons = {name: skipped[0].reason for name, (prepared, skipped) in found.items() if prepared is None}
    assert reasons.keys() == {*broken, "dot.png"}
    assert all(name in reason and reason.isprintable() for name, reason in reasons.items())


def test_a_photo_without_a_face_is_skipped():
    wall = io.BytesIO()
    Image.fromarray(skimage.data.brick()).save(wall, "PNG")
    prepared, (skipped,) = prepare_person(Person("wall", (RawPhoto("wall", wall.getvalue()),)), 32, crop=True)
    assert prepared is None
    assert "no face found" in skipped.reason


def test_a_missing_image_in_a_table_is_skipped(drawn_faces, tmp_path):
    rows = [("0.png", drawn_faces[0]), None, (None, None), ("gone.png", None)]
    people = open_people(write_parquet(tmp_path / "a.parquet", rows))
    assert [prepare_person(person, 32, crop=False)[0] is None for person in people] == [False, True, True, True]


def test_an_image_behind_a_url_is_fetched_and_a_broken_connection_is_not_its_fault(face_folder, drawn_faces):
    url = (face_folder / "0.png").as_uri()
    (key,) = keys([Person("a", (RawPhoto("a", url),))])
    assert key == keys([Person("a", (RawPhoto("a", drawn_faces[0]),))])[0]
    with pytest.raises(OSError, match="gone"):
        prepare_person(Person("a", (RawPhoto("a", (face_folder / "gone.png").as_uri()),)), 32, crop=False)


# ---- what a hostile data set may not do ----


def test_links_that_lead_back_have_an_end(face_folder):
    for name in ("again", "once more"):
        (face_folder / name).symlink_to(".")
    (face_folder / "Ann").mkdir()
    (face_folder / "0.png").rename(face_folder / "Ann" / "a.png")
    (face_folder / "Ann" / "up").symlink_to("..")
    assert names(open_people(face_folder)) == ["1.png", "2.png", "3.png", "4.png", "Ann"]


@pytest.mark.parametrize(
    "link", ["http://localhost:1/a.png", "ftp://localhost:1/a", "file:///{}", "/{}", "zip://a::{}"]
)
def test_what_a_row_names_elsewhere_is_not_opened(face_folder, tmp_path, monkeypatch, link):
    monkeypatch.setattr("hypernet.inputs.people._fetch", lambda *_: pytest.fail("it was fetched"))
    link = link.format(str(face_folder / "0.png").lstrip("/"))
    (person,) = open_people(write_parquet(tmp_path / "a.parquet", [(link, None)]))
    prepared, (skipped,) = prepare_person(person, 32, crop=False)
    assert prepared is None
    assert "holds no picture; only pictures in the data set are read" in skipped.reason


def test_a_name_that_is_no_text_refuses_nobody(face_folder):
    try:
        os.rename(face_folder / "0.png", os.fsencode(face_folder) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes names of UTF-8 only")
    people = open_people(face_folder)
    assert sorted(names(people)) == ["1.png", "2.png", "3.png", "4.png", "caf\\xe9.png"]
    assert len(set(keys(people))) == 5


def test_a_pickle_in_a_tar_is_never_opened(drawn_faces, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    write_tar(tmp_path / "a.tar", [("0", drawn_faces[0])])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        entry = tarfile.TarInfo("0.pth")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"evil!"))
    for streaming in (False, True):
        assert len(keys(open_people(tmp_path / "a.tar", streaming))) == 1
