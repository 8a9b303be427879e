"""Reading LoRAs from any program: kohya's, diffusers' and PEFT's differ in names, and in where they store alpha."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from converters.formats.diffusers import DIFFUSERS_WEIGHTS
from converters.formats.family import OTHER_MODELS, find_base, mixed_bases
from converters.formats.foreign import name_foreign
from converters.formats.layout import AdapterModule, Layout, read_layout
from converters.formats.lora_config import METADATA_KEY, check_config, layer_alpha, metadata_configs
from converters.formats.module import read_module
from converters.formats.peft import PEFT_CONFIG, PEFT_WEIGHTS
from converters.full_update import FullUpdate
from converters.key_maps import Place, read_kohya_name, read_path_name
from converters.layer import LoraLayer, NotFiniteError
from converters.lora import Lora
from converters.shapes import has_layer, kernel_side
from converters.stacking import unstack
from lidb_peft.families import COMPONENTS, FAMILIES, TITLES
from lidb_peft.safe_read import (
    PICKLE_SUFFIXES,
    Header,
    count,
    examples,
    iter_tensors,
    printable,
    read_header,
    read_json_object,
)

# A LoRA of another model family has thousands of keys, all of them unknown.
_MAX_KEYS_SHOWN = 3
_READ_ALGORITHMS = ("", "LoRA", "DoRA", "LoHa", "LoKr", "full difference")
# Roles that a file may have and that are not read: a text encoder's new words.
_UNREAD = frozenset({"token lora_A", "token lora_B"})
_SCALAR = torch.zeros(())
# File names of shards and of their index, by the hub's libraries.
_PIECE = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_INDEX = ".safetensors.index.json"
_MAX_PIECES = 1000
# Metadata that a format sets or computes itself.
_OWN_METADATA = frozenset({"format", METADATA_KEY, "sshs_model_hash", "sshs_legacy_hash"})


@dataclass(frozen=True)
class Source:
    """One file of tensors, PEFT's config next to it if there is one, and the component that its folder is named after.

    ``pieces`` are its further shards, whose tensors are read as if they were in the same file.
    """

    file: Path
    config: Mapping[str, object] | None = None
    component: str = ""
    pieces: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file, *self.pieces)

    @cached_property
    def header(self) -> Header:
        """The file's header, read once; with the tensors and metadata of all shards."""
        first, *others = (read_header(file) for file in self.files)
        for file, other in zip(self.pieces, others, strict=True):
            twice = sorted(first.tensors.keys() & other.tensors.keys())
            if twice:
                raise ValueError(f"{file} holds {examples(twice)}, which another piece of it holds too; remove one")
            first = Header(first.tensors | other.tensors, first.metadata | other.metadata, first.data_offset)
        return first

    @cached_property
    def layout(self) -> Layout:
        """Which tensor belongs to which layer."""
        return read_layout(list(self.header.tensors))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, memory-mapped."""
        _ = self.header  # checked before the library looks at it
        return {name: tensor for file in self.files for name, tensor in iter_tensors(file)}

    def configs(self, metadata: Mapping[str, str]) -> Mapping[str, Mapping[str, object]]:
        """Return component -> ``LoraConfig`` fields, "" for any; from the file's ``metadata`` if none is beside it.

        Raises:
            ValueError: the metadata is not what diffusers writes.
        """
        return {"": self.config} if self.config else metadata_configs(metadata, str(self.file))


@dataclass
class _Found:
    """What reading an adapter has found so far; ``dropped`` and ``changed`` map reasons to layers."""

    layers: dict[str, LoraLayer] = field(default_factory=dict)
    full_updates: dict[str, FullUpdate] = field(default_factory=dict)
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    widths: list[tuple[str, str, int]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)

    def change(self, what: str, name: str) -> None:
        self.changed.setdefault(what, []).append(name)

    def notes(self) -> tuple[str, ...]:
        return tuple(what.format(count(names, "layer"), examples(names)) for what, names in self.changed.items())


def read_lora(
    path: str | os.PathLike, full_updates: bool = False, drop_nan: bool = False, alpha: float | None = None
) -> Lora:
    """Read a LoRA from any program: files of kohya, diffusers (old and new names) or ComfyUI, or a folder of PEFT.

    A PEFT adapter of several models is a folder of such folders, named ``unet``, ``text_encoder``, ``text_encoder_2``.
    Tucker cores are multiplied into ``lora_A``, and layers of rank 0 are left out; the LoRA's notes report both.

    Args:
        full_updates: read LoHa, LoKr and whole differences too, which are not LoRAs.
        drop_nan: leave out layers that contain NaN or infinity.
        alpha: alpha of a PEFT adapter whose config is missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or one with content that a `Lora` cannot hold, which the message names.
    """
    return read_sources(path, find_sources(Path(path)), full_updates, drop_nan, alpha)


def read_sources(
    path: str | os.PathLike,
    sources: Iterable[Source],
    full_updates: bool = False,
    drop_nan: bool = False,
    alpha: float | None = None,
) -> Lora:
    """Make a LoRA of the sources of the adapter at ``path``; see `read_lora`."""
    found = _Found()
    for source in sources:
        _read_source(source, found, drop_nan, alpha)
    if found.full_updates and not full_updates:
        algorithms = " and ".join(sorted({update.algorithm for update in found.full_updates.values()}))
        raise ValueError(
            f"{path} is {algorithms}, not LoRA, in {count(list(found.full_updates), 'layer')}; hdb convert --rank makes"
            " the nearest LoRA of it, hdb merge --into adds it to a model exactly"
        )
    if not found.layers and not found.full_updates:
        raise ValueError(f"{path} holds no LoRA layers" + "".join(f"; {note}" for note in found.notes()))
    mixed = mixed_bases(found.widths)
    if mixed:
        raise ValueError(f"{path} holds {mixed}; take the file of one of them")
    base = find_base(found.widths, found.metadata)
    if base in OTHER_MODELS:
        raise ValueError(f"{path} is a LoRA of {base}, which is none of {TITLES}")
    return Lora(
        found.layers,
        base if base in FAMILIES else "",
        found.metadata,
        found.full_updates,
        found.embeddings,
        found.notes(),
    )


def _read_source(source: Source, found: _Found, drop_nan: bool, alpha: float | None) -> None:
    layout, entries, tensors = source.layout, source.header.metadata, source.tensors()
    if not layout.modules and tensors:
        raise ValueError(f"{source.file} is {name_foreign(tensors, entries)}; name a LoRA")
    modules = _read_modules(source, layout, entries, alpha)
    configs = source.configs(entries)
    for component, config in configs.items():
        check_config(config, f"{source.file} {component}".rstrip())
    for place, module in modules:
        for name in place.layers:
            if name in found.names:
                raise ValueError(
                    f"{source.file} holds layer {name} twice, as {printable(found.names[name])} and as "
                    f"{printable(module.name)}; remove one"
                )
            found.names[name] = module.name
        _read_layer(source.file, place, module, tensors, configs, found, drop_nan, alpha)
    found.embeddings |= {name: tensors[name] for name in layout.embeddings}
    found.metadata |= {key: value for key, value in entries.items() if key not in _OWN_METADATA}
    if source.config and source.config.get("base_model_name_or_path"):
        found.metadata.setdefault("ss_sd_model_name", str(source.config["base_model_name_or_path"]))


def find_sources(path: Path) -> list[Source]:
    """Return the files of the adapter at ``path``.

    Raises:
        ValueError: a folder without any.
    """
    if path.name.endswith(_INDEX) and path.is_file():
        path = path.parent
    if not path.is_dir():
        piece = _PIECE.fullmatch(path.name)
        if piece and int(piece["count"]) > 1 and path.is_file():
            number, total = int(piece["number"]), int(piece["count"])
            raise ValueError(f"{path} is piece {number} of {total} of a LoRA; name the folder that holds all of them")
        config = path.with_name(PEFT_CONFIG)
        return [_peft_source(path.parent)] if path.name == PEFT_WEIGHTS and config.is_file() else [Source(path)]
    folders = [folder for folder in (path, *(path / name for name in COMPONENTS)) if (folder / PEFT_CONFIG).is_file()]
    if folders:
        return [_peft_source(folder) for folder in folders]
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return [Source(path / DIFFUSERS_WEIGHTS)]
    pieces = _pieces(path)
    if pieces:
        return [Source(pieces[0], pieces=tuple(pieces[1:]))]
    pickled = [entry.name for entry in sorted(path.iterdir()) if entry.suffix in PICKLE_SUFFIXES]
    hint = f"; {pickled[0]} is pickled and not read" if pickled else ""
    raise ValueError(f"{path} is a folder without {PEFT_CONFIG} or {DIFFUSERS_WEIGHTS}{hint}; name a LoRA file")


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder is one adapter, as PEFT or diffusers saves it, in pieces too."""
    configs = (path / PEFT_CONFIG, *(path / name / PEFT_CONFIG for name in COMPONENTS))
    return any(file.is_file() for file in (*configs, path / DIFFUSERS_WEIGHTS)) or bool(_pieces(path, check=False))


