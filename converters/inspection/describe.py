"""``hdb inspect``: what a LoRA or theta file contains, whoever made it, and what is wrong with it."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from converters.formats.family import find_base, shown_base, stated_base
from converters.formats.foreign import name_foreign
from converters.formats.layout import Layout
from converters.formats.lora_config import METADATA_KEY
from converters.formats.reading import Source, find_sources
from converters.inspection.checks import find_warnings
from converters.inspection.facts import (
    BlockStatistics,
    Configs,
    LayerStatistics,
    ModuleFacts,
    block_statistics,
    gather_facts,
    layer_statistics,
)
from converters.inspection.refusals import find_refusals
from converters.layer import is_finite
from converters.metadata import legacy_hash
from converters.sidecar import read_sidecar
from lidb_peft.record import from_metadata
from lidb_peft.safe_read import Header, iter_tensors

# Metadata that one program alone writes.
_PROGRAMS = {"ss_sd_scripts_commit_hash": "kohya sd-scripts", "ot_revision": "OneTrainer", METADATA_KEY: "diffusers"}
# What kohya's hashes are of.
_HASHED = {"sshs_model_hash": "its tensors", "sshs_legacy_hash": "its tensors and ss_ keys"}
_NUM_TAGS = 5


@dataclass(frozen=True)
class FileDescription:
    """What :func:`describe` found.

    Args:
        path: the file that was read (inside a folder, if one was given).
        made_by: the program that wrote it, if the file says.
        kind: e.g. ``kohya LoRA``, ``diffusers LoRA``, ``PEFT LoRA``, ``kohya LoHa``, ``LiDB theta``.
        base: ``SD1``, ``SD2``, ``SDXL``, another model's own name, or None.
        base_model_name: the checkpoint it was made on, if it says so.
        ranks, alphas: every value that occurs, ascending; readers take a missing alpha as the rank.
        layers: component -> number of adapted layers.
        statistics: what each layer does, one by one.
        blocks: block of the denoiser, ``unet IN04``, or text encoder -> what its layers do together.
        dtypes: dtypes of its tensors, e.g. ``float16``.
        num_parameters, size_bytes: numbers stored, bytes on disk.
        title, trigger_words: its title, and the words to write in a prompt.
        hashes: ``sha256`` of the file, ``sshs_model_hash`` of its tensors, ``sshs_legacy_hash`` of a piece of them,
            ``a1111`` the short hash that A1111 shows.
        warnings: one sentence for each thing that a reader would stumble over.
        metadata: the file's own, as it is.
        notes: one sentence for each format that it cannot be converted to, and why.
    """

    path: str
    made_by: str
    kind: str
    base: str | None
    base_model_name: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    layers: dict[str, int]
    statistics: tuple[LayerStatistics, ...] = field(repr=False)
    blocks: dict[str, BlockStatistics]
    dtypes: tuple[str, ...]
    num_parameters: int
    size_bytes: int
    title: str
    trigger_words: tuple[str, ...]
    hashes: dict[str, str]
    warnings: tuple[str, ...]
    metadata: dict[str, str] = field(repr=False)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Everything as plain JSON values; a number that is not finite becomes text."""
        return _plain(asdict(self))


