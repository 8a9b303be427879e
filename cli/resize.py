"""`hdb resize`."""

from pathlib import Path

import click

from cli.results import dtype_option, overwrite_option, rank_option, write_result


@click.command(name="resize")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@rank_option
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True),
              help="Or the lowest rank at which every layer keeps this share of its squared norm.")  # fmt: skip
@dtype_option()
@overwrite_option
def command(source, out, rank, energy, dtype, overwrite) -> None:
    """Make a LoRA smaller: the nearest one of a lower rank, and how much it misses.

    \b
    hdb resize big.safetensors small.safetensors --rank 8
    hdb resize big.safetensors small.safetensors --energy 0.95 --dtype fp16
    """
    if (rank is None) == (energy is None):
        raise click.UsageError("pass either --rank or --energy")
    from converters import read_lora
    from converters.arithmetic.algebra import resize
    from converters.convert import check_target

    check_target(out, [source], overwrite=overwrite)
    lora, errors = resize(read_lora(source), rank, energy, dtype)
    write_result(lora, [source], out, errors, overwrite=overwrite)
