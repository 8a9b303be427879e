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
@click.option("--v-prediction", is_flag=True, help="BASE predicts v, as Stable Diffusion 2 at 768 pixels does.")
@dtype_option("fp16")
@overwrite_option
def command(tuned, base, out, v_prediction, dtype, overwrite, **ranks) -> None:
    """Make a LoRA of what TUNED, a finetuned model, has that BASE has not, and say how much it misses.

    Both are .safetensors checkpoints or diffusers folders, or their UNets alone. Attention blocks and text encoders
    are taken, with --conv-rank the convolutions too.

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
        (found.left_out, "differ and are no linear ones of attention or text encoder"),
        (found.rounded, "differ by no more than rounding"),
        (found.in_one_model, "are in one of the models only"),
    ):
        if layers:
            click.echo(f"left out {count(layers, 'layer')} that {why}: {examples(layers)}")
