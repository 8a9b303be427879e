"""`hdb ui`."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.base_models import base_options, pop_base
from cli.options import Command

if TYPE_CHECKING:
    from hypernet.base_models.base import BaseModel


@click.command(name="ui", cls=Command)
@click.option("--work-dir", type=click.Path(file_okay=False, path_type=Path), default="hdb-ui", show_default=True,
              help="Folder for uploads and results; no files outside it are served.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to serve on; any but this machine's own admits others without a password.")  # fmt: skip
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    help="Port to serve on; 0 picks a free one.",
)
@click.option("--no-browser", is_flag=True, help="Do not open the page in a browser.")
@base_options
def command(work_dir: Path, host: str, port: int, no_browser: bool, **options) -> None:
    """Make LoRAs in the browser: drop photos, watch the fit, choose a step, download.

    \b
    hdb ui
    hdb ui --base testbed --work-dir /tmp/try   # the bundled miniature: offline, in seconds
    """
    from cli.web.app import MISSING, check_port, launch

    if find_spec("gradio") is None:
        raise click.ClickException(MISSING)
    port = check_port(host, port)
    click.echo(f"the page is at http://{host}:{port}; results are in {work_dir}; Ctrl-C stops it", err=True)
    config = pop_base(options)

    def open_base(name: str) -> "BaseModel":
        from hypernet.base_models.loading import as_base

        return as_base(replace(config, base=name))

    launch(work_dir, open_base, config.base, host, port, not no_browser)
