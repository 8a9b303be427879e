"""`hdb preoptimize`."""

from pathlib import Path

import click

from cli.bases import (
    base_option,
    batch_option,
    checkpointing_option,
    face_detector_option,
    loading_options,
    no_crop_option,
    optimizer_option,
    pop_base,
    prompt_option,
    recipe_option,
    seed_option,
    token_option,
)
from hypernet.recipe import TARGET_STEPS


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
def command(images, out, batch, init_from, streaming, no_crop, **options) -> None:
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
    from hypernet.data_sets import preoptimize

    base = pop_base(options)
    given = {name: value for name, value in options.items() if value is not None}
    with progress_bars(per_hour="people") as report:
        result = preoptimize(
            images, out, base, hypernet=init_from or "none", batch=batch, progress=report, streaming=streaming,
            crop=not no_crop, **given,
        )  # fmt: skip
    many = result.num_processes > 1
    who = f"process {result.process + 1} of {result.num_processes}: " if many else ""
    found = f"; found {result.found} shards of an earlier run" if result.found else ""
    click.echo(f"{who}fitted {result.fitted} people in {result.seconds:.1f} s, {result.per_hour:,.0f} an hour{found}")
    if result.fitted:
        click.echo(f"{who}mean final loss {result.loss:.4f}")
    if result.num_skipped:
        click.echo(f"{who}skipped {result.num_skipped} photos or people so far, listed in {result.skipped_file}")
    click.echo(f"{who}{out} now holds the targets of {result.num_targets} people")
    if result.missing:
        raise ValueError(f"{result.missing} shards of {result.batch} people are missing; start hdb preoptimize again, "
                         f"which makes them")  # fmt: skip
