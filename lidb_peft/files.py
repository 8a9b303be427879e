"""Files and folders that are written completely or not at all: next to the target, flushed, renamed.

Files left half-written by a killed process are recognized by their lock, which the system has released, and are removed
by the next process that writes to the same folder; a folder that was about to be replaced gets its name back.
"""

import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from .safe_read import TensorInfo

try:
    import fcntl
except ImportError:  # Windows, which does not remove a file that somebody has open
    fcntl = None  # type: ignore[assignment]  # a module is never None to mypy

# dtype -> its name in a safetensors file, in the order in which the library sorts tensors: the last first.
_DTYPE_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_DTYPES = tuple(_DTYPE_NAMES)
_SUFFIX = ".hdb-tmp"
_ASIDE = ".hdb-old"  # of a folder that holds one that is being replaced
_TEMPORARY = re.compile(rf"\..*\.[a-z0-9_]{{8}}({re.escape(_SUFFIX)}|{re.escape(_ASIDE)})", re.DOTALL)
_MAX_PREFIX_CHARS = 30
_LOCK = ".hdb-lock"
_cleaned: set[str] = set()  # folders in which this process has looked for what others left


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
    with _temporary(target, _make_file) as temporary:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)


@contextmanager
def atomic_folder(target: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder; rename it to ``target`` when the block ends well.

    Args:
        overwrite: a folder ``target`` may be there, and is replaced as a whole: moved aside, and gone once the new one
            is in its place. A process that is killed between the two leaves it to `_remove_leftovers`.

    Raises:
        FileExistsError: ``target`` exists.
        OSError: as `check_writable`.
    """
    target = Path(target)
    _remove_leftovers(target.parent)  # which may give ``target`` its name back
    is_there = target.exists()
    if is_there and not (overwrite and target.is_dir()):
        raise FileExistsError(f"{target} exists; name a new folder, or remove it first")
    check_writable(target / "name" if is_there else target)
    with _temporary(target, _make_folder) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                _finish(file)
        temporary.chmod(0o777 & ~_umask())
        if is_there:
            with _temporary(target, _make_aside) as aside:
                os.rename(target, aside / target.name)
                os.rename(temporary, target)
        else:
            os.rename(temporary, target)


@contextmanager
def atomic_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder whose files are moved into ``folder`` when the block ends well, each of them whole.

    What else is in ``folder``, which is made where it is missing, stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _temporary(folder / "files", _make_folder) as temporary:
        yield temporary
        for file in sorted(temporary.iterdir()):
            _finish(file)
            os.replace(file, folder / file.name)


@contextmanager
def locked_folder(folder: str | os.PathLike, what: str) -> Iterator[None]:
    """Create ``folder`` and lock it during a block, so that no second run writes to it meanwhile.

    Args:
        what: what is running there, for messages, such as "a training".

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made or written.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder / _LOCK)
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"{what} is at work in {folder} already; wait for its end, or choose another folder"
        ) from error
    except NotImplementedError:
        warnings.warn(
            f"the file system of {folder} has no locks; see to it that nothing else writes there", stacklevel=3
        )
    try:
        _remove_leftovers(folder)
        yield
    finally:
        if fcntl is not None:  # while it is held: whoever has opened it meanwhile sees that it is gone, and tries anew
            (folder / _LOCK).unlink(missing_ok=True)
        lock.release()


def was_interrupted(folder: str | os.PathLike) -> bool:
    """Whether a run that held `locked_folder` was killed in it, or is still at work."""
    return (Path(folder) / _LOCK).exists()


@contextmanager
def _temporary(target: Path, make: Callable[[Path], Path]) -> Iterator[Path]:
    """Yield a new file or folder beside ``target``, locked; afterwards it is gone unless it was renamed."""
    _remove_leftovers(target.parent)
    try:
        temporary, lock = _make_locked(target, make)
    except PermissionError as error:
        raise PermissionError(f"{target.parent} is not writable; choose another output folder") from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error  # of a name that nobody has seen
    try:
        yield temporary
    except (OSError, SafetensorError) as error:
        told = _told_of(target, temporary, error)
        if told is error:
            raise
        raise told from error
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def _make_file(target: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=_prefix(target), suffix=_SUFFIX, dir=target.parent)
    os.close(handle)
    return Path(name)


def _make_folder(target: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=_SUFFIX, dir=target.parent))


def _make_aside(target: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=_ASIDE, dir=target.parent))


def _prefix(target: Path) -> str:
    return f".{target.name[:_MAX_PREFIX_CHARS]}."  # with what is added, the whole could be longer than a name may be


def _make_locked(target: Path, make: Callable[[Path], Path]) -> tuple[Path, int | None]:
    while True:
        temporary = make(target)
        try:
            lock = _lock(temporary)
        except FileNotFoundError:  # another process took it for a leftover before it was locked
            continue
        if temporary.exists():
            return temporary, lock
        if lock is not None:
            os.close(lock)


