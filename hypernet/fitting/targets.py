"""The target store: a folder with the pre-optimised thetas of many people, in shards that are written whole.

The folder may be at a URL, see `hypernet.fitting.mirror`. `manifest.json` records what the thetas belong to and how
they were fitted. A shard holds the results of ``batch`` rows of the data set in one safetensors file: ``theta``
``(n, L, row)`` float32, ``losses`` ``(n,)`` and, as JSON in its metadata, keys, names, and what was skipped. All state
is in the files, so processes share none.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hypernet.fitting.mirror import Mirror, is_url
from hypernet.inputs.faces import choose_detector
from hypernet.inputs.people import Skipped, write_skipped
from hypernet.recipe import NUM_TIMESTEPS, PersonalizeConfig, TrainConfig
from lidb_peft import LiDBSpace, base_fingerprint, check_record, space_record
from lidb_peft.files import atomic_path
from lidb_peft.record import fingerprint_components, missing_fields, same_base
from lidb_peft.safe_read import printable, read_json_object
from lidb_peft.sealed import read_sealed, write_sealed

FORMAT_VERSION = 2
_UNSEALED_FORMAT = 1  # its shards have neither a checksum nor a record of their run
SKIPPED_FILE = "skipped.jsonl"
_MANIFEST = "manifest.json"
_SHARD = re.compile(r"shard-(\d{5,})\.safetensors")
_FILES = re.compile(rf"{_SHARD.pattern}|{re.escape(_MANIFEST)}|{re.escape(SKIPPED_FILE)}")
# Fields that manifests omitted while they had only one possible value.
_EARLIER_FIT = {
    "optimizer": "adamw", "max_timestep": NUM_TIMESTEPS, "face_detector": "cascade", "face": "largest",
    "moments": "float32",
}  # fmt: skip
_IN_EVERY_RUN = ("optimizer", "max_timestep", "face_detector")  # of these a run's digest names omitted ones too
_REMEDY = "delete it and run hdb preoptimize again to make it again"


@dataclass(frozen=True)
class Shard:
    """The results of some consecutive rows of a data set.

    Attributes:
        rows: names of all rows.
        keys, names: keys and names of those that were fitted.
        skipped: the photos and people that were left out.
        photos: a digest of the photos of each of ``rows``; empty in shards written before it was recorded.
    """

    rows: tuple[str, ...]
    keys: tuple[str, ...]
    names: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    photos: tuple[str, ...] = ()


def crop_fit(config: PersonalizeConfig | TrainConfig) -> dict[str, bool | str]:
    """What a store records about how the photos were cropped; of the face detector the one that ``auto`` meant."""
    if not config.crop:
        return {"crop": False}
    return {"crop": True, "face_detector": choose_detector(config.face_detector), "face": config.face}


def has_targets(folder: str | Path) -> bool:
    """Return whether there is a store in ``folder``, even one without shards.

    Raises:
        ValueError, OSError: it is a URL that cannot be opened.
    """
    return (_copy(folder)[0] / _MANIFEST).exists()


def _copy(folder: str | Path) -> tuple[Path, Mirror | None]:
    """The folder itself, or its copy here as it is now, and what keeps that in step with the URL."""
    if not is_url(folder):
        return Path(folder), None
    mirror = Mirror(str(folder), _FILES)
    mirror.fetch()
    return mirror.folder, mirror


def create_targets(
    folder: str | Path, space: LiDBSpace, base_model_name: str, fit: Mapping, batch: int, source: str
) -> None:
    """Make ``folder`` an empty store.

    Args:
        base_model_name: information for users, like ``source``, the origin of the photos.
        fit: everything that the targets depend on besides the space, as JSON values.
        batch: rows of the data set per shard.

    Raises:
        ValueError: there are shards without a manifest.
    """
    place, (folder, mirror) = folder, _copy(folder)
    if folder.is_dir() and any(_SHARD.fullmatch(file.name) for file in folder.iterdir()):
        raise ValueError(f"{place} holds shards without the {_MANIFEST} that says of what; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    record = space_record(space, base_model_name)
    manifest = {"format": FORMAT_VERSION, "space": record, "fit": dict(fit), "batch": batch, "source": source}
    with _sent(folder / _MANIFEST, mirror) as file, atomic_path(file) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


@contextmanager
def _sent(file: Path, mirror: Mirror | None) -> Iterator[Path]:
    """Yield a file to write, and bring it to the URL, if the store is at one."""
    if mirror is None:
        yield file
        return
    with mirror.lock:  # or another process would remove from the copy what is not at the URL yet
        yield file
        mirror.send(file)


class TargetStore:
    """A folder of targets.

    Attributes:
        place: where it is, for messages: a folder or a URL.
        folder: the folder, or the copy of it here.
        manifest: its manifest; ``space`` is the record of its space, ``fit`` the settings of the fits, ``batch``
            the number of people per shard.
    """

    def __init__(self, folder: str | Path, space: LiDBSpace) -> None:
        """Open the store in ``folder``, or at that URL, for ``space``.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it is no target store, or its targets are of another base, seed or dimensions.
            OSError: the URL cannot be read.
        """
        self.place = str(folder)
        self.folder, self._mirror = _copy(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist; name a folder that hdb preoptimize wrote")
        self.manifest = _read_manifest(self.folder, self.place)
        record = self.manifest["space"]
        theirs, ours = record["base_fingerprint"], base_fingerprint(space.models)
        parts, here = fingerprint_components(theirs, str(folder)), tuple(space.models)
        if parts and parts != here:
            raise ValueError(
                f"{folder} holds targets for {' and '.join(parts)}, not for {' and '.join(here)}; pass the --adapt "
                f"that they were fitted with, or fit new ones with hdb preoptimize"
            )
        if theirs and ours and not same_base(theirs, ours):
            name = printable(record["base_model_name"]) or "another base model"
            raise ValueError(
                f"{folder} holds targets of {name}, whose weights differ from this model's; use the base they "
                f"were fitted on, or fit new ones with hdb preoptimize"
            )
        check_record(record, space, str(folder))
        self._read: dict[int, Shard] = {}

    @property
    def run(self) -> str:
        """A digest of what all shards of the store have in common, which each of them records."""
        fit = _EARLIER_FIT | self.manifest["fit"]
        # A setting that comes to be recorded must not make earlier shards those of another run.
        named = {name: fit[name] for name in fit if name in _IN_EVERY_RUN or fit[name] != _EARLIER_FIT.get(name)}
        common = [self.manifest["space"], named, self.manifest["batch"]]
        return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:32]

    def check_fit(self, fit: Mapping) -> None:
        """Raise ValueError unless the targets were fitted with the settings ``fit``."""
        theirs, fit = _EARLIER_FIT | self.manifest["fit"], json.loads(json.dumps(dict(fit)))
        differing = [name for name in fit if theirs.get(name) != fit[name]]
        if differing:
            found = ", ".join(f"{name} {printable(repr(theirs.get(name)))} (here {fit[name]!r})" for name in differing)
            raise ValueError(
                f"{self.place} holds targets of another fit, with {found}; continue with its own settings, or choose "
                f"another folder"
            )

    @property
    def batch(self) -> int:
        """Rows of the data set per shard."""
        return self.manifest["batch"]

    def path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def name(self, index: int) -> str:
        """Of a shard, for messages."""
        return f"{self.place}/{self.path(index).name}"

    def has(self, index: int) -> bool:
        return self.path(index).exists()

    def shards(self) -> list[int]:
        """The numbers of the existing shards, in order."""
        if self._mirror is not None:
            self._mirror.fetch()
        found = (_SHARD.fullmatch(file.name) for file in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def write(self, index: int, shard: Shard, thetas: Tensor, losses: Tensor) -> None:
        """Write a shard whole: ``thetas`` ``(n, L, row)`` and ``losses`` ``(n,)``, float32."""
        self._read.pop(index, None)
        text = {name: json.dumps(value) for name, value in vars(shard).items()}
        with _sent(self.path(index), self._mirror) as file:
            write_sealed(file, {"theta": thetas, "losses": losses}, text | {"run": json.dumps(self.run)})

    @property
    def can_be_claimed(self) -> bool:
        """Whether processes can agree by files in the store on who makes what."""
        return self._mirror is None

    def read(self, index: int) -> Shard:
        """Read a shard without its thetas, which are checked too when it is read for the first time.

        Raises:
            ValueError: it is damaged, no shard, or of another run; the message names it.
        """
        if index not in self._read:
            self._read[index] = self._read_whole(index)
        return self._read[index]

    def _read_whole(self, index: int) -> Shard:
        path, name = self.path(index), self.name(index)
        try:
            tensors, metadata = read_sealed(path, is_required=self.manifest["format"] > _UNSEALED_FORMAT)
            text = {name: json.loads(value) for name, value in metadata.items()}
            shard = Shard(
                tuple(text["rows"]),
                tuple(text["keys"]),
                tuple(text["names"]),
                tuple(Skipped(*entry) for entry in text["skipped"]),
                tuple(text.get("photos", ())),
            )
            counts = {tensors[name].shape[0] for name in ("theta", "losses")}
        except (ValueError, KeyError, TypeError, IndexError) as error:
            reason = printable(str(error).removeprefix(f"{path} ").removeprefix("is damaged: "))
            raise ValueError(f"{name} is damaged or no shard of targets ({reason}); {_REMEDY}") from error
        if text.get("run", self.run) != self.run:
            raise ValueError(f"{name} is of another run than {self.place}/{_MANIFEST}, fitted otherwise or on another "
                             f"base; {_REMEDY}")  # fmt: skip
        if counts != {len(shard.keys)} or len(shard.names) != len(shard.keys):
            raise ValueError(f"{name} is damaged: it has {len(shard.keys)} keys for {counts} thetas; {_REMEDY}")
        return shard

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Where each person's theta is: key -> (shard, row), for the shards that existed at first use."""
        return {key: (index, row) for index in self.shards() for row, key in enumerate(self.read(index).keys)}

    @property
    def fingerprint(self) -> str:
        """A digest of the people and of how their targets were fitted."""
        return hashlib.sha256(json.dumps([self.manifest, list(self.places)]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def thetas(self, keys: Sequence[str]) -> Tensor:
        """Return the targets of some people, ``(len(keys), L, row)``; ``in`` tells whether there is one.

        Raises:
            ValueError: a shard holds values that are not finite.
        """
        rows = []
        for index, row in (self.places[key] for key in keys):
            with safe_open(self.path(index), framework="pt") as file:
                rows.append(file.get_slice("theta")[row])
            if not torch.isfinite(rows[-1]).all():
                raise ValueError(f"{self.name(index)} holds values that are not finite; {_REMEDY}")
        return torch.stack(rows)

    def skipped(self) -> list[Skipped]:
        """Everything that was left out, in the order of the data set."""
        return [entry for index in self.shards() for entry in self.read(index).skipped]

    @property
    def skipped_file(self) -> str:
        return f"{self.place}/{SKIPPED_FILE}"

    def list_skipped(self) -> None:
        """Write what was left out to ``skipped.jsonl``, a name and a reason on each line; safe in every process."""
        path, listed = self.folder / SKIPPED_FILE, None
        while listed != (listed := self.shards()):  # another process may have added one while this one wrote
            with _sent(path, self._mirror) as file:
                write_skipped(file, self.skipped())


def _read_manifest(folder: Path, place: str) -> dict:
    path = folder / _MANIFEST
    if not path.is_file():
        raise ValueError(f"{place} is not a target store: it has no {_MANIFEST}; name a folder that hdb preoptimize "
                         f"wrote")  # fmt: skip
    manifest = read_json_object(path, "choose another folder, or write it again as it was")
    version = manifest.get("format")
    if version not in (FORMAT_VERSION, _UNSEALED_FORMAT):
        shown = printable(repr(version))
        raise ValueError(f"{path} has format {shown}; this version of lidb-peft reads {FORMAT_VERSION}")
    record, batch = manifest.get("space"), manifest.get("batch")
    is_record = isinstance(record, dict) and all(isinstance(value, str) for value in record.values())
    if not is_record or missing_fields(record or {}) or not isinstance(manifest.get("fit"), dict):
        raise ValueError(f"{path} does not say what its targets belong to; it is damaged or of something else")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"{path} says batch is {printable(repr(batch))}; expected a number of people; it is damaged")
    return manifest
