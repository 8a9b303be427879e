"""Data sets that were prepared on their first use, in the cache of the Hugging Face hub (``HF_ASSETS_CACHE``)."""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import lidb_peft
from hypernet.errors import first_sentence
from hypernet.inputs.people import People, RawPhoto, is_told_by_parts, open_people, with_detector
from hypernet.inputs.prepared import is_complete, prepare, settings_of
from hypernet.quiet import without_data_set_bars
from hypernet.recipe import PersonalizeConfig, StageProgress, TrainConfig

CACHE_BYTES = 20 * 10**9
"""What the cache may hold: by the estimate, 25,000 photos of 512 pixels. The data sets used longest ago make room."""
_BYTES_PER_PIXEL = 3.0  # PNG of a portrait takes about 1.5, and `datasets` maps a copy
_KEPT_S = 24 * 3600  # one that was used since is not removed: somebody may be reading it
_log = logging.getLogger(__name__)


def prepared(
    people: People,
    size_px: int,
    config: PersonalizeConfig | TrainConfig,
    num_workers: int = 0,
    progress: StageProgress | None = None,
    make: bool = True,
) -> People:
    """A data set from the cache, prepared there first if it is not: the same people and pixels, bit for bit.

    It is found again by the digests of its photos and by what its crops depend on. Processes that ask at the same time
    share the work.

    Args:
        config: whether and how faces are found: its ``crop``, ``face_detector`` and ``face``.
        make: prepare it if it is not there; otherwise, and if the cache has no room for it, ``people`` are returned.
    """
    if people.is_prepared or people.is_streamed:
        return people
    if not make and not _root().is_dir():
        return people
    config = with_detector(PersonalizeConfig(crop=config.crop, face_detector=config.face_detector, face=config.face))
    folder = _root() / _key(people, size_px, config)
    if not is_complete(folder, people):
        try:
            if not make or not _has_room(people, size_px, folder):
                return people
            _log.info("preparing %s in %s, once", people.source, folder)
            prepare(people, folder, size_px, config, num_workers=num_workers, progress=progress)
        except OSError as error:
            warnings.warn(f"{people.source} is not prepared in the cache, and is slower to read so: "
                          f"{first_sentence(error)}", stacklevel=2)  # fmt: skip
            return people
    try:
        os.utime(folder)
        arrow: Path | None = folder / ".arrow"
    except OSError:  # somebody else's cache, which is only read here
        arrow = None
    with without_data_set_bars():
        return replace(open_people(folder, cache_dir=arrow), source=people.source)


def _root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "lidb-peft" / "prepared"


def _key(people: People, size_px: int, config: PersonalizeConfig) -> str:
    """A digest of photos and settings, and of the versions of what decodes and crops."""
    import cv2
    import PIL

    versions = [lidb_peft.__version__, PIL.__version__, cv2.__version__]
    text = json.dumps([settings_of(people, size_px, config), versions, list(_changes(people))])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _changes(people: People) -> Iterator[int]:
    """When files were changed of which a digest sees only parts."""
    return (os.stat(photo.data).st_mtime_ns for photo in _photos(people) if is_told_by_parts(photo.data))


def _photos(people: People) -> Iterator[RawPhoto]:
    return (photo for person in people for photo in person.photos)


def _has_room(people: People, size_px: int, folder: Path) -> bool:
    """Make room for a data set, and say so if there is none."""
    needed = int(sum(1 for _ in _photos(people)) * size_px**2 * _BYTES_PER_PIXEL)
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    used: dict[Path, float] = {}
    for entry in root.iterdir():
        with suppress(FileNotFoundError):  # another process makes room too
            used[entry] = entry.stat().st_mtime
    used.pop(folder, None)
    held = {entry: _size(entry) for entry in used}
    for entry in sorted(used, key=used.__getitem__) if needed <= CACHE_BYTES else ():
        if sum(held.values()) + needed <= CACHE_BYTES or time.time() - used[entry] < _KEPT_S:
            break
        _remove(entry)
        del held[entry]
    if sum(held.values()) + needed <= CACHE_BYTES and needed <= shutil.disk_usage(root).free:
        return True
    _log.warning(
        "%s takes about %.1f GB prepared, for which the cache in %s has no room; faces are looked for in every run: "
        "prepare it with hdb prepare", people.source, needed / 1e9, root,
    )  # fmt: skip
    return False


def _size(entry: Path) -> int:
    """The bytes below a folder, which another process may be filling or removing."""
    size = 0
    for folder, _, names in os.walk(entry):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(folder, name)).st_size
    return size


def _remove(entry: Path) -> None:
    """Remove a data set at once: one that lacks files would be taken for one that is being prepared."""
    gone = entry.with_name(f".{uuid.uuid4().hex}")
    with suppress(OSError):  # another process has removed it, or on Windows somebody reads it
        entry.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
