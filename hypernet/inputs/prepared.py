"""A data set prepared once: photos decoded, faces detected and cropped, so that training only has to read.

Detecting a face takes longer than everything else, 0.28 CPU seconds each time a photo is used. A prepared data set is
parquet: shards of people with their crops (lossless), names, and skipped photos with the reason. Rows and photo digests
are those of the source, so targets and trainings made from either can be continued with the other, unless the VAE's
moments are stored beside them, in float16. Processes that prepare one data set at the same time, on any number of
machines, claim shards one by one.
"""

import io
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from hypernet.claims import LOOK_S, Claims, one_at_a_time, take_missing
from hypernet.inputs.people import (
    PREPARED_COLUMNS,
    PREPARED_MANIFEST,
    People,
    open_people,
    prepare_person,
    prepared_shard,
    with_detector,
)
from hypernet.inputs.photos import to_pixels
from hypernet.recipe import PersonalizeConfig, StageProgress, changed
from lidb_peft.files import atomic_path
from lidb_peft.outputs import check_output_folder

if TYPE_CHECKING:
    import pyarrow

    from hypernet.base_models.base import BaseModel

SHARD = 256  # people; of 512 px about 100 MB
MANIFEST = PREPARED_MANIFEST
_GROUP = 16  # people that are read at once
_OTHERS = {"source": "other images", "vae": "moments of another VAE, or of none"}


@dataclass
class PreparedSet:
    """What was prepared.

    Attributes:
        folder: of the shards, which `open_people` opens.
        people: whom this run has prepared, those included of whom nothing can be used.
        left_out: photos among them that cannot be used, name -> reason.
        found: shards of an earlier run.
        missing: shards that are another part's, and not there yet.
        seconds: that it took.
    """

    folder: Path
    people: int
    left_out: dict[str, str]
    found: int
    missing: int
    seconds: float


def prepare(
    people: People | str | Path,
    out: str | Path,
    size_px: int = 512,
    config: PersonalizeConfig | None = None,
    part: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    progress: StageProgress | None = None,
    base: "BaseModel | None" = None,
    **options: Any,
) -> PreparedSet:
    """Prepare everybody of a data set, once, in shards of parquet; an interrupted run resumes.

    Runs at the same time share the work; each ends when all shards, or those of its part, are there.

    Args:
        people: what `open_people` opens, or has opened, not streamed.
        size_px: the side of the squares: the base's, 512 for Stable Diffusion 1.5.
        config: whether and how faces are found: its ``crop``, ``face_detector`` and ``face``.
        part: ``(i, n)`` makes every n-th shard from the i-th on, for n machines.
        num_workers: processes that find faces; 0 does it in this one.
        progress: called with ("prepare", people done, this part's people).
        base: stores the moments of its VAE too, in float16: a training that neither flips nor jitters, and
            pre-optimisation, then encode no photo, and take no other base.
        options: fields of ``config`` to change.

    Raises:
        ValueError, OSError: the data set or the part is invalid, or ``out`` holds something else or cannot be written.
    """
    index, count = part
    if not 0 <= index < count:
        raise ValueError(f"part is {index} of {count}; count parts from 0, such as 0 of {max(count, 1)}")
    if size_px < 1:
        raise ValueError(f"size_px is {size_px}; expected 1 or more, 512 for Stable Diffusion 1.5")
    if base is not None and base.size_px != size_px:
        raise ValueError(f"size_px is {size_px}, and {base.name} encodes {base.size_px} pixels; pass --resolution "
                         f"{base.size_px}")  # fmt: skip
    config, out = with_detector(changed(config or PersonalizeConfig(), options)), Path(out)
    opened = people if isinstance(people, People) else open_people(people)
    if opened.is_prepared or opened.is_streamed:
        raise ValueError(f"{opened.source} is {'prepared' if opened.is_prepared else 'streamed'}; pass the images")
    check_output_folder(out, [opened.source], ["*.parquet"], is_resumed=(out / MANIFEST).is_file())
    vae = "" if base is None else base.vae_fingerprint
    with one_at_a_time(out):
        _agree(out / MANIFEST, settings_of(opened, size_px, config) | {"vae": vae})
    start, mine = time.perf_counter(), _shards(opened)[index::count]
    missing = _missing(out, mine)
    made, total = PreparedSet(out, 0, {}, len(mine) - len(missing), 0, 0.0), sum(len(_rows(opened, s)) for s in missing)

    def report(record: dict[str, Any]) -> None:
        made.people += 1
        made.left_out |= {photo["name"]: photo["problem"] for photo in record["photos"] if photo["problem"]}
        if progress is not None:
            progress("prepare", made.people, total)

    claims, records = Claims(out), _Records(opened, size_px, config)
    try:
        while missing:
            _make_shards(records, out, missing, num_workers, claims, base, report)
            if missing := _missing(out, mine):  # others are at work on them, or have died
                time.sleep(LOOK_S)
    finally:
        claims.release_all()
        if base is not None:
            base.release_vae()
    made.missing, made.seconds = len(_missing(out, _shards(opened))), time.perf_counter() - start
    return made


