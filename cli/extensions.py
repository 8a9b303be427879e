"""Install a folder of this package as another program's extension, and uninstall it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import click

FOLDER = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
NAME = "lidb-peft"
_MARK = "installed-by-hdb.txt"  # marks a copy as ours, so that we may remove it


def find_place(program: Path, below: str, name: str) -> Path:
    """Where our folder belongs inside the folder of a program.

    Raises:
        ValueError: ``program`` is not the folder of that program.
    """
    folder = program.expanduser() / below
    if not folder.is_dir():
        raise ValueError(f"{program} is not a folder of {name}: it has no {below}; pass the folder that contains it")
    return folder / NAME


def link(pack: Path, place: Path) -> None:
    """Link ``place`` to ``pack``; raises OSError if ``place`` exists or cannot be a link."""
    _check_free(place)
    try:
        place.symlink_to(pack, target_is_directory=True)
    except OSError as error:  # Windows allows links to developers only
        raise OSError(f"{place} cannot be a link ({error.strerror}); pass --copy") from error


def copy(pack: Path, place: Path, files: Mapping[str, str], without: tuple[str, ...] = ()) -> None:
    """Copy a folder and add ``files``, name -> text; all of it or nothing.

    Raises:
        OSError: ``place`` exists or cannot be written.
    """
    from lidb_peft.files import atomic_folder

    _check_free(place)
    with atomic_folder(place) as whole:
        shutil.copytree(pack, whole, ignore=shutil.ignore_patterns("__pycache__", *without), dirs_exist_ok=True)
        for name, text in {**files, _MARK: "hdb wrote this folder, and removes it\n"}.items():
            (whole / name).write_text(text, encoding="utf-8")


def remove(place: Path) -> None:
    """Remove what `link` or `copy` made, and nothing else.

    Raises:
        FileNotFoundError: ``place`` does not exist.
        ValueError: ``place`` was not made by us.
    """
    if place.is_symlink():
        place.unlink()
    elif (place / _MARK).is_file():
        shutil.rmtree(place)
    elif place.exists():
        raise ValueError(f"{place} was not made by hdb and is kept; remove it yourself")
    else:
        raise FileNotFoundError(f"{place} does not exist; nothing is installed")


def uninstall_command(below: str, program: str) -> click.Command:
    """The command that removes our folder from ``program``; see `find_place`."""

    @click.command("uninstall", help=f"Uninstall from the {program} in DIR; LoRAs made there are kept.")
    @FOLDER
    def uninstall(folder: Path) -> None:
        place = find_place(folder, below, program)
        remove(place)
        click.echo(f"removed {place}")

    return uninstall


def _check_free(place: Path) -> None:
    if os.path.lexists(place):
        raise FileExistsError(f"{place} exists and is kept; uninstall it first")
