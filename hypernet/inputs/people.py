"""The people of a data set: an image folder, parquet, webdataset tars or a hub id, through Hugging Face `datasets`.

One image is one person; in a folder, each sub-folder is one person with several photos. What cannot be used (no face,
damaged) is returned as `Skipped`, with its reason, and never raised.
"""

import glob
import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from hypernet.errors import first_line
from hypernet.inputs.face import Face
from hypernet.inputs.faces import choose_detector
from hypernet.inputs.photos import (
    NoFaceError,
    OpenPhoto,
    Photo,
    decode_image,
    image_suffixes,
    look_at,
    read_image,
)
from hypernet.recipe import PersonalizeConfig, TrainConfig
from lidb_peft.files import atomic_path
from lidb_peft.safe_read import printable, read_json_object

if TYPE_CHECKING:
    import datasets

Cropping = TypeVar("Cropping", PersonalizeConfig, TrainConfig)

DETECTOR_NAMES = {"yunet": "YuNet", "cascade": "OpenCV's cascades"}
_log = logging.getLogger(__name__)
PREPARED_COLUMNS = ("name", "digest", "size_px", "photos")
"""Of a data set that `hypernet.inputs.prepared` has made."""
PREPARED_MANIFEST = "prepared.json"
"""Beside its shards; its ``people`` and ``shard`` tell how many there must be."""
_WHOLE_BYTES = 2**20  # files of more are told by parts of them, so that going through 20 GB takes no minutes


class RawPhoto(NamedTuple):
    """An image that is not decoded yet: its bytes, or the path or URL where they are, or why they cannot be had.

    Attributes:
        moments: of a prepared one, the VAE's, as float16; empty if they are not stored.
    """

    name: str
    data: bytes | str
    problem: str = ""
    moments: bytes = b""


class Person(NamedTuple):
    """One row of a data set.

    Attributes:
        prepared_px: photos are squares of this side, as `hypernet.inputs.prepared` has made them; 0 if they are raw.
        source_digest: of the photos that they were made of.
    """

    name: str
    photos: tuple[RawPhoto, ...]
    prepared_px: int = 0
    source_digest: str = ""

    @property
    def digest(self) -> str:
        """Of the bytes of all photos; of large files a part of their beginning, middle and end."""
        return (
            self.source_digest
            or hashlib.sha256(b"".join(_photo_digest(photo.data) for photo in self.photos)).hexdigest()[:32]
        )


@dataclass(frozen=True)
class PreparedPerson:
    """A person ready to be fitted: a name, and photos of one size.

    Attributes:
        moments: the VAE's of each photo, ``(photos, 2 * c * h * w)`` float16, if the data set holds them.
    """

    name: str
    photos: tuple[Photo, ...]
    moments: Tensor | None = None

    @cached_property
    def pixels(self) -> Tensor:
        """The photos as ``(photos, 3, size_px, size_px)`` in [-1, 1]."""
        return torch.stack([photo.to_tensor() for photo in self.photos])

    @cached_property
    def key(self) -> str:
        """The `identity_key` of the photos: whatever they are called, they have one noise stream."""
        return identity_key(self.pixels)


class Skipped(NamedTuple):
    """A photo or a person that was left out, and why."""

    name: str
    reason: str


