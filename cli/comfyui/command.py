"""`hdb comfyui`: the node pack in a ComfyUI, and out of it again."""

import sys
from pathlib import Path

import click

from cli.extensions import copy, find_place, link, remove

PACK = Path(__file__).resolve().parent
_folder = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))


@click.group(name="comfyui")
def command() -> None:
    """Put the nodes of lidb-peft into a ComfyUI, or take them out.

    \b
    hdb comfyui install ~/ComfyUI
    hdb comfyui uninstall ~/ComfyUI
    """


@command.command()
@_folder
@click.option("--copy", "is_copy", is_flag=True, help="Copy the nodes instead of linking to them.")
def install(folder: Path, is_copy: bool) -> None:
    """Put the nodes into the ComfyUI in DIR: a link, which follows this installation, or a copy."""
    place = find_place(folder, "custom_nodes", "ComfyUI")
    if is_copy:
        copy(PACK, place, {}, without=("command.py",))
    else:
        link(PACK, place)
    click.echo(f"{'copied the nodes to' if is_copy else 'linked'} {place}")
    click.echo(f"restart ComfyUI; it must run in a Python where lidb-peft is installed, such as {sys.executable}")


@command.command()
@_folder
def uninstall(folder: Path) -> None:
    """Take the nodes out of the ComfyUI in DIR; LoRAs that they made stay."""
    place = find_place(folder, "custom_nodes", "ComfyUI")
    remove(place)
    click.echo(f"removed {place}")
