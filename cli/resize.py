"""`hdb resize`."""

from pathlib import Path

import click

from cli.results import dtype_option, family_option, overwrite_option, pop_rank_rule, rank_options, write_result


@click.command(name="resize")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@rank_options()
@dtype_option()
@family_option
@overwrite_option
def command(source, out, dtype, family, overwrite, **ranks) -> None:
    """Reduce the ranks of a LoRA to make it smaller, and report the error.

    Each layer gets its own rank, and no rank grows.

    \b
    hdb resize big.safetensors small.safetensors --rank 8
    hdb resize big.safetensors small.safetensors --rank 32 --conv-rank 4
    hdb resize big.safetensors small.safetensors --energy 0.95 --dtype fp16
    hdb resize big.safetensors small.safetensors --rank 32 --sv-fro 0.9
    """
    rule = pop_rank_rule(ranks)
    if rule is None:
        raise click.UsageError("pass --rank, --energy or another option that chooses ranks")
    from converters import read_lora
    from converters.arithmetic.algebra import resize
    from converters.convert import check_target

    check_target(out, [source], overwrite=overwrite)
    lora, errors = resize(read_lora(source), rule, dtype)
    write_result(lora, [source], out, errors, family=family, overwrite=overwrite)
