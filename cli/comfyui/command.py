"""`hdb comfyui`: install the node pack in ComfyUI, and uninstall it."""

import sys
from pathlib import Path

import click

from cli.extensions import FOLDER, copy, find_place, link, uninstall_command

PACK = Path(__file__).resolve().parent
BELOW, PROGRAM = "custom_nodes", "ComfyUI"


@click.group(name="comfyui")
def command() -> None:
    """Install the nodes of lidb-peft in ComfyUI, or uninstall them.

    \b
    hdb comfyui install ~/ComfyUI
    hdb comfyui uninstall ~/ComfyUI
    """


@command.command()
@FOLDER
@click.option("--copy", "is_copy", is_flag=True, help="Copy the nodes instead of linking to them.")
def install(folder: Path, is_copy: bool) -> None:
    """Install the nodes in the ComfyUI in DIR: as a link, which follows this installation, or as a copy."""
    place = find_place(folder, BELOW, PROGRAM)
    if is_copy:
        copy(PACK, place, {}, without=("command.py",))
    else:
        link(PACK, place)
    click.echo(f"{'copied the nodes to' if is_copy else 'linked'} {place}")
    click.echo(f"restart ComfyUI; it must run in a Python where lidb-peft is installed, such as {sys.executable}")


command.add_command(uninstall_command(BELOW, PROGRAM))
