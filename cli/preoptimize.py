"""`hdb preoptimize`."""

from dataclasses import fields

import click

from cli.base_models import base_options, batch_option, given_options, pop_base, recipe_options
from cli.options import Command, FolderOrUrl, field_option
from hypernet.recipe import TARGET_STEPS, PersonalizeConfig

# Fields of the finetuning and of pictures.
_OTHERS = {"steps", "lr", "rank", "max_timestep", "guidance"}


@click.command(name="preoptimize", cls=Command)
@click.argument("images")
@click.option("--out", type=FolderOrUrl(), required=True,
              help="Folder or URL (s3://, hf://) for the targets; an interrupted run resumes there.")  # fmt: skip
@field_option(PersonalizeConfig, "theta_steps", "--steps", True, str(TARGET_STEPS), "Steps of each fit.")
@recipe_options(
    [field.name for field in fields(PersonalizeConfig) if field.name not in _OTHERS | {"theta_steps"}],
    flags={"theta_lr": "--lr"},
)
@batch_option("People to fit at once; auto: as many as fit into GPU memory, or a few on a CPU.")
@click.option(
    "--hypernet", "init_from", metavar="ID|DIR|testbed", help="Start each fit from this hypernetwork's prediction."
)
@click.option("--streaming", is_flag=True, help="Stream the data set instead of copying it into the cache first.")
@base_options
def command(images, out, batch_size, init_from, streaming, **options) -> None:
    """Fit LiDB weights to each person in IMAGES, many at once: targets to train a hypernetwork on.

    IMAGES is a folder with one image per person, or a sub-folder of images for a person with several; or parquet
    files, webdataset tars, or a data set on the Hugging Face hub. Run the command again to resume an interrupted run.
    Start the same command several times, on machines with a shared --out or by `accelerate launch`, to share the work;
    what a killed process had claimed is made by the others.

    \b
    hdb preoptimize faces/ --out targets
    hdb preoptimize somebody/faces --streaming --out targets --batch-size 32
    accelerate launch --num_processes 8 -m lidb_peft preoptimize faces/ --out targets
    """
    from cli.progress import progress_bars
    from hypernet.data_sets import preoptimize

    base = pop_base(options)
    with progress_bars(per_hour="people") as report:
        result = preoptimize(
            images, out, base, hypernet=init_from or "none", batch_size=batch_size, progress=report,
            streaming=streaming, **given_options(options),
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
        raise ValueError(f"{result.missing} shards of {result.shard_size} people are missing; run hdb preoptimize "
                         f"again to make them")  # fmt: skip
