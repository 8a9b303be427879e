"""Whether an output may be written: decided in one place for every command, before any work.

An output is never an input or inside one, and replaces an existing file only on request; its name is valid on every
file system and in Automatic1111.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from .safe_read import printable

# The suffix of an output that is a folder.
FOLDER = ""
OVERWRITE = "pass --overwrite (in Python overwrite=True)"
_READERS = {
    ".safetensors": "name the file so, or readers will not find it",
    ".png": "pictures are written as PNG",
}
_FILE_SUFFIXES = frozenset({".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".png", ".jpg", ".jpeg", ".webp", ".json"})
# What Windows refuses in a name; in a prompt ":" and ">" end the name of a LoRA.
NO_FILE_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')
_RESERVED = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³])", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/")  # as a path, which has lost a slash; C: is a drive
_LONGEST_NAME = 255  # where the file system does not say
_WRITABLE_BITS = 0o222

Paths = Iterable[str | os.PathLike | None]


def check_output(
    target: str | os.PathLike,
    inputs: Paths = (),
    suffix: str = ".safetensors",
    overwrite: bool = False,
    parents: bool = False,
) -> None:
    """Check now that ``target`` can be written after all the work, and that writing it destroys nothing.

    Args:
        inputs: files and folders that are read; None and hub ids are ignored.
        suffix: suffix of the file to write; ``FOLDER`` for a new folder.
        overwrite: an existing file may be replaced, unless it is an input or read-only.
        parents: the parent folders of ``target`` will be created.

    Raises:
        FileExistsError: ``target`` exists.
        FileNotFoundError: its folder does not.
        IsADirectoryError, NotADirectoryError: it, or its parent, is a folder instead of a file or vice versa.
        PermissionError: its folder cannot be written, or it is read-only.
        ValueError: its name is not valid or has another suffix; it is an input, lies inside one, or holds one.
    """
    target = Path(target)
    _check_is_local(target)
    _check_suffix(target, suffix)
    _check_place(target, parents)
    check_not_an_input(target, inputs)
    if not os.path.lexists(target):
        return
    if suffix == FOLDER:
        raise FileExistsError(f"{target} exists and is kept; name a new folder, or remove it first")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; name a file to write")
    if not overwrite:
        raise FileExistsError(f"{target} exists and is kept; choose another output, or {OVERWRITE}")
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{target} is not a regular file and is kept; choose another output")
    if target.exists() and not target.stat().st_mode & _WRITABLE_BITS:
        raise PermissionError(f"{target} is read-only and is kept; choose another output, or make it writable")


def check_output_folder(
    target: str | os.PathLike,
    inputs: Paths = (),
    files: Sequence[str] = (),
    is_resumed: bool = False,
    may_hold_inputs: bool = False,
) -> None:
    """Like `check_output`, for a folder that a run writes into, which may exist.

    Args:
        files: names or ``*`` patterns of the files that the run would write to it.
        is_resumed: existing files belong to an earlier run that is being resumed.
        may_hold_inputs: only single files are written, which are checked separately.

    Raises:
        FileExistsError: one of ``files`` exists and does not belong to an earlier run.
        ValueError, OSError: as `check_output`.
    """
    target = Path(target)
    _check_is_local(target)
    _check_suffix(target, FOLDER)
    if os.path.lexists(target) and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; name a folder to write")
    _check_place(target, parents=True)
    check_not_an_input(target, inputs, may_hold_inputs)
    found = [] if is_resumed or not target.is_dir() else [path for name in files for path in sorted(target.glob(name))]
    if found:
        raise FileExistsError(
            f"{found[0]} exists and was not made by an earlier run; choose another output folder, or move it"
        )


def check_distinct(targets: Sequence[tuple[str, str | os.PathLike]]) -> None:
    """Raise ValueError if two of a run's outputs, ``(description, path)``, are the same file."""
    seen: dict[str, str] = {}
    for what, target in targets:
        other = seen.setdefault(_folded(_places(Path(target))[0]), what)
        if other is not what:
            raise ValueError(f"{target} would be both {other} and {what}; choose another output")


