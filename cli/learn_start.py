"""`hdb learn-start`."""

from dataclasses import fields
from pathlib import Path

import click

from cli.base_models import base_options, given_options, hypernet_option, pop_base, recipe_options
from cli.options import ConfiguredCommand, config_options
from hypernet.recipe import PersonalizeConfig, StartConfig

# What the fit of theta alone has, the pictures, and the seed, which is `StartConfig`'s.
_OTHERS = {"theta_steps", "theta_lr", "steps", "guidance", "seed"}


@click.command(name="learn-start", cls=ConfiguredCommand)
@click.argument("images")
@hypernet_option
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="LoRA to write.")
@config_options(StartConfig, [field.name for field in fields(StartConfig)])
@recipe_options(
    [field.name for field in fields(PersonalizeConfig) if field.name not in _OTHERS], own=("token", "prompt")
)
@base_options
def command(images, hypernet, out, rounds, people, inner_steps, rate, seed, **options) -> None:
    """Learn where finetunings start: a LoRA from which a few steps reach anybody, and hdb personalize --start takes it.

    IMAGES is as for hdb preoptimize; some hundred people suffice. Options that hdb personalize has too should be as
    they will be there. Beside a hypernetwork or a base model in a folder it is found by itself if it is called
    start.safetensors. A run that was stopped goes on when it is started again.

    \b
    hdb learn-start faces/ --out start.safetensors
    hdb learn-start faces/ --hypernet hypernet/best --out hypernet/best/start.safetensors
    """
    from cli.progress import progress_bars
    from hypernet.data_sets import learn_start

    base, config = pop_base(options), StartConfig(rounds, people, inner_steps, rate, seed)
    with progress_bars() as report:
        state = learn_start(
            images, out, base, config, hypernet=hypernet or "auto", progress=report, **given_options(options)
        )
    if state.losses:
        first, last = state.losses[-1]
        click.echo(f"a finetuning of {inner_steps} steps now takes the loss from {first:.4f} to {last:.4f}")
    click.echo(f"wrote {out}")
