"""The `hdb` group: its commands, and how errors are reported. Imports nothing heavy, so help is instant."""

import atexit
import errno
import gc
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import click

from cli.options import todays_spelling

PACKAGES = ("cli", "testbed", "hypernet", "converters", "lidb_peft")
COMMANDS = {
    "demo": "cli.demo",
    "personalize": "cli.personalize",
    "generate": "cli.generate",
    "prepare": "cli.prepare",
    "preoptimize": "cli.preoptimize",
    "train": "cli.train",
    "learn-start": "cli.learn_start",
    "eval": "cli.eval",
    "inspect": "cli.inspect",
    "convert": "cli.convert",
    "resize": "cli.resize",
    "merge": "cli.merge",
    "extract": "cli.extract",
    "project": "cli.project",
    "push": "cli.push",
    "doctor": "cli.doctor",
    "check": "cli.check",
    "ui": "cli.ui",
    "comfyui": "cli.comfyui.command",
    "a1111": "cli.a1111.command",
}
_MAX_LINES, _MAX_LINE_CHARS = 6, 2000
_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # of the disk, and of somebody's share of it


def as_sentence(error: Exception) -> str:
    """An error's message for users: a few lines at most, without terminal control characters."""
    from lidb_peft.safe_read import printable

    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        written = f": {printable(str(error.filename))} could not be written" if error.filename else ""
        return f"the disk is full{written}; free some space and try again"
    is_of_system = isinstance(error, OSError) and error.filename and error.strerror
    text = f"{error.strerror}: {error.filename}" if is_of_system else str(error)
    lines = text.splitlines()
    more = [f"... and {len(lines) - _MAX_LINES} more lines"] if len(lines) > _MAX_LINES else []
    return "\n".join([*(printable(line, _MAX_LINE_CHARS) for line in lines[:_MAX_LINES]), *more])


def check_shadowing() -> None:
    """Check that Python imports our packages and not files or folders of the same name.

    Raises:
        click.ClickException: something shadows a package, such as a ``hypernet.py`` in the working folder.
    """
    ours = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = PathFinder.find_spec(name)  # None: found in another way, such as an editable installation
        for place in [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations):
            if not Path(place).resolve().is_relative_to(ours / name):
                raise click.ClickException(
                    f"{place} hides this program's package {name}, because Python finds it first; rename it, or "
                    f"run hdb in another folder"
                )


class _Told(logging.Handler):
    """Prints what the library chose, such as the device, to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


class LazyGroup(click.Group):
    """Loads a command's module on demand; turns errors that users can fix into one sentence."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        check_shadowing()
        return super().make_context(*arguments, **options)

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return importlib.import_module(COMMANDS[name]).command if name in COMMANDS else None

    def resolve_command(self, context: click.Context, arguments: list[str]):
        name, command, arguments = super().resolve_command(context, arguments)
        return name, command, todays_spelling(name or "", arguments)

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except (BrokenPipeError, click.exceptions.Exit, click.Abort):  # click's own ends, RuntimeErrors among them
            raise
        except (OSError, ValueError) as error:
            raise click.ClickException(as_sentence(error)) from error
        except RuntimeError as error:
            from hypernet.errors import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            from hypernet.devices import OUT_OF_MEMORY

            raise click.ClickException(f"out of GPU memory; {OUT_OF_MEMORY}") from error


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    try:
        found = metadata.version("lidb-peft")
    except metadata.PackageNotFoundError:
        from lidb_peft import __version__ as found  # slow, for it imports torch

    click.echo(f"hdb {found}")
    context.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show the version."
)
def main() -> None:
    """One face photo in, a standard LoRA out, for Automatic1111, ComfyUI, kohya and diffusers.

    \b
    hdb demo                                    see the whole pipeline, offline, in a minute
    hdb personalize me.jpg                      make a LoRA of a person for Stable Diffusion 1.5
    hdb inspect me.safetensors                  show what a LoRA file contains
    """
    for stream in (sys.stdout, sys.stderr):  # into a file Windows writes in a code page, which lacks most letters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # Imports make 800,000 objects that stay. Looking for garbage among them a thousand times, and once more at the end,
    # takes as long as importing torch.
    gc.set_threshold(50_000)
    if threading.current_thread() is threading.main_thread():  # containers and job schedulers send this, not Ctrl-C
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    atexit.register(gc.freeze)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    log = logging.getLogger("hypernet")
    log.setLevel(logging.INFO)
    log.propagate, log.handlers = False, [_Told()]
    warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)


if __name__ == "__main__":
    main()
