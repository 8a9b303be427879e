"""`hdb demo`."""

from pathlib import Path

import click

from cli.base_models import seed_option
from cli.results import overwrite_option


@click.command(name="demo")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default="hdb-demo", show_default=True,
    help="Folder for the results.",
)  # fmt: skip
@click.option(
    "--person", default=4, show_default=True, type=click.IntRange(0, 9_999), help="Which unseen identity to use."
)
@seed_option
@overwrite_option
def command(out: Path, person: int, seed: int, overwrite: bool) -> None:
    """Run the whole pipeline on the bundled miniature, offline: portrait, prediction, LoRA, pictures.

    \b
    hdb demo
    hdb demo --person 5 --out demo5
    """
    from cli.progress import progress_bars
    from testbed.demo import run_demo

    with progress_bars() as report:
        files, result = run_demo(out, person, seed, overwrite, report)
    took = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    click.echo(f"one photo           {files.photo}")
    click.echo(f"LoRA                {files.lora}  ({files.lora.stat().st_size / 1000:.0f} KB)")
    click.echo(f"look at             {files.sheet}")
    click.echo(f"took                {took}")
