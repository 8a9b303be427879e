"""`hdb a1111`: install the tab in Automatic1111 or Forge, and uninstall it."""

import sys
from pathlib import Path

import click

from cli.extensions import copy, find_place, remove

PACK = Path(__file__).resolve().parent
_folder = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))


@click.group(name="a1111")
def command() -> None:
    """Install the tab in Automatic1111 or Forge, or uninstall it.

    \b
    hdb a1111 install ~/stable-diffusion-webui
    hdb a1111 uninstall ~/stable-diffusion-webui
    """


@command.command()
@_folder
def install(folder: Path) -> None:
    """Copy the tab into the webui in DIR; it runs hdb with the current Python."""
    place = find_place(folder, "extensions", "Automatic1111 or Forge")
    copy(PACK, place, {"python.txt": f"{sys.executable}\n"}, without=("command.py", "__init__.py"))
    click.echo(f"copied the tab to {place}; restart the webui, and look for the tab lidb-peft")


@command.command()
@_folder
def uninstall(folder: Path) -> None:
    """Remove the tab from the webui in DIR; LoRAs made with it are kept."""
    place = find_place(folder, "extensions", "Automatic1111 or Forge")
    remove(place)
    click.echo(f"removed {place}")