def write_skipped(path: Path, entries: Iterable[Skipped]) -> None:
    """Write what was left out as JSON, a line for each."""
    lines = [json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in entries]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class People:
    """Iterates over a data set's people in its own order, which is the same every time; decodes nothing.

    Attributes:
        source: where they come from, for messages.
        dataset: rows of ``name``, ``photos`` and ``paths`` if it is a folder, else rows with an undecoded image.
        image_column: the column of that image; None for a folder.
        is_from_hub: files named by rows are downloaded if they are on the hub too; no others named by rows are opened.
        is_prepared: rows are those of `hypernet.inputs.prepared`.
    """

    source: str
    dataset: "datasets.Dataset | datasets.IterableDataset"
    image_column: str | None
    is_from_hub: bool = False
    is_prepared: bool = False

    @cached_property
    def vae(self) -> str:
        """The fingerprint of the VAE whose moments are stored beside the photos; "" if none are."""
        if not self.is_prepared or "vae" not in (self.dataset.features or {}):
            return ""
        return next(iter(self.dataset.select_columns(["vae"])), {"vae": ""})["vae"]

    @property
    def is_streamed(self) -> bool:
        return not hasattr(self.dataset, "__len__")

    def count(self) -> int | None:
        """The number of people; None while it is unknown, because they are streamed."""
        if not self.is_streamed:
            return len(self.dataset)
        splits = self.dataset.info.splits or {}
        return splits["train"].num_examples or None if "train" in splits else None

    @cached_property
    def roster(self) -> tuple[tuple[str, str], ...]:
        """Each person's name and the digest of their photos; the whole data set is gone through for it, once."""
        if self.is_prepared:
            rows = self.dataset.select_columns(["name", "digest"])
            return tuple((row["name"], row["digest"]) for row in rows)
        return tuple((person.name, person.digest) for person in self)

    @property
    def fingerprint(self) -> str:
        """A digest of the roster, and of stored moments: tells that the data set is another."""
        return hashlib.sha256((repr(self.roster) + self.vae).encode()).hexdigest()

    def __iter__(self) -> Iterator[Person]:
        with _readable(self.source):
            for row in self.dataset:
                yield self._person(row)

    def _person(self, row: dict) -> Person:
        if self.is_prepared:
            photos = (
                RawPhoto(photo["name"], photo["png"] or b"", photo["problem"], photo.get("moments") or b"")
                for photo in row["photos"]
            )
            return Person(row["name"], tuple(photos), row["size_px"], row["digest"])
        if self.image_column is None:
            return Person(row["name"], tuple(map(RawPhoto, row["photos"], map(os.fsdecode, row["paths"]))))
        image = row[self.image_column] or {"bytes": None, "path": None}
        data, path = image["bytes"] or b"", image["path"] or ""
        # Without a name the bytes give one: a row's number would change with the order of the rows.
        name = path or hashlib.sha256(data).hexdigest()[:16]
        if "__url__" in row:  # keys are unique inside a tar only
            name = f"{Path(row['__url__']).name}/{name}"
        if data or not path:
            return Person(name, (RawPhoto(name, data),))
        if self.is_from_hub and _is_of_hub(path):
            return Person(name, (RawPhoto(name, path),))
        problem = f"its row names {printable(path)} and holds no picture; only pictures in the data set are read"
        return Person(name, (RawPhoto(name, b"", problem),))


def open_people(source: str | Path, streaming: bool = False, cache_dir: Path | None = None) -> People:
    """Open an image folder, a parquet or tar file, a folder of either, or a data set of the Hugging Face hub.

    What `hypernet.inputs.prepared.prepare` wrote is parquet.

    Args:
        streaming: read parquet, tars and the hub as they come, instead of copying them into the cache of `datasets`.
        cache_dir: where `datasets` copies them to instead.

    Raises:
        FileNotFoundError: the source is neither here nor on the hub.
        ValueError: it holds no images, or images in several of those forms, or not all shards of a prepared data set.
    """
    path = Path(source)
    if not path.exists():
        return replace(_open_table(str(source), streaming, str(source)), is_from_hub=True)
    found = {kind: files for kind, files in _find_files(path).items() if files}
    if len(found) != 1:
        raise ValueError(
            f"{path} holds {' and '.join(found) or 'no images'}; pass a folder of images (JPEG, PNG, WebP), or of "
            f"parquet files, or of webdataset .tar files"
        )
    ((kind, files),) = found.items()
    if kind == "images":
        return _open_folder(path, files)
    if (path / PREPARED_MANIFEST).is_file():
        _check_shards(path)
    # `datasets` takes its data files for patterns.
    data_files = [glob.escape(str(file.resolve())) for file in files]
    return _open_table(str(path), streaming, kind, data_files=data_files, cache_dir=cache_dir)


def prepared_shard(number: int) -> str:
    """The name of a shard of a prepared data set."""
    return f"people-{number:05}.parquet"


