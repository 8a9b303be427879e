"""`hdb learn-start`."""

from dataclasses import replace
from pathlib import Path

import click

from cli.bases import (
    base_option,
    hypernet_option,
    loading_options,
    no_crop_option,
    pop_base,
    recipe_option,
    seed_option,
)
from hypernet.bundles import find_bundle, hypernetwork_source
from hypernet.recipe import NUM_TIMESTEPS, PERSONALIZE_CHOICES, StartConfig


def _option(field: str, kind: click.ParamType, text: str):
    """An option for a field of `StartConfig`."""
    flag = "--" + field.replace("_", "-")
    return click.option(flag, field, type=kind, default=getattr(StartConfig, field), show_default=True, help=text)


@click.command(name="learn-start")
@click.argument("images")
@base_option
@hypernet_option
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="LoRA to write.")
@_option("rounds", click.IntRange(1), "In each, some people are finetuned and the start moves towards them.")
@_option("people", click.IntRange(1), "People in each round.")
@_option("inner_steps", click.IntRange(1), "Steps of their finetuning.")
@_option("rate", click.FloatRange(0, 1, min_open=True), "How far the start moves at first; 1: all the way.")
@recipe_option("--adapt", "adapt", click.Choice(PERSONALIZE_CHOICES["adapt"]),
               "Which layers, where no hypernetwork says so: the denoiser's, or the text encoders' too.")  # fmt: skip
@recipe_option("--lr", "lr", float, "Learning rate of the finetuning.")
@recipe_option("--rank", "rank", click.IntRange(1), "Rank of the LoRA.")
@recipe_option("--timesteps-per-step", "timesteps_per_step", click.IntRange(1), "Noisy copies of a photo in each step.")
@recipe_option("--max-timestep", "max_timestep", click.IntRange(1, NUM_TIMESTEPS), "Finetune on timesteps below this.")
@no_crop_option
@seed_option
@loading_options
def command(images, hypernet, out, rounds, people, inner_steps, rate, no_crop, seed, **options) -> None:
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
    given = {name: value for name, value in options.items() if value is not None}
    recipe = with_detector(replace(recipe, **given, crop=not no_crop))
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
