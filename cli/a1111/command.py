"""`hdb a1111`: install the tab in Automatic1111 or Forge, and uninstall it."""

import sys
from pathlib import Path

import click

from cli.extensions import FOLDER, copy, find_place, uninstall_command

PACK = Path(__file__).resolve().parent
BELOW, PROGRAM = "extensions", "Automatic1111 or Forge"


@click.group(name="a1111")
def command() -> None:
    """Install the tab in Automatic1111 or Forge, or uninstall it.

    \b
    hdb a1111 install ~/stable-diffusion-webui
    hdb a1111 uninstall ~/stable-diffusion-webui
    """


@command.command()
@FOLDER
def install(folder: Path) -> None:
    """Copy the tab into the webui in DIR; it runs hdb with the current Python."""
    place = find_place(folder, BELOW, PROGRAM)
    copy(PACK, place, {"python.txt": f"{sys.executable}\n"}, without=("command.py", "__init__.py"))
    click.echo(f"copied the tab to {place}; restart the webui, and look for the tab lidb-peft")


command.add_command(uninstall_command(BELOW, PROGRAM))