def _pieces(folder: Path, check: bool = True) -> list[Path]:
    """Return the shards of a LoRA in order, if a folder holds those and no other files.

    Raises:
        ValueError: with ``check``, some are missing.
    """
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    found = [match for file in files if (match := _PIECE.fullmatch(file.name))]
    if not files or len(found) < len(files) or len({(piece["stem"], piece["count"]) for piece in found}) > 1:
        return []
    numbers, total = {int(piece["number"]) for piece in found}, int(found[0]["count"])
    missing = [number for number in range(1, total + 1) if number not in numbers] if total < _MAX_PIECES else [total]
    if missing and check:
        raise ValueError(f"{folder} lacks piece {missing[0]} of the {total} of {found[0]['stem']}; download it too")
    return files


def _peft_source(folder: Path) -> Source:
    config = read_json_object(folder / PEFT_CONFIG, "save the adapter again")
    # Pickled files are named when they are refused.
    names = [name for name in (PEFT_WEIGHTS, "adapter_model.bin") if (folder / name).is_file()] or [PEFT_WEIGHTS]
    return Source(folder / names[0], config, folder.name if folder.name in COMPONENTS else "")


def _read_modules(
    source: Source, layout: Layout, metadata: Mapping[str, str], alpha: float | None
) -> list[tuple[Place, AdapterModule]]:
    """Return the readable modules, each with our layers; anything else is refused by name."""
    file = source.file
    if layout.style == "PEFT" and source.config is None and alpha is None:
        without = [module.name for module in layout.modules.values() if "alpha" not in module.parts]
        if without:
            raise ValueError(f"{file} has PEFT's names but no {PEFT_CONFIG} beside it, which says its alpha; add it, or"
                             " say it: hdb convert --alpha")  # fmt: skip
    if len(layout.adapters) > 1:
        raise ValueError(f"{file} holds several adapters, {examples(layout.adapters)}; save one of them alone")
    if layout.algorithm not in _READ_ALGORITHMS:
        raise ValueError(f"{file} is {layout.algorithm}, which needs the base model's weights; it cannot be converted")
    known, unknown = [], list(layout.unknown)
    for module in layout.modules.values():
        is_whole = all(len(found) == 1 for found in module.parts.values()) and not _UNREAD & module.parts.keys()
        place = known_place(source, module) if is_whole else None
        if place is not None:
            known.append((place, module))
        else:
            unknown += [name for found in module.parts.values() for name in found]
    if unknown:
        shown = ", ".join(printable(name) for name in sorted(unknown)[:_MAX_KEYS_SHOWN])
        more = f" and {len(unknown) - _MAX_KEYS_SHOWN} more" if len(unknown) > _MAX_KEYS_SHOWN else ""
        what = name_foreign(unknown, metadata)
        holds = f"holds {len(unknown)} keys that are no LoRA of {TITLES}: {shown}{more}"
        raise ValueError(f"{file} is {what}: it {holds}" if what.startswith("a LoRA of") else f"{file} {holds}")
    return known