def describe(path: str | os.PathLike) -> FileDescription:
    """Describe a LoRA or theta file, or a folder that PEFT or diffusers saved one in, of one model or several.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a pickle, a damaged file, a whole checkpoint, or anything else that is no adapter.
    """
    sources = find_sources(Path(path))
    first = sources[0]
    if set(first.header.tensors) == {"theta"} and from_metadata(first.header.metadata):
        return _describe_theta(first.file, first.header)
    for source in sources:
        if not source.layout.modules:
            what = name_foreign(source.header.tensors, source.header.metadata)
            raise ValueError(f"{source.file} is {what}; name a LoRA or theta file")
    metadata, configs, modules = _contents(sources)
    layout = _joined([source.layout for source in sources])
    base = _base(sources, modules, metadata)
    files = [file for source in sources for file in source.files]
    is_one = len(files) == 1
    hashes = _hashes(first.file, first.header) if is_one else _hashes_of(files, Path(path))
    sidecar = (read_sidecar(first.file) or {}) if is_one else {}
    shown = first.file if is_one else Path(path)
    refusals, notes = find_refusals(shown, sources) if layout.algorithm != "LiDB" else ((), ())
    warnings = [
        *find_warnings(layout, modules, metadata, base, str(sidecar.get("sd version") or "")),
        *(_hash_warnings(hashes, metadata) if is_one else ()),
        *refusals,
    ]
    peft_type = next((str(config["peft_type"]) for config in configs.values() if "peft_type" in config), "")
    algorithm = layout.algorithm or peft_type
    statistics = layer_statistics(modules, base)
    return FileDescription(
        path=str(shown),
        made_by=_made_by(metadata),
        kind=f"{layout.style} {algorithm}",
        base=shown_base(base) or None,
        base_model_name=_base_model_name(metadata, configs),
        ranks=tuple(sorted({module.rank for module in modules if module.rank})),
        alphas=tuple(sorted({module.alpha for module in modules if module.alpha is not None})),
        layers=dict(Counter(module.component for module in modules)),
        statistics=statistics,
        blocks=block_statistics(statistics),
        dtypes=tuple(sorted({dtype for source in sources for dtype in _dtypes(source.header)})),
        num_parameters=sum(_num_parameters(source.header) for source in sources),
        size_bytes=sum(file.stat().st_size for file in files),
        title=metadata.get("modelspec.title") or metadata.get("ss_output_name", ""),
        trigger_words=_trigger_words(metadata, sidecar),
        hashes=hashes,
        warnings=tuple(warnings),
        metadata=metadata,
        notes=tuple(notes),
    )


def _contents(
    sources: Sequence[Source],
) -> tuple[dict[str, str], dict[str, Mapping[str, object]], list[ModuleFacts]]:
    """The metadata, PEFT's configs by component, and the modules of all of an adapter's files."""
    metadata: dict[str, str] = {}
    configs: dict[str, Mapping[str, object]] = {}
    modules: list[ModuleFacts] = []
    for source in sources:
        metadata |= source.header.metadata
        own = source.configs(source.header.metadata)
        configs |= {f"{source.component}{component}": config for component, config in own.items()}
        modules += gather_facts(source, source.tensors(), own)
    return metadata, configs, modules


def _base(sources: Sequence[Source], modules: Sequence[ModuleFacts], metadata: Mapping[str, str]) -> str:
    """The family of an adapter's base model, or another model's own name; "" if nothing tells."""
    if any(module.layer for module in modules):
        return find_base(((module.name, module.layer, module.in_features) for module in modules), metadata)
    names = [name for source in sources for name in source.header.tensors]
    return stated_base(metadata) or name_foreign(names, metadata).removeprefix("a LoRA of ")


def _joined(layouts: Sequence[Layout]) -> Layout:
    """The layouts of an adapter's files as that of one, but for the modules, whose names several may have."""
    first = layouts[0]
    algorithms = [layout.algorithm for layout in layouts]
    unknown = [name for layout in layouts for name in layout.unknown]
    other = next((algorithm for algorithm in algorithms if algorithm != "LoRA"), algorithms[0])
    return replace(first, algorithm=other, unknown=unknown)


