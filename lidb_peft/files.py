"""Files that appear whole or not at all: written beside the target, flushed, renamed."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import Tensor


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Serialise as safetensors with sorted metadata.

    The library writes metadata in a random order, so that the same LoRA would give other bytes on each run.
    """
    blob = safetensors.torch.save(tensors, metadata)
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[8 + length :]
