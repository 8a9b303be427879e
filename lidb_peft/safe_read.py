"""Safetensors files from anywhere: checked before use, never unpickled.

The header is read and checked here, whole, before any tensor is touched: a truncated download, a header that lies
about offsets or a pickle under another name is one clear ``ValueError`` instead of another library's traceback.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .look_alikes import name_look_alike

# A LoRA's header is under 1 MB, one with a picture and thousands of tags a few. JSON takes twenty times its size in
# memory, and the 100 MB that the safetensors library allows take more than a minute to parse.
MAX_HEADER_BYTES = 16_000_000
_MAX_JSON_BYTES = 10_000_000
# Multiplying a shape of a million dimensions takes minutes; torch counts to 2^63.
_MAX_DIMS = 8
_MAX_COUNT = 2**63
_MAX_SHOWN_CHARS = 100
_MAX_NAME_CHARS = 240
_LOOKED_AT_BYTES = 4096
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# A zip archive (torch >= 1.6), then pickle protocols 2 to 5.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header declares it; ``start`` and ``end`` are byte offsets after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked safetensors header; ``data_offset`` is where the tensors' bytes begin in the file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_offset: int


def read_header(path: str | os.PathLike) -> Header:
    """Read and check the header of the safetensors file ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: ``path`` is a folder.
        ValueError: a pickle, or a file that is truncated, overlapping or otherwise not what its header says.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a .safetensors file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a .safetensors file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        is_readable = len(start) == 8 and length <= size - 8
        look_alike = "" if is_readable and length else name_look_alike(start + file.read(_LOOKED_AT_BYTES), size)
        # A header of 640 bytes starts like a pickle too, so the length decides before the first bytes do.
        is_pickle = not is_readable and start.startswith(_PICKLE_STARTS)
        if look_alike and not (is_pickle and path.suffix.lower() in PICKLE_SUFFIXES):
            raise ValueError(f"{path} {look_alike}")
        if path.suffix.lower() in PICKLE_SUFFIXES or is_pickle:
            raise ValueError(
                f"{path} is a pickled file, which can run code when it is opened and is not read;"
                " ask its author for a .safetensors file"
            )
        if len(start) < 8:
            raise ValueError(f"{path} has {size} bytes, too few for a safetensors file; download or write it again")
        if not is_readable:
            raise ValueError(
                f"{path} is not a safetensors file, or is truncated: it announces a header of {length} bytes"
                f" and has {size} bytes in all; download or write it again"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path} has a header of {length} bytes, more than the {MAX_HEADER_BYTES} that are read;"
                " a LoRA's is under 1 MB, so get the file from somewhere else"
            )
        raw = file.read(length)
    return _parse_header(path, raw, size - 8 - length)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors (on the CPU) and the metadata of a safetensors file, checked by :func:`read_header`."""
    header = read_header(path)
    return dict(iter_tensors(path)), header.metadata


def iter_tensors(path: str | os.PathLike, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, tensor)`` one at a time, so that a large file need not fit in memory; check its header first.

    Args:
        names: of those that are wanted, which are there; None for all.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys() if names is None else names:
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def read_json_object(path: Path, remedy: str) -> dict:
    """Read a JSON file that must hold an object; ``remedy`` ends the sentence of the ValueError otherwise."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, more than the {_MAX_JSON_BYTES} that are read; {remedy}"
        )
    return parse_json_object(path.read_bytes(), str(path), remedy)


def parse_json_object(text: str | bytes, source: str, remedy: str) -> dict:
    """Parse JSON that must be an object; the ValueError otherwise begins with ``source``, ``remedy`` ends it."""
    try:
        content = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source} is not a JSON object; {remedy}")
    return content


def check_indices(folder: Path, remedy: str) -> None:
    """Make sure that no index of shards in ``folder`` leads a library to anything but safetensors files beside it.

    Raises:
        ValueError: one does; a pickle would be opened, whatever the library was asked for.
    """
    for index in sorted(folder.glob("*.index*.json")):
        found = read_json_object(index, remedy).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise ValueError(f"{index} does not say which file holds which weight; {remedy}")
        for name in sorted(set(found.values())):
            if not name.endswith(".safetensors") or Path(name).name != name:
                raise ValueError(f"{index} leads to {_short(name)}, which is no safetensors file beside it and is not"
                                 f" read; {remedy}")  # fmt: skip


def _parse_header(path: Path, raw: bytes, data_bytes: int) -> Header:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
        if b"\\u" in raw:  # half of a character, which the safetensors library takes for no JSON
            json.dumps(entries, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        # gzip's first bytes, for one, are a length that a large file can have.
        look_alike = name_look_alike((len(raw)).to_bytes(8, "little") + raw, 8 + len(raw) + data_bytes)
        problem = f"is not a safetensors file: its header is not valid JSON ({printable(str(error))})"
        raise ValueError(f"{path} {look_alike or problem}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} has metadata that is not text to text; write it again with safetensors")
    tensors = {name: _parse_tensor(path, name, entry) for name, entry in entries.items()}
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise ValueError(f"{path} is corrupt: tensor {_short(name)} {what}; download or write it again")
        end = info.end
    if end != data_bytes:
        what = "is truncated" if end > data_bytes else "has bytes that belong to no tensor"
        raise ValueError(
            f"{path} {what}: its tensors take {end} bytes and {data_bytes} are there; download or write it again"
        )
    return Header(tensors, metadata, data_offset=8 + len(raw))


def _parse_tensor(path: Path, name: str, entry: object) -> TensorInfo:
    """Check one tensor's entry; every number must be a plain count that agrees with the others."""
    shown = _short(name)
    if not isinstance(entry, dict):
        raise ValueError(f"{path} is corrupt: the entry of tensor {shown} is not a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ValueError(f"{path}: tensor {shown} has the dtype {_short(dtype)}, which is not known here")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{path} is corrupt: tensor {shown} has shape {_short(shape)} and offsets {_short(offsets)}")
    start, end = offsets
    expected = math.prod(shape) * _DTYPE_BYTES[dtype]
    if end - start != expected:
        claim = f"{dtype} {_short(shape)} needs {_short(expected)} bytes and claims {_short(end - start)}"
        raise ValueError(f"{path} is corrupt: tensor {shown} of {claim}")
    return TensorInfo(dtype, tuple(shape), start, end)


def _are_counts(values: object) -> TypeGuard[list[int]]:
    if not isinstance(values, list) or len(values) > _MAX_DIMS:
        return False
    return all(type(value) is int and 0 <= value < _MAX_COUNT for value in values)


def printable(text: str, max_chars: int = _MAX_SHOWN_CHARS) -> str:
    """Anybody's text for a message or a terminal: no control characters, no lone surrogates, and no novel."""
    text = text[: max_chars + 1]
    if not text.isprintable():  # most is, and there are thousands of names in a header
        text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return text if len(text) <= max_chars else text[:max_chars] + "..."


def count(items: Sequence[str], noun: str) -> str:
    """Return how many there are: "1 layer", "3 layers"."""
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def examples(names: Sequence[str]) -> str:
    """Return the first of anybody's names for a message, and how many more there are."""
    shown = ", ".join(printable(name, _MAX_NAME_CHARS) for name in names[:2])
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown


def _short(value: object) -> str:
    return printable(repr(value))


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name is used twice")
    return entries
