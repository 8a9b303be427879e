"""`hdb learn-start`."""

from dataclasses import fields
from pathlib import Path

import click

from cli.base_models import base_options, given_options, hypernet_option, pop_base, recipe_options
from cli.options import Command, config_options
from hypernet.recipe import PersonalizeConfig, StartConfig

# Fields of the theta fit and of pictures, and the seed, which `StartConfig` has.
_OTHERS = {"theta_steps", "theta_lr", "steps", "guidance", "seed"}


@click.command(name="learn-start", cls=Command)
@click.argument("images")
@hypernet_option
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="LoRA to write.")
@config_options(StartConfig, [field.name for field in fields(StartConfig)])
@recipe_options(
    [field.name for field in fields(PersonalizeConfig) if field.name not in _OTHERS], own=("token", "prompt")
)
@base_options
def command(images, hypernet, out, rounds, people, inner_steps, rate, seed, **options) -> None:
    """Learn a start for finetunings: a LoRA that a few steps turn into anybody's, for hdb personalize --start.

    IMAGES has the format of hdb preoptimize; a few hundred people are enough. Set the options shared with
    hdb personalize as you will set them there. In the folder of a hypernetwork or base model, the LoRA is found
    automatically if its name is start.safetensors. Run the command again to resume an interrupted run.

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