def check_not_an_input(target: Path, inputs: Paths, may_hold: bool = False) -> None:
    """Raise ValueError if ``target`` is one of ``inputs``, lies inside one, or, unless it may, holds one.

    Hard and symbolic links are followed. Names that differ only in case count as the same, as on Windows and macOS.
    """
    places = _places(target)
    above = {_identity(folder) for place in places for folder in place.parents} - {None}
    own = {_identity(place) for place in places} - {None}
    for source in inputs:
        if not source:
            continue
        found = _places(Path(source))
        if own & {_identity(path) for path in found} or {*map(_folded, places)} & {*map(_folded, found)}:
            raise ValueError(f"{target} would be both what is read and what is written; choose another output")
        if above & {_identity(path) for path in found if path.is_dir()}:
            raise ValueError(f"{target} lies inside {source}, which is read; choose an output outside of it")
        if not may_hold and own & {_identity(folder) for path in found for folder in path.parents}:
            raise ValueError(f"{source}, which is read, lies inside {target}; choose another output")


def check_name(name: str) -> None:
    """Raise ValueError unless Windows, macOS, Linux and A1111's ``<lora:name:1>`` can hold a file or folder name."""
    shown, stem = printable(repr(name)), Path(name).stem if Path(name).suffix.lower() in _FILE_SUFFIXES else name
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name {shown} is not valid UTF-8 here; rename it, or set PYTHONUTF8=1") from error
    if NO_FILE_NAME.search(name):
        raise ValueError(f"the name {shown} holds one of < > : \" / \\ | ? * or a control character, which Windows and"
                         " A1111's prompts cannot; choose another")  # fmt: skip
    if stem != stem.rstrip(". "):
        raise ValueError(f"the name {shown} ends in a dot or a space, which Windows drops; choose another")
    if _RESERVED.fullmatch(name.partition(".")[0].rstrip(" ")):
        raise ValueError(f"the name {shown} means a device on Windows; choose another")


def _check_suffix(target: Path, suffix: str) -> None:
    found = target.suffix.lower()
    if suffix == FOLDER and found in _FILE_SUFFIXES and not target.is_dir():
        raise ValueError(f"{target} is named as a file and would be a folder; leave out {target.suffix}")
    if suffix != FOLDER and found != suffix:
        raise ValueError(f"{target} does not end in {suffix}; {_READERS[suffix]}")


def _check_is_local(target: Path) -> None:
    if _URL.match(str(target)):
        raise ValueError(f"{target} is a URL, and only hdb preoptimize writes to one; name a file or folder of this "
                         f"machine")  # fmt: skip


def _check_place(target: Path, parents: bool) -> None:
    """Check what is there of the folders above, and the names of what is not."""
    folder = target.parent
    missing = [] if os.path.lexists(target) else [target.name]
    while not folder.exists() and folder != folder.parent:
        missing.append(folder.name)
        folder = folder.parent
    if not parents and folder != target.parent:
        raise FileNotFoundError(f"{target.parent} does not exist; make the folder first")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; choose an output that is not inside of it")
    longest = _longest_name(folder)
    for name in missing:
        check_name(name)
        if (num_bytes := len(name.encode())) > longest:
            raise ValueError(f"the name {printable(name, 40)} has {num_bytes} bytes, and {longest} can be written here;"
                             " choose a shorter one")  # fmt: skip
    into = target if target.is_dir() else folder
    if not os.access(into, os.W_OK):
        raise PermissionError(f"{into} is not writable; choose another output folder")


def _longest_name(folder: Path) -> int:
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return _LONGEST_NAME


def _places(path: Path) -> tuple[Path, Path]:
    """Where a path is, and where it leads if it is a link."""
    leads_to = Path(os.path.realpath(path))
    return (leads_to if path.name in ("", "..") else Path(os.path.realpath(path.parent), path.name)), leads_to


def _folded(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path)).casefold()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino) if found.st_ino else None