def _lock(path: Path) -> int | None:
    """Return a handle whose closing, or the end of this process, unlocks ``path``; None if it cannot be locked.

    Raises:
        BlockingIOError: it is locked.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a file system without locks
    return handle


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left half written in ``folder``, and undo what they had half replaced; looked
    for once."""
    place = os.path.realpath(folder)
    if place in _cleaned or not os.path.isdir(place):
        return
    _cleaned.add(place)
    for entry in os.scandir(place):
        if _TEMPORARY.fullmatch(entry.name):
            try:
                lock = _lock(Path(entry.path))
            except OSError:  # somebody is writing it
                continue
            if lock is not None:
                _remove(Path(entry.path))
                os.close(lock)


def _remove(temporary: Path) -> None:
    if temporary.name.endswith(_ASIDE):
        _put_back(temporary)
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def _put_back(aside: Path) -> None:
    """Give what was moved aside its name back, if the new folder has not come."""
    for folder in aside.iterdir():
        if not os.path.lexists(aside.parent / folder.name):
            os.rename(folder, aside.parent / folder.name)


def _finish(file: Path) -> None:
    """Flush a file, and let those read it who may read new files: safetensors' library writes for its owner only."""
    file.chmod(file.stat().st_mode | (0o666 & ~_umask()))
    _flush(file)


def _flush(file: Path) -> None:
    with open(file, "rb" if fcntl else "rb+") as opened:  # Windows flushes only what is open for writing
        os.fsync(opened.fileno())


def _told_of(target: Path, temporary: Path, error: Exception) -> Exception:
    """Say of ``target`` what an error says of the temporary path, of no file, or in another library's way."""
    if isinstance(error, OSError) and error.errno is not None:
        is_ours = error.filename is None or str(error.filename).startswith(str(temporary))
        return OSError(error.errno, os.strerror(error.errno), str(target)) if is_ours else error
    text = str(error)
    if isinstance(error, shutil.Error):  # a list of all files that could not be copied
        text = str(error.args[0][0][-1])
    number = re.search(r"(?:os error |\[Errno )(\d+)", text)
    if number is not None:
        return OSError(int(number[1]), os.strerror(int(number[1])), str(target))
    return error if isinstance(error, OSError) else OSError(f"{target} could not be written: {text}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written, so that a file need not be in memory whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def reshape(self, *shape: int) -> "LazyTensor":
        """Return it in another shape, of which one side may be -1."""
        resolved = torch.empty(self.shape, device="meta").reshape(shape).shape
        return LazyTensor(self.dtype, tuple(resolved), lambda: self.load().reshape(shape))


Tensors = Mapping[str, Tensor | LazyTensor]


class Hashes(Protocol):
    """Metadata that are computed of a file's bytes as they are written; always equally long."""

    def update(self, chunk: bytes | memoryview) -> None: ...

    def entries(self) -> dict[str, str]: ...


def tensor_infos(tensors: Tensors) -> dict[str, TensorInfo]:
    """Return where each tensor lies in a safetensors file, in the library's own order."""
    infos: dict[str, TensorInfo] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-_DTYPES.index(tensors[name].dtype), name.encode())):
        start, end = end, end + tensors[name].nbytes
        infos[name] = TensorInfo(_DTYPE_NAMES[tensors[name].dtype], tuple(tensors[name].shape), start, end)
    return infos


def safetensors_chunks(tensors: Tensors, metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file piece by piece: the header, then each tensor's bytes, in the library's own order."""
    infos = tensor_infos(tensors)
    yield header_bytes(infos, metadata)
    for name in infos:
        tensor = tensors[name]
        loaded = tensor.load() if isinstance(tensor, LazyTensor) else tensor
        assert (loaded.dtype, tuple(loaded.shape)) == (tensor.dtype, tuple(tensor.shape)), name
        yield loaded.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def header_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return what a safetensors file begins with, in front of its tensors; the metadata sorted.

    The library writes metadata in a random order, so that the same LoRA would give other bytes each time.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, info in tensors.items():
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (info.start, info.end)}
    # The library reads no half of a character, which JSON and so somebody's sidecar may hold.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", errors="replace")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: str | os.PathLike, tensors: Tensors, metadata: Mapping[str, str], hashes: Hashes | None = None
) -> None:
    """Write a safetensors file, whole or not at all, one tensor after the other.

    Args:
        hashes: of the tensors' bytes; what it says in the end goes to the metadata.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        if hashes is None:
            file.writelines(safetensors_chunks(tensors, metadata))
            return
        chunks = safetensors_chunks(tensors, {**metadata, **hashes.entries()})
        num_bytes = file.write(next(chunks))
        for chunk in chunks:
            hashes.update(chunk)
            file.write(chunk)
        header = header_bytes(tensor_infos(tensors), {**metadata, **hashes.entries()})
        assert len(header) == num_bytes, "hashes of another length"
        file.seek(0)
        file.write(header)
