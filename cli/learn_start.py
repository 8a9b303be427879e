"""`hdb learn-start`."""

from dataclasses import fields, replace
from pathlib import Path

import click

from cli.bases import base_options, given_options, hypernet_option, pop_base, recipe_options
from cli.options import ConfiguredCommand, config_options
from hypernet.bundles import find_bundle, hypernetwork_source
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
    from hypernet.bases.loading import as_base
    from hypernet.fitting.starts import save_start
    from hypernet.inputs.people import open_people, with_detector
    from hypernet.network.hypernetwork import HyperNetwork
    from hypernet.network.prediction import predicted_recipe
    from hypernet.personalization import recipe_space
    from hypernet.training.start import learn_start, resumable_start, rounds_of
    from lidb_peft.outputs import check_output

    chosen = pop_base(options)
    base = chosen.base
    check_output(out, [images, *(file for file in [base] if Path(file).is_file())])  # a base's folder may have a start
    config = StartConfig(rounds, people, inner_steps, rate, seed)
    bundle, source = find_bundle(base), hypernetwork_source(hypernet or "auto", base)
    network = None if source is None else HyperNetwork.from_pretrained(source).requires_grad_(False)
    recipe = bundle.recipe if network is None else predicted_recipe(network.config, bundle.recipe)
    recipe = with_detector(replace(recipe, **given_options(options)))
    found = open_people(images)
    model = as_base(chosen)
    space = recipe_space(model, recipe, bundle.lidb_config) if network is None else network.space_on(model.adapted)
    of_round = rounds_of(found, model, recipe, config, network)
    bases = None if network is None else network.bases
    with progress_bars() as report, resumable_start(out.with_suffix(".unfinished"), space, recipe.rank, seed) as begun:
        state, checkpoint = begun
        learn_start(
            model, space, of_round, config, recipe.lora_fit, state, recipe.rank, bases,
            lambda done, total: report("learn start", done, total), checkpoint,
        )  # fmt: skip
        save_start(out, state.start, recipe.rank, space)
    if state.losses:
        first, last = state.losses[-1]
        click.echo(f"a finetuning of {inner_steps} steps now takes the loss from {first:.4f} to {last:.4f}")
    click.echo(f"wrote {out}")