def known_place(source: Source, module: AdapterModule) -> Place | None:
    """Return which layers of ours a module of a file is; None if no family has them."""
    try:
        place = place_of(source, module)
    except ValueError:
        return None
    return place if any(has_layer(place.layers[0], family) for family in FAMILIES) else None


def place_of(source: Source, module: AdapterModule) -> Place:
    """Return which layers of ours a module of a file is.

    Raises:
        ValueError: it belongs to no known family.
    """
    if "." in module.name:
        return read_path_name(module.name, source.component)
    return read_kohya_name(module.name)


def _read_layer(
    file: Path, place: Place, module: AdapterModule, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping],
    found: _Found, drop_nan: bool, alpha: float | None,
) -> None:  # fmt: skip
    where = f"{file}: {printable(module.name)}"
    parts = {role: tensors[names[0]] for role, names in module.parts.items()}
    name = place.layers[0]
    component, _, path = name.partition(".")
    config = configs.get(component, configs.get(""))
    if config and "alpha" not in parts and parts.get("lora_A", _SCALAR).dim():
        alpha = layer_alpha(config, path, len(parts["lora_A"]), str(file))
    elif not module.name.startswith("base_model."):
        alpha = None
        if "base_model." in module.name and "alpha" not in parts:
            found.change("no alpha is with {}, named as PEFT names them; their scale is taken for 1: {}", name)
    try:
        read = read_module(parts, any(part.endswith(".dora_scale") for part in module.parts.get("dora", ())), alpha)
        layers = [read.layer] if len(place.layers) == 1 or read.layer is None else unstack(read.layer, place.widths)
    except NotFiniteError as error:
        if not drop_nan:
            raise ValueError(f"{where} has {error}; hdb convert --drop-nan leaves such layers out") from error
        found.change("{} with NaN or infinity left out: {}", name)
        found.widths.append((module.name, name, _width(parts)))  # which identifies the family nevertheless
        return
    except ValueError as error:
        raise ValueError(f"{where} has {error}") from error
    if read.full_updates and len(place.layers) > 1:
        raise ValueError(
            f"{where} is {', '.join(update.algorithm for update in read.full_updates.values())} of what is"
            f" {len(place.layers)} layers in diffusers; only LoRA can be divided"
        )
    found.full_updates |= {name + end: update for end, update in read.full_updates.items()}
    if "" in read.full_updates and len(read.full_updates[""].shape) > 1:
        found.widths.append((module.name, name, read.full_updates[""].shape[1]))
    if read.layer is not None:
        if read.layer.is_convolution and kernel_side(name) == 0:
            raise ValueError(f"{where} has a kernel of {tuple(read.layer.lora_A.shape[2:])}, but is a linear layer")
        found.layers |= {name: layer for name, layer in zip(place.layers, layers, strict=True) if layer is not None}
        found.widths.append((module.name, name, read.layer.lora_A.shape[1]))
    elif not read.full_updates:
        found.change("{} of rank 0, which change nothing, left out: {}", name)
        found.widths.append((module.name, name, _width(parts)))
    if read.is_tucker:
        found.change("the Tucker cores (lora_mid) of {} are multiplied into lora_down, in float32: {}", name)
    if read.was_float8:
        found.change("{} of float8 read as float16, which holds the same numbers: {}", name)


def _width(parts: Mapping[str, Tensor]) -> int:
    """The input width of a module, 0 if only its product determines it."""
    shape = parts.get("lora_A", _SCALAR).shape
    return shape[1] if len(shape) > 1 else 0
