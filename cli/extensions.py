"""Putting a folder of this package into another program, where it looks for extensions, and taking it out again."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

NAME = "lidb-peft"
_MARK = "installed-by-hdb.txt"  # in a copy: that it is ours to remove


def find_place(program: Path, below: str, name: str) -> Path:
    """Where our folder goes in a program's.

    Raises:
        ValueError: it is not that program's folder.
    """
    folder = program.expanduser() / below
    if not folder.is_dir():
        raise ValueError(f"{program} is no folder of {name}: it has no {below}; name the folder that has it")
    return folder / NAME


def link(pack: Path, place: Path) -> None:
    """Raises OSError where something is there, or links cannot be made."""
    _check_free(place)
    try:
        place.symlink_to(pack, target_is_directory=True)
    except OSError as error:  # Windows allows links to developers only
        raise OSError(f"{place} cannot be a link ({error.strerror}); pass --copy") from error


def copy(pack: Path, place: Path, files: Mapping[str, str], without: tuple[str, ...] = ()) -> None:
    """Copy a folder, with ``files``, name -> text, written beside it; whole or not at all.

    Raises:
        OSError: something is there, or cannot be written.
    """
    from lidb_peft.files import atomic_folder

    _check_free(place)
    with atomic_folder(place) as whole:
        shutil.copytree(pack, whole, ignore=shutil.ignore_patterns("__pycache__", *without), dirs_exist_ok=True)
        for name, text in {**files, _MARK: "hdb wrote this folder, and removes it\n"}.items():
            (whole / name).write_text(text, encoding="utf-8")


def remove(place: Path) -> None:
    """Take out what `link` or `copy` made, and nothing else.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is something else.
    """
    if place.is_symlink():
        place.unlink()
    elif (place / _MARK).is_file():
        shutil.rmtree(place)
    elif place.exists():
        raise ValueError(f"{place} was not made by hdb and is kept; remove it yourself")
    else:
        raise FileNotFoundError(f"{place} is not there; nothing is installed")


def _check_free(place: Path) -> None:
    if os.path.lexists(place):
        raise FileExistsError(f"{place} exists and is kept; uninstall it first")
