"""`hdb a1111`: the tab in an Automatic1111 or Forge, and out of it again."""

import sys
from pathlib import Path

import click

from cli.extensions import copy, find_place, remove

PACK = Path(__file__).resolve().parent
_folder = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))


@click.group(name="a1111")
def command() -> None:
    """Put a tab into Automatic1111 or Forge, or take it out.

    \b
    hdb a1111 install ~/stable-diffusion-webui
    hdb a1111 uninstall ~/stable-diffusion-webui
    """


@command.command()
@_folder
def install(folder: Path) -> None:
    """Copy the tab into the webui in DIR; it runs hdb in the Python that runs this."""
    place = find_place(folder, "extensions", "Automatic1111 or Forge")
    copy(PACK, place, {"python.txt": f"{sys.executable}\n"}, without=("command.py", "__init__.py"))
    click.echo(f"copied the tab to {place}; restart the webui, and look for the tab lidb-peft")


@command.command()
@_folder
def uninstall(folder: Path) -> None:
    """Take the tab out of the webui in DIR; LoRAs that it made stay."""
    place = find_place(folder, "extensions", "Automatic1111 or Forge")
    remove(place)
    click.echo(f"removed {place}")
