"""`hdb extract`."""

from functools import partial
from pathlib import Path

import click

from cli.results import dtype_option, overwrite_option, pop_rank_rule, rank_options, write_result


@click.command(name="extract")
@click.argument("tuned", metavar="TUNED", type=click.Path(path_type=Path))
@click.argument("base", metavar="BASE", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="LoRA to write.")
@rank_options(32)
@click.option(
    "--v-prediction", is_flag=True, help="BASE is a v-prediction model, like Stable Diffusion 2 at 768 pixels."
)
@dtype_option("fp16")
@overwrite_option
def command(tuned, base, out, v_prediction, dtype, overwrite, **ranks) -> None:
    """Extract a LoRA from the difference between TUNED, a finetuned model, and BASE, and report the error.

    Both are .safetensors checkpoints or diffusers folders, or their UNets alone. The LoRA covers attention blocks and
    text encoders, with --conv-rank convolutions too.

    \b
    hdb extract dreambooth.safetensors sd15.safetensors --out person.safetensors
    hdb extract dreambooth-folder/ sd15.safetensors --rank 64 --out person.safetensors
    """
    from cli.progress import progress_bars
    from converters.arithmetic.checkpoint import extract
    from converters.convert import check_target
    from lidb_peft.safe_read import count, examples

    rule = pop_rank_rule(ranks)
    check_target(out, [tuned, base], "kohya", overwrite)
    with progress_bars() as report:
        found = extract(tuned, base, rule, dtype, partial(report, "extract"))
    write_result(found.lora, [tuned, base], out, found.errors, "kohya", overwrite=overwrite,
                 v_prediction=v_prediction or None)  # fmt: skip
    for layers, why in (
        (found.left_out, "differ but are not linear layers of attention or text encoder"),
        (found.rounded, "differ by no more than rounding"),
        (found.in_one_model, "are in only one of the models"),
    ):
        if layers:
            click.echo(f"left out {count(layers, 'layer')} that {why}: {examples(layers)}")
