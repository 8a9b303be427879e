"""`hdb extract`."""

from functools import partial
from pathlib import Path

import click

from cli.results import dtype_option, overwrite_option, write_result

_MAX_SHOWN = 3


@click.command(name="extract")
@click.argument("tuned", metavar="TUNED", type=click.Path(path_type=Path))
@click.argument("base", metavar="BASE", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="LoRA to write.")
@click.option("--rank", type=click.IntRange(1), default=32, show_default=True, help="Of the LoRA.")
@dtype_option("fp16")
@overwrite_option
def command(tuned, base, out, rank, dtype, overwrite) -> None:
    """Make a LoRA of what TUNED, a finetuned model, has that BASE has not, and say how much it misses.

    Both are .safetensors checkpoints or diffusers folders. Attention blocks and text encoders are taken.

    \b
    hdb extract dreambooth.safetensors sd15.safetensors --out person.safetensors
    hdb extract dreambooth-folder/ sd15.safetensors --rank 64 --out person.safetensors
    """
    from cli.progress import progress_bars
    from converters.arithmetic.checkpoint import extract
    from converters.convert import check_target

    check_target(out, [tuned, base], "kohya", overwrite)
    with progress_bars() as report:
        found = extract(tuned, base, rank, dtype, partial(report, "extract"))
    write_result(found.lora, [tuned, base], out, found.errors, "kohya", overwrite)
    if found.left_out:
        click.echo(f"left out {len(found.left_out)} layers that differ and are no linear ones of attention or text "
                   f"encoder: {', '.join(found.left_out[:_MAX_SHOWN])}")  # fmt: skip
