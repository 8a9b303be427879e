"""`hdb train`."""

from pathlib import Path

import click
from click.core import ParameterSource

from cli.bases import (
    base_option,
    face_detector_option,
    loading_options,
    no_crop_option,
    pop_base,
    prompt_option,
    seed_option,
    token_option,
)
from cli.options import ConfiguredCommand
from hypernet.recipe import AUTO, DEFAULT_BASE, DEFAULT_ENCODER, PRESERVED, TRAIN_CHOICES, TrainConfig

OF_A_FRESH_ONE = ("encoder", "train_encoder", "learned_bases", "rounds", "hidden_size", "token", "prompt")


def _option(flag: str, kind: click.ParamType | type, text: str, field: str = ""):
    """An option for a field of `TrainConfig`, the one that it is named for if none is given."""
    field = field or flag.removeprefix("--").replace("-", "_")
    kind = click.Choice(TRAIN_CHOICES[field]) if field in TRAIN_CHOICES else kind
    return click.option(flag, field, type=kind, default=getattr(TrainConfig, field), show_default=True, help=text)


def _switch(flag: str, text: str):
    return click.option(flag, flag.removeprefix("--").replace("-", "_"), is_flag=True, help=text)


@click.command(name="train", cls=ConfiguredCommand)
@click.argument("images")
@base_option
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--targets", type=click.Path(file_okay=False, path_type=Path),
              help="What hdb preoptimize wrote, to compare predictions with.")  # fmt: skip
@_switch("--resume", "Resume from the last checkpoint in --out, with the same options and images.")
@click.option("--hypernet", "init_from", metavar="ID|DIR|testbed",
              help="Start from this hypernetwork, with its encoder, bases, k, size and prompt.")  # fmt: skip
@click.option("--encoder", default=DEFAULT_ENCODER, show_default=True, help="Vision transformer: an id or a folder.")
@_switch("--train-encoder", "Train the encoder too.")
@_switch("--learned-bases", "Learn the bases too, shared by everybody.")
@click.option(
    "--k",
    "rounds",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Refinements of a prediction, the paper's k.",
)
@click.option("--hidden-size", default=1024, show_default=True, type=click.IntRange(1), help="Width of the decoder.")
@_option("--steps", click.IntRange(1), "Optimizer steps.")
@_option("--lr", float, "Peak learning rate.")
@_option("--warmup-steps", click.IntRange(0), "Steps of linear warm-up.")
@_option("--lr-scheduler", str, "How the learning rate decays to zero.", "schedule")
@_option("--optimizer", str, "adamw8bit requires bitsandbytes; auto is adamw.")
@_option("--weight-decay", click.FloatRange(0), "Weight decay of AdamW.")
@_option("--batch-size", click.IntRange(1), "People per process in each forward pass.", "batch")
@_option("--gradient-accumulation-steps", click.IntRange(1), "Forward passes per optimizer step.", "accumulation")
@click.option("--gradient-checkpointing", type=click.Choice(AUTO[1:]), is_flag=False, flag_value="on", default="off",
              show_default=True, help="Use less memory but be slower.")  # fmt: skip
@_option("--max-grad-norm", float, "Gradients are clipped to this norm.")
@_option("--denoising", click.FloatRange(0), "Weight of the denoising loss (the paper's alpha); 0: off.")
@click.option("--weights", type=click.FloatRange(0), show_default="1 with --targets, else 0",
              help="Weight of the distance to the targets (the paper's beta); 0: off.")  # fmt: skip
@_option("--compare", str, "What is compared with the targets: the weights' updates, or their factors.")
@_option("--preservation", click.FloatRange(0), "Weight of prompt preservation; 0: off.")
@click.option("--preserve", "preserved", multiple=True, default=PRESERVED, metavar="PROMPT", show_default="10 prompts",
              help="A prompt to preserve, with {} for the subject; may be repeated.")  # fmt: skip
@_option("--background", click.FloatRange(0), "Weight of the background in the loss; the head has 1.")
@_switch("--deep-supervision", "Put the loss on every round, not on the last alone.")
@_option("--timesteps-per-step", click.IntRange(1), "Noisy copies of a photo in each step.")
@_switch("--same-photo", "Denoise the photo that the encoder sees, also if a person has several.")
@_switch("--flip", "Mirror half of the photos.")
@_option("--jitter", float, "Cut off up to this fraction of a photo's side.")
@_option("--caption-dropout", float, "Share of the steps that use an empty prompt.")
@_option("--validation", float, "The fraction of the people to hold out.")
@click.option("--validation-images", metavar="IMAGES", help="Hold out these people instead.")
@_option("--log-every", click.IntRange(1), "Steps between lines of the log.")
@_option("--checkpoint-every", click.IntRange(1), "Steps between checkpoints, each with a validation and pictures.")
@_option("--num-workers", click.IntRange(0), "Processes that decode photos.", "workers")
@click.option("--tracker", "trackers", multiple=True, metavar="NAME",
              help="A tracker of accelerate, e.g. tensorboard; may be repeated.")  # fmt: skip
@token_option
@prompt_option
@no_crop_option
@face_detector_option
@seed_option
@loading_options
def command(
    images, out, targets, resume, init_from, weights, validation_images, trackers, no_crop, **options
) -> None:  # fmt: skip
    """Train a hypernetwork on the people in IMAGES: it predicts anybody's LiDB weights from a photo.

    IMAGES is as for hdb preoptimize, whose targets are optional: the denoising loss needs none. OUT/last and OUT/best
    are hypernetworks, OUT/samples shows held-out people, OUT/log.jsonl holds the losses. `accelerate launch` trains
    on several GPUs or machines.

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

    if init_from is not None:
        _check_nothing_of_a_fresh_one()
    chosen, encoder = pop_base(options), options.pop("encoder")
    fresh = {name: options.pop(name) for name in OF_A_FRESH_ONE if name != "encoder"}
    options["gradient_checkpointing"] = options["gradient_checkpointing"] == "on"
    weights = float(targets is not None) if weights is None else weights
    config = TrainConfig(**options, weights=weights, crop=not no_crop)
    with progress_bars(read_loss=lambda: logged_loss(out)) as report:
        result = train(
            images, out, chosen, config, targets=targets, hypernet=init_from or "none", encoder=encoder,
            network_options=fresh, held_out=validation_images, resume=resume, trackers=trackers, progress=report,
        )  # fmt: skip
    if result.is_main_process:
        loss = "no step was left" if result.loss is None else f"loss {result.loss:.4f}"
        best = "" if result.best is None else f", {result.best:.4f} at best on held-out people ({result.folder})"
        click.echo(f"trained {result.steps} steps: {loss}{best}")
        if result.skipped:
            click.echo(f"skipped {len(result.skipped)} photos or people, listed in {result.skipped_file}")
        click.echo(f"wrote {result.last}")
        on = "" if chosen.base == DEFAULT_BASE else f" --base {chosen.base}"
        click.echo(f"use it: hdb personalize me.jpg{on} --hypernet {result.folder}")


def _check_nothing_of_a_fresh_one() -> None:
    context = click.get_current_context()
    for name in OF_A_FRESH_ONE:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--{'k' if name == 'rounds' else name.replace('_', '-')} is the hypernetwork's own with --hypernet; "
                f"leave one of the two out"
            )
