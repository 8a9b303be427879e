"""`hdb train`."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from cli.base_models import base_options, pop_base
from cli.options import Command, FolderOrUrl, config_options, field_option
from cli.push import push_result, push_to_hub_option
from hypernet.recipe import DEFAULT_BASE, NetworkConfig, PersonalizeConfig, TrainConfig

if TYPE_CHECKING:
    from hypernet.training.loop import Trained

_OF_A_FRESH_ONE = (*(field.name for field in fields(NetworkConfig)), "token", "prompt")


@click.command(name="train", cls=Command)
@click.argument("images")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--targets", type=FolderOrUrl(),
              help="Folder or URL written by hdb preoptimize, to compare predictions with.")  # fmt: skip
@click.option(
    "--resume", is_flag=True, help="Resume from the last checkpoint in --out, with the same options and images."
)
@click.option("--hypernet", "init_from", metavar="ID|DIR|testbed",
              help="Start from this hypernetwork, with its encoder, bases, k, size and prompt.")  # fmt: skip
@config_options(NetworkConfig, [field.name for field in fields(NetworkConfig)])
@config_options(PersonalizeConfig, ["token", "prompt"])
@field_option(TrainConfig, "target_distance", is_left_open=True, shown="1 with --targets, else 0")
@config_options(
    TrainConfig, [field.name for field in fields(TrainConfig) if field.name != "target_distance"],
    {"preserved": "--preserve"},
)  # fmt: skip
@click.option("--validation-images", metavar="IMAGES", help="Hold out these people instead of a fraction of IMAGES.")
@click.option("--tracker", "trackers", multiple=True, metavar="NAME",
              help="Tracker supported by accelerate, e.g. tensorboard; may be repeated.")  # fmt: skip
@push_to_hub_option
@base_options
def command(
    images, out, targets, resume, init_from, target_distance, validation_images, trackers, push_to_hub, **options
) -> None:  # fmt: skip
    """Train a hypernetwork on the people in IMAGES, to predict anybody's LiDB weights from a photo.

    IMAGES has the format of hdb preoptimize. Targets are optional: the denoising loss needs none. OUT/last and OUT/best
    are hypernetworks, OUT/samples shows held-out people, and OUT/log.jsonl holds the losses. Use `accelerate launch`
    to train on several GPUs or machines.

    \b
    hdb train faces/ --out hypernet
    hdb train faces/ --targets targets --out hypernet --flip --gradient-checkpointing on --tracker tensorboard
    hdb train faces/ --targets targets --out hypernet --resume
    hdb train faces/ --hypernet hypernet/best --preservation 1 --out hypernet-2
    accelerate launch --num_processes 8 -m lidb_peft train faces/ --out hypernet
    """
    from cli.progress import progress_bars
    from hypernet.data_sets import train
    from hypernet.training.loop import logged_loss

    if push_to_hub is not None:
        from hypernet.cards import check_repository

        check_repository(push_to_hub)
    if init_from is not None:
        _check_nothing_of_a_fresh_one()
    chosen = pop_base(options)
    fresh = {name: options.pop(name) for name in _OF_A_FRESH_ONE}
    encoder = fresh.pop("encoder")
    distance = float(targets is not None) if target_distance is None else target_distance
    config = TrainConfig(**options, target_distance=distance)
    with progress_bars(read_loss=lambda stage: logged_loss(out)) as report:
        result = train(
            images, out, chosen, config, targets=targets, hypernet=init_from or "none", encoder=encoder,
            network_options=fresh, held_out=validation_images, resume=resume, trackers=trackers, progress=report,
        )  # fmt: skip
    if result.is_main_process:
        _tell(result, chosen.base)
        if push_to_hub is not None:
            _push(result, chosen.base, config, images, push_to_hub)


def _tell(result: "Trained", base: str) -> None:
    loss = "no steps were left" if result.loss is None else f"loss {result.loss:.4f}"
    best = "" if result.best is None else f", {result.best:.4f} at best on held-out people ({result.folder})"
    click.echo(f"trained {result.steps} steps: {loss}{best}")
    if result.rose:
        click.echo(f"warning: the loss rose from {result.first_loss:.4f}; lower --lr, or train longer", err=True)
    if result.skipped:
        click.echo(f"skipped {len(result.skipped)} photos or people, listed in {result.skipped_file}")
    click.echo(f"wrote {result.last}")
    on = "" if base == DEFAULT_BASE else f" --base {base}"
    click.echo(f"use it: hdb personalize me.jpg{on} --hypernet {result.folder}")


def _push(result: "Trained", base: str, config: TrainConfig, images: str, repository: str) -> None:
    from hypernet.cards import hub_id, share_hypernetwork

    data = hub_id(images)  # a folder of somebody's own has a name that is nobody's business
    how = [f"{result.steps} steps of {config.batch_size} people, learning rate {config.lr:g}, seed {config.seed}."]
    if data:
        how.append(f"The photos are those of {data}.")
    if result.best is not None:
        how.append(f"The loss on held-out people was {result.best:.4f} at best.")
    push_result(share_hypernetwork(result.folder, hub_id(base), how=how), result.folder, repository)


def _check_nothing_of_a_fresh_one() -> None:
    context = click.get_current_context()
    for name in _OF_A_FRESH_ONE:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--{name.replace('_', '-')} cannot be set with --hypernet, which has its own; drop one of the two"
            )