def settings_of(people: People, size_px: int, config: PersonalizeConfig) -> dict[str, Any]:
    """What a prepared data set depends on."""
    return {"source": people.fingerprint, "people": len(people.dataset), "size_px": size_px, "crop": config.crop,
            "shard": SHARD, "face_detector": config.face_detector, "face": config.face}  # fmt: skip


def is_complete(folder: Path, people: People) -> bool:
    """Whether all shards of a data set are in ``folder``."""
    return not _missing(folder, _shards(people))


def _shards(people: People) -> range:
    return range(-(-len(people.dataset) // SHARD))


def _missing(out: Path, shards: range) -> list[int]:
    return [shard for shard in shards if not _file(out, shard).exists()]


def _agree(manifest: Path, settings: dict[str, Any]) -> None:
    """Begin a data set, or find that it is the one that was begun."""
    if not manifest.exists():
        with atomic_path(manifest) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    try:
        found = {"vae": ""} | json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{manifest} is damaged; choose another output folder") from error
    for name, value in settings.items():
        if found.get(name) != value:
            what = _OTHERS.get(name, f"{name} {found.get(name)!r} and not {value!r}")
            raise ValueError(f"{manifest.parent} was prepared with {what}; choose another output folder")


def _file(out: Path, shard: int) -> Path:
    return out / prepared_shard(shard)


def _rows(people: People, shard: int) -> range:
    return range(len(people.dataset))[shard * SHARD : (shard + 1) * SHARD]


class _Records:
    """Rows of a data set, prepared one by one: what torch's loader asks for in its workers."""

    def __init__(self, people: People, size_px: int, config: PersonalizeConfig) -> None:
        self.people, self.size_px, self.config = people, size_px, config

    def __getitem__(self, row: int) -> dict[str, Any]:
        (person,) = replace(self.people, dataset=self.people.dataset.select([row]))
        config = self.config
        prepared, skipped = prepare_person(person, self.size_px, config.crop, config.face_detector, face=config.face)
        photos = [{"name": photo.name, "png": _png(photo.image), "problem": ""}
                  for photo in (prepared.photos if prepared else ())]  # fmt: skip
        photos += [{"name": each.name, "png": b"", "problem": each.reason} for each in skipped]
        return {"name": person.name, "digest": person.digest, "size_px": self.size_px, "photos": photos}


def _make_shards(
    records: _Records,
    out: Path,
    shards: list[int],
    num_workers: int,
    claims: Claims,
    base: "BaseModel | None",
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Make those of the shards that can be claimed, each as soon as the workers have nothing else to do."""
    from torch.utils.data import DataLoader

    claimed: deque[int] = deque()

    def claim() -> Iterator[int]:
        for shard in shards:
            if take_missing(claims, shard, lambda shard: _file(out, shard).exists()):
                claimed.append(shard)
                yield shard

    claiming = claim()
    first = next(claiming, None)
    if first is None:
        return
    rows = (row for shard in chain([first], claiming) for row in _rows(records.people, shard))
    data: Any = records  # torch's loader asks for no more than it has
    finished: list[dict[str, Any]] = []
    for record in DataLoader(data, batch_size=None, sampler=rows, num_workers=num_workers):
        finished.append(record if base is None else _with_moments(record, base))
        report(record)
        if len(finished) == len(_rows(records.people, claimed[0])):
            _write(_file(out, claimed[0]), finished)
            claims.release(claimed.popleft())
            finished = []


def _with_moments(record: dict[str, Any], base: "BaseModel") -> dict[str, Any]:
    photos = [{**photo, "moments": _moments(photo["png"], base) if photo["png"] else b""} for photo in record["photos"]]
    return {**record, "photos": photos, "vae": base.vae_fingerprint}


def _moments(png: bytes, base: "BaseModel") -> bytes:
    pixels = to_pixels(Image.open(io.BytesIO(png)))
    return base.encode_photos(pixels[None], release=False)[0].half().cpu().numpy().tobytes()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _schema(has_moments: bool) -> "pyarrow.Schema":
    import pyarrow

    text, data = pyarrow.string(), pyarrow.binary()
    photo = [("name", text), ("png", data), ("problem", text), *([("moments", data)] if has_moments else [])]
    kinds = (text, text, pyarrow.int32(), pyarrow.list_(pyarrow.struct(photo)))
    columns = list(zip(PREPARED_COLUMNS, kinds, strict=True))
    return pyarrow.schema([*columns, *([("vae", text)] if has_moments else [])])


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist(records, schema=_schema("vae" in records[0]))
    with atomic_path(path) as temporary:
        parquet.write_table(table, temporary, row_group_size=_GROUP, compression="none")  # PNG is compressed
