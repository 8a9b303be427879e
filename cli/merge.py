"""`hdb merge`."""

import re
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
    """``PATH`` or ``PATH=WEIGHTS``, as the path and the text of the weights, which is 1 where there is none."""

    name = "lora"

    def convert(self, value, parameter, context) -> tuple[Path, str]:
        ends = [match.start() for match in re.finditer("=", value) if match.start()]
        if Path(value).exists() or not ends:
            return Path(value), "1"
        fitting = [end for end in ends if Path(value[:end]).exists() or value[:end].lower().endswith(".safetensors")]
        end = min(fitting, default=ends[0])
        return Path(value[:end]), value[end + 1 :]


@click.command(name="merge")
@click.argument("loras", metavar="LORA[=WEIGHTS]...", nargs=-1, required=True, type=WeightedPath())
@click.option("--out", required=True, type=click.Path(path_type=Path), help="LoRA or model to write.")
@rank_options()
@click.option("--into", metavar="DIR|FILE", type=click.Path(path_type=Path),
              help="Merge them into this model: a .safetensors checkpoint, or a diffusers folder.")  # fmt: skip
@dtype_option()
@family_option
@overwrite_option
def command(loras, out, into, dtype, family, overwrite, **ranks) -> None:
    """Merge LoRAs, each multiplied by its WEIGHTS, into one LoRA or into a model.

    A merge of LoRAs is exact: its rank is the sum of their ranks, unless --rank reduces it. A model is not held in
    memory and keeps its dtype. WEIGHTS are one number or, as in A1111's prompts, te=, unet=, and block weights lbw=
    (a list of 17 or 26 numbers, for SDXL 12 or 20, for FLUX 61) or names: IN04=0, OUT=0.5, M00=1, BASE=0.

    \b
    hdb merge anna.safetensors=0.8 ink.safetensors=0.5 --out both.safetensors
    hdb merge anna.safetensors ink.safetensors --rank 16 --out both.safetensors
    hdb merge anna.safetensors=0.6 --out weaker.safetensors
    hdb merge anna.safetensors=0.8:te=0.5:IN01=0 ink.safetensors=unet=0.4:te=0 --out both.safetensors
    hdb merge ink.safetensors=1:lbw=1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1 --out ink-out.safetensors
    hdb merge anna.safetensors --into sd15.safetensors --out anna-model.safetensors
    """
    rule = pop_rank_rule(ranks)
    import torch

    from converters import read_lora
    from converters.arithmetic.algebra import merge
    from converters.arithmetic.checkpoint import check_model_output, merge_into
    from converters.arithmetic.weights import LoraWeight, weigh
    from converters.convert import check_target

    sources, weights = [path for path, _ in loras], [LoraWeight.parse(text) for _, text in loras]
    needs_family = not all(weight.is_uniform for weight in weights)
    if into is not None and (rule is not None or dtype is not None or (family and not needs_family)):
        raise click.UsageError("--rank, --dtype and --family apply to a LoRA; drop them with --into")
    if into is None:
        check_target(out, sources, overwrite=overwrite)
    else:
        check_model_output(out, into, sources, overwrite)
    read = [read_lora(path, full_updates=into is not None) for path in sources]
    parts = [part for lora, weight in zip(read, weights, strict=True) for part in weigh(lora, weight, family)]
    if into is not None:
        merged = merge(parts, dtype=torch.float32)[0]
        merge_into(into, merged, out, overwrite)
        click.echo(f"wrote {out}")
        echo_notes(merged)
        return
    merged, errors = merge(parts, rule, dtype)
    write_result(merged, sources, out, errors, family=family, overwrite=overwrite)