def _hashes_of(files: Sequence[Path], folder: Path) -> dict[str, str]:
    """sha256 of each of an adapter's files."""
    found = {}
    for file in files:
        with open(file, "rb") as stream:
            name = file.relative_to(folder) if file.is_relative_to(folder) else file.name
            found[f"sha256 {name}"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _describe_theta(file: Path, header: Header) -> FileDescription:
    """A native theta file: one row per layer, and what it was made with in the metadata."""
    metadata, info = header.metadata, header.tensors["theta"]
    theta = dict(iter_tensors(file))["theta"]
    warnings = []
    if len(info.shape) != 2:
        warnings.append(f"theta has shape {info.shape}; it must be (layers, numbers per layer)")
    record = from_metadata(metadata)
    stated = record.get("num_layers")
    if stated is not None and info.shape and stated != str(info.shape[0]):
        warnings.append(f"its metadata says {stated} layers and theta has {info.shape[0]} rows")
    if not is_finite(theta):
        warnings.append("theta holds NaN or infinity, which makes black pictures")
    rank = record.get("r", "")
    return FileDescription(
        path=str(file),
        made_by="lidb-peft",
        kind="LiDB theta",
        base=shown_base(stated_base(metadata)) or None,
        base_model_name=record.get("base_model_name", ""),
        ranks=(int(rank),) if rank.isdecimal() and len(rank) < 6 else (),
        alphas=(),
        layers={"all": info.shape[0]} if info.shape else {},
        statistics=(),
        blocks={},
        dtypes=_dtypes(header),
        num_parameters=_num_parameters(header),
        size_bytes=file.stat().st_size,
        title=metadata.get("modelspec.title", ""),
        trigger_words=_trigger_words(metadata, {}),
        hashes=_hashes(file, header),
        warnings=tuple(warnings),
        metadata=metadata,
    )


def _hashes(file: Path, header: Header) -> dict[str, str]:
    """sha256 of the file and of its tensors alone, in one pass, and kohya's older hash."""
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    with open(file, "rb") as stream:
        whole.update(stream.read(header.data_offset))
        while block := stream.read(1 << 20):
            whole.update(block)
            tensors.update(block)
    model_hash = tensors.hexdigest()
    shown = header.metadata.get("sshs_model_hash") or model_hash
    hashes = {"sha256": whole.hexdigest(), "sshs_model_hash": model_hash, "a1111": shown[:12]}
    legacy = legacy_hash(file, header)
    return hashes | ({"sshs_legacy_hash": legacy} if legacy else {})


def _hash_warnings(hashes: dict[str, str], metadata: dict[str, str]) -> list[str]:
    return [
        f"{name} in its metadata is not the hash of {what}: they were changed after it was written"
        for name, what in _HASHED.items()
        if metadata.get(name) and name in hashes and metadata[name] != hashes[name]
    ]


def _trigger_words(metadata: dict[str, str], sidecar: dict[str, object]) -> tuple[str, ...]:
    """The sidecar's activation text, ModelSpec's trigger phrase, else the most frequent training tags."""
    words = [str(sidecar.get("activation text") or ""), metadata.get("modelspec.trigger_phrase", "")]
    if not any(words):
        try:
            folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        except (ValueError, RecursionError):
            folders = {}
        counts: Counter[str] = Counter()
        for tags in folders.values() if isinstance(folders, dict) else ():
            for tag, count in tags.items() if isinstance(tags, dict) else ():
                if isinstance(count, int):
                    counts[tag.strip()] += count
        words = [tag for tag, _ in counts.most_common(_NUM_TAGS)]
    return tuple(dict.fromkeys(word for word in words if word))


def _base_model_name(metadata: dict[str, str], configs: Configs) -> str:
    named = (str(config.get("base_model_name_or_path") or "") for config in configs.values())
    return metadata.get("ss_sd_model_name", "") or next((name for name in named if name), "")


def _made_by(metadata: dict[str, str]) -> str:
    program = next((program for key, program in _PROGRAMS.items() if key in metadata), "")
    return "LyCORIS" if metadata.get("ss_network_module", "").startswith("lycoris") else program


def _dtypes(header: Header) -> tuple[str, ...]:
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    return tuple(sorted({names.get(info.dtype, info.dtype.lower()) for info in header.tensors.values()}))


def _num_parameters(header: Header) -> int:
    return sum(math.prod(info.shape) for info in header.tensors.values())
