"""`hdb preoptimize`."""

from dataclasses import replace
from pathlib import Path

import click

from cli.bases import (
    base_option,
    batch_option,
    checkpointing_option,
    chosen_detector,
    face_detector_option,
    join_and_open,
    loading_options,
    no_crop_option,
    optimizer_option,
    pop_loading,
    prompt_option,
    recipe_option,
    seed_option,
    token_option,
)
from hypernet.bundles import find_bundle, hypernetwork_source
from hypernet.recipe import TARGET_STEPS, PreoptimizeConfig


@click.command(name="preoptimize")
@click.argument("images")
@base_option
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True,
              help="Folder for the targets; an interrupted run resumes there.")  # fmt: skip
@click.option("--steps", "theta_steps", type=click.IntRange(1), default=TARGET_STEPS, show_default=True,
              help="Steps of each fit.")  # fmt: skip
@recipe_option("--lr", "theta_lr", float, "Learning rate.")
@recipe_option("--timesteps-per-step", "timesteps_per_step", click.IntRange(1), "Noisy copies of a photo in each step.")
@batch_option("People fitted at once; auto: as many as fit into the GPU's memory, or a few on a CPU.")
@optimizer_option
@checkpointing_option
@click.option(
    "--hypernet", "init_from", metavar="ID|DIR|testbed", help="Start each fit from the prediction of this hypernetwork."
)
@token_option
@prompt_option
@click.option("--streaming", is_flag=True, help="Stream the data set instead of copying it into the cache first.")
@no_crop_option
@face_detector_option
@seed_option
@loading_options
def command(images, base, out, batch, init_from, streaming, no_crop, face_detector, **options) -> None:
    """Fit LiDB weights to each person in IMAGES, many at once: targets to train a hypernetwork on.

    IMAGES is a folder of images, one person each, with a sub-folder for a person of several; or parquet, webdataset
    tars, or a data set of the Hugging Face hub. An interrupted run resumes when it is started again, and
    `accelerate launch` shares the work between processes.

    \b
    hdb preoptimize faces/ --out targets
    hdb preoptimize somebody/faces --streaming --out targets --batch-size 32
    accelerate launch --num_processes 8 -m lidb_peft preoptimize faces/ --out targets
    """
    from cli.progress import progress_bars
    from hypernet.devices import wait_for_others
    from hypernet.fitting.preoptimize import check_store, open_targets, preoptimize
    from hypernet.fitting.targets import SKIPPED_FILE
    from hypernet.inputs.people import open_people
    from hypernet.network.hypernetwork import read_config
    from hypernet.network.prediction import predicted_start
    from lidb_peft import LiDBSpace

    loading = pop_loading(options)
    given = {name: value for name, value in options.items() if value is not None}
    given |= {"crop": not no_crop, "face_detector": chosen_detector(face_detector, not no_crop)}
    bundle = find_bundle(base)
    config = PreoptimizeConfig(replace(bundle.recipe, **given), batch)
    check_store(out, [images, base, init_from, loading["components"]])
    source = hypernetwork_source(init_from or "none", base)
    if source is not None:
        read_config(source)  # before a base is loaded, which may be a download of gigabytes
    people = open_people(images, streaming)
    state, model = join_and_open(base, **loading)
    space = LiDBSpace(model.adapted, bundle.lidb_config)
    start, start_name = predicted_start(source, space, model.device) if source else (None, "theta_0")
    with state.main_process_first():  # which makes the store
        store = open_targets(out, model, space, people, config, start_name)
    count = people.count()
    click.echo(f"{images}: {count or 'any number of'} people, {batch or store.batch} at a time", err=True)
    with progress_bars(per_hour="people") as report:
        result = preoptimize(
            people, model, space, store, config, start,
            rank=state.process_index, world=state.num_processes, progress=report if state.is_main_process else None,
        )  # fmt: skip
    who = "" if state.num_processes == 1 else f"process {state.process_index + 1} of {state.num_processes}: "
    found = f"; found {result.found} shards of an earlier run" if result.found else ""
    click.echo(f"{who}fitted {result.fitted} people in {result.seconds:.1f} s, {result.per_hour:,.0f} an hour{found}")
    if result.fitted:
        click.echo(f"{who}mean final loss {result.loss:.4f}")
    wait_for_others(state)
    if skipped := len(store.skipped()):
        click.echo(f"{who}skipped {skipped} photos or people so far, listed in {store.folder / SKIPPED_FILE}")
    click.echo(f"{who}{out} now holds the targets of {len(store)} people")
    state.destroy_process_group()
    if count is not None and (missing := -(-count // store.batch) - len(store.shards())):
        raise ValueError(f"{missing} shards of {store.batch} people are missing; start hdb preoptimize again, which "
                         f"makes them")  # fmt: skip
