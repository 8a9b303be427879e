"""Files and folders that appear whole or not at all: written beside the target, flushed, renamed."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .safe_read import TensorInfo

# dtype -> its name in a safetensors file, in the order in which the library sorts tensors: the last first.
_DTYPE_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_DTYPES = tuple(_DTYPE_NAMES)


def check_writable(target: str | os.PathLike) -> None:
    """Raise now what writing ``target`` would raise later, before hours of work.

    Raises:
        FileNotFoundError: the folder of ``target`` does not exist.
        IsADirectoryError: ``target`` is a folder.
        PermissionError: the folder cannot be written.
    """
    target = Path(target)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; name a file to write")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} does not exist; make the folder first")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{target.parent} is not writable; choose another output folder")


def check_suffix(target: str | os.PathLike) -> None:
    """Raise ValueError unless the name of a file to write ends in ``.safetensors``."""
    if Path(target).suffix.lower() != ".safetensors":
        raise ValueError(f"{target} does not end in .safetensors; name the file so, or readers will not find it")


@contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; rename it onto ``target`` when the block ends well.

    On any exception, Ctrl-C included, the temporary file is removed and ``target`` is left as it was.

    Raises:
        OSError: as `check_writable`, or the disk is full.
    """
    target = Path(target)
    check_writable(target)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    except PermissionError as error:
        raise PermissionError(f"{target.parent} is not writable; choose another output folder") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None or str(error.filename) not in ("None", name):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error  # a full disk names no file
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder; rename it to ``target``, which is not there yet, when the block ends well.

    Raises:
        FileExistsError: ``target`` exists.
        OSError: as `check_writable`.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"{target} exists; name a new folder, or remove it first")
    check_writable(target)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        yield folder
        folder.rename(target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def safetensors_chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file piece by piece: the header, then each tensor's bytes, in the library's own order."""
    names = sorted(tensors, key=lambda name: (-_DTYPES.index(tensors[name].dtype), name.encode()))
    infos = {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        infos[name] = TensorInfo(_DTYPE_NAMES[tensors[name].dtype], tuple(tensors[name].shape), start, end)
    yield header_bytes(infos, metadata)
    for name in names:
        yield memoryview(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def header_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return what a safetensors file begins with, in front of its tensors; the metadata sorted.

    The library writes metadata in a random order, so that the same LoRA would give other bytes each time.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, info in tensors.items():
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (info.start, info.end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.writelines(safetensors_chunks(tensors, metadata))