def _check_shards(folder: Path) -> None:
    """Raise ValueError unless all shards of a prepared data set are there: nobody is missed without a word."""
    manifest = read_json_object(folder / PREPARED_MANIFEST, "prepare the images again")
    people, shard = manifest.get("people"), manifest.get("shard")
    if not isinstance(people, int) or not isinstance(shard, int) or shard < 1:
        raise ValueError(f"{folder / PREPARED_MANIFEST} does not say how many people were prepared; prepare the images "
                         f"again into another folder")  # fmt: skip
    names = [prepared_shard(number) for number in range(-(-people // shard))]
    gone = [name for name in names if not (folder / name).is_file()]
    if gone:
        raise ValueError(f"{folder} lacks {len(gone)} of its {len(names)} shards, {gone[0]} for one; run hdb prepare "
                         f"again to make what is missing")  # fmt: skip


def _find_files(path: Path) -> dict[str, list[Path]]:
    """The files of each kind at ``path``, sorted; hidden ones and other kinds, such as captions, are left out."""
    suffixes = {"images": image_suffixes(), "parquet": {".parquet"}, "webdataset": {".tar"}}
    if path.is_file():
        files = [path]
    else:
        found = (file for folder in _folders_below(path, set()) for file in folder.iterdir())
        names = sorted(file.relative_to(path).as_posix() for file in found if file.is_file())
        files = [path / name for name in names if not f"/{name}".count("/.")]
    return {kind: [file for file in files if file.suffix.lower() in suffixes[kind]] for kind in suffixes}


def _folders_below(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield a folder and those below it, each once; those that are links too, as people's collections often are."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:  # a link to a folder that it is in, for one, would have no end
        return
    seen.add((status.st_dev, status.st_ino))
    yield folder
    for below in sorted(folder.iterdir()):
        if below.is_dir():
            yield from _folders_below(below, seen)


def _open_folder(source: Path, files: list[Path]) -> People:
    from datasets import Dataset

    folder = source.parent if source.is_file() else source
    photos: dict[str, list[Path]] = {}
    for file in files:
        relative = file.relative_to(folder)
        photos.setdefault(relative.parts[0], []).append(relative)
    # Names may hold bytes that are no text: paths are kept as bytes, and names tell those bytes by their numbers.
    paths = [[os.fsencode(folder / name) for name in names] for names in photos.values()]
    names = [[_as_text(name.as_posix()) for name in names] for names in photos.values()]
    with _readable(str(source)):
        rows = Dataset.from_dict({"name": [_as_text(name) for name in photos], "photos": names, "paths": paths})
    return People(str(source), rows, None)


def _as_text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def _open_table(source: str, streaming: bool, *load_arguments: str, **load_options: Any) -> People:
    import datasets
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    WebDataset.DECODERS.pop("pth", None)  # a pickle beside a picture stays bytes, that nobody opens
    with _readable(source):
        rows = datasets.load_dataset(*load_arguments, **load_options, split="train", streaming=streaming)
    features = rows.features or {}
    if set(PREPARED_COLUMNS) <= set(features):
        return People(source, rows, None, is_prepared=True)
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not columns and "image" not in features:
        raise ValueError(f"{source} has no column of images, but {', '.join(features) or 'none that is known'}")
    column = "image" if "image" in features else columns[0]  # that may lack what `datasets` notes of its type
    return People(source, rows.cast_column(column, datasets.Image(decode=False)), column)


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Turn what `datasets` raises on a broken or absent source into one sentence that names it."""
    import datasets.exceptions as failures

    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source} is not a local folder or file, and could not be downloaded from the Hugging Face hub as a data "
            f"set ({first_line(error)}); check its name, and that you are online and may read it"
        ) from error
    except (failures.DatasetsError, tarfile.TarError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(f"{source} is damaged or no data set ({first_line(error.__cause__ or error)})") from error


Faces = MutableMapping[bytes, tuple[Face, ...]]
"""By the digest of a photo's bytes, the faces that were found in it."""


def prepare_person(
    person: Person,
    size_px: int,
    crop: bool,
    detector: str = "auto",
    known: Faces | None = None,
    face: str = "largest",
) -> tuple[PreparedPerson | None, list[Skipped]]:
    """Decode a person's photos and prepare them as `hypernet.inputs.photos.prepare_photo` does.

    Args:
        known: faces of earlier looks, which are not looked for again; takes those that are found.

    Returns:
        The person on the photos that can be used, None if none can be; and the photos that cannot.

    Raises:
        ValueError: the person was prepared at another size.
    """
    if person.prepared_px:
        if person.prepared_px != size_px:
            raise ValueError(f"the data set was prepared at {person.prepared_px} pixels, and the base draws {size_px}; "
                             f"prepare it again with --resolution {size_px}")  # fmt: skip
        crop = False
    photos, skipped, moments = [], [], []
    for photo in person.photos:
        if photo.problem:
            skipped.append(Skipped(photo.name, photo.problem))
            continue
        is_file = isinstance(photo.data, str) and "://" not in photo.data
        file = None if is_file else io.BytesIO(_fetch(photo.data))
        try:
            image = decode_image(file, photo.name) if file else read_image(str(photo.data))
            photos.append(_look_once(image, photo, crop, detector, known, face).prepare(size_px))
            moments += [torch.frombuffer(bytearray(photo.moments), dtype=torch.float16)] if photo.moments else []
        except (ValueError, OSError) as error:
            skipped.append(Skipped(photo.name, str(error)))
    if not photos:
        return None, skipped
    return PreparedPerson(person.name, tuple(photos), torch.stack(moments) if moments else None), skipped


def _look_once(
    image: Image.Image, photo: RawPhoto, crop: bool, detector: str, known: Faces | None, face: str
) -> OpenPhoto:
    """`look_at`, but for faces that are ``known``: looking for them takes longer than all the rest."""
    if known is None or not crop:
        return look_at(image, crop, photo.name, detector, face=face)
    digest = _photo_digest(photo.data)
    try:
        opened = look_at(image, crop, photo.name, detector, known.get(digest), face)
    except NoFaceError:
        known[digest] = ()
        raise
    if opened.faces is not None:
        known[digest] = opened.faces
    return opened


def is_told_by_parts(data: bytes | str) -> bool:
    """Whether a photo's digest is of parts of its file alone."""
    return isinstance(data, str) and os.path.isfile(data) and os.path.getsize(data) > _WHOLE_BYTES


def _photo_digest(data: bytes | str) -> bytes:
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()
    if not os.path.isfile(data):
        return hashlib.sha256(os.fsencode(data)).digest()
    size, piece = os.path.getsize(data), _WHOLE_BYTES // 4
    with open(data, "rb") as file:
        if size <= _WHOLE_BYTES:
            return hashlib.sha256(file.read()).digest()
        digest = hashlib.sha256(str(size).encode())
        for start in (0, (size - piece) // 2, size - piece):
            file.seek(start)
            digest.update(file.read(piece))
    return digest.digest()


def _is_of_hub(path: str) -> bool:
    """Tell whether a path is in the hub's caches here, or a URL, of a member of an archive perhaps, is of the hub."""
    import datasets
    from huggingface_hub import constants

    if "://" in path:
        return path.rpartition("::")[2].startswith(("hf://", constants.ENDPOINT + "/"))
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME, constants.HF_HUB_CACHE)
    return any(Path(path).resolve().is_relative_to(Path(cache).resolve()) for cache in caches)


def _fetch(data: bytes | str) -> bytes:
    """The bytes themselves, or those at a URL; a broken connection is raised, for it is no fault of the image."""
    if isinstance(data, bytes):
        return data
    import fsspec

    with fsspec.open(data, "rb") as file:
        return file.read()


def identity_key(pixels: Tensor) -> str:
    """A digest of a person's prepared photos ``(photos, 3, h, w)``: keys their noise, and finds their target."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def derive_seed(*parts: object) -> int:
    """A seed that follows from ``parts``, such as an `identity_key`, on every machine the same."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def check_detector(crop: bool, detector: str) -> str:
    """Find out now, and not at each image of a data set, whether faces can be looked for, if they are to be.

    Returns:
        What ``detector`` means here, see `hypernet.inputs.faces.choose_detector`.

    Raises:
        ValueError: as there.
    """
    return choose_detector(detector) if crop else detector


def with_detector(config: Cropping) -> Cropping:
    """Return a config with the ``face_detector`` of `check_detector`, and log the choice if it made one."""
    chosen = check_detector(config.crop, config.face_detector)
    if chosen == config.face_detector:
        return config
    _log.info("faces are looked for with %s", DETECTOR_NAMES[chosen])
    return replace(config, face_detector=chosen)
