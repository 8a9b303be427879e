"""`hdb merge`."""

from pathlib import Path

import click

from cli.results import (
    dtype_option,
    echo_notes,
    family_option,
    overwrite_option,
    pop_rank_rule,
    rank_options,
    write_result,
)


class WeightedPath(click.ParamType):
    """``PATH`` or ``PATH=WEIGHT``, as ``(path, weight)``; the weight is 1 where there is none."""

    name = "lora"

    def convert(self, value, parameter, context) -> tuple[Path, float]:
        path, _, weight = value.rpartition("=")
        try:
            return (Path(path), float(weight)) if path else (Path(value), 1.0)
        except ValueError:
            return Path(value), 1.0


@click.command(name="merge")
@click.argument("loras", metavar="LORA[=WEIGHT]...", nargs=-1, required=True, type=WeightedPath())
@click.option("--out", required=True, type=click.Path(path_type=Path), help="LoRA or model to write.")
@rank_options()
@click.option("--into", metavar="DIR|FILE", type=click.Path(path_type=Path),
              help="Add them to this model: a .safetensors checkpoint, or a diffusers folder.")  # fmt: skip
@dtype_option()
@family_option
@overwrite_option
def command(loras, out, into, dtype, family, overwrite, **ranks) -> None:
    """Add up LoRAs, each times its WEIGHT, into one LoRA or into a model.

    A sum of LoRAs is exact: its rank is the sum of theirs, unless --rank makes it smaller. A model is not held in
    memory, and keeps its own dtype.

    \b
    hdb merge anna.safetensors=0.8 ink.safetensors=0.5 --out both.safetensors
    hdb merge anna.safetensors ink.safetensors --rank 16 --out both.safetensors
    hdb merge anna.safetensors=0.6 --out weaker.safetensors
    hdb merge anna.safetensors --into sd15.safetensors --out anna-model.safetensors
    """
    rule = pop_rank_rule(ranks)
    if into is not None and (rule is not None or dtype is not None or family):
        raise click.UsageError("--rank, --dtype and --family are for a LoRA; leave them out with --into")
    import torch

    from converters import read_lora
    from converters.arithmetic.algebra import merge
    from converters.arithmetic.checkpoint import check_model_output, merge_into
    from converters.convert import check_target

    sources = [path for path, _ in loras]
    if into is None:
        check_target(out, sources, overwrite=overwrite)
    else:
        check_model_output(out, into, sources, overwrite)
    parts = [(read_lora(path, full_updates=into is not None), weight) for path, weight in loras]
    if into is not None:
        merged = merge(parts, dtype=torch.float32)[0]
        merge_into(into, merged, out, overwrite)
        click.echo(f"wrote {out}")
        echo_notes(merged)
        return
    merged, errors = merge(parts, rule, dtype)
    write_result(merged, sources, out, errors, family=family, overwrite=overwrite)
