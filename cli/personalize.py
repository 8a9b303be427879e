"""`hdb personalize`."""

from collections import deque
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.bases import (
    base_options,
    batch_option,
    given_options,
    hypernet_option,
    pop_base,
    recipe_options,
    start_option,
)
from cli.options import ConfiguredCommand
from cli.results import overwrite_option
from hypernet.recipe import PersonalizeConfig
from hypernet.timing import timed

if TYPE_CHECKING:
    from hypernet.personalization import Personalization
    from hypernet.personalization_each import PersonalizedEach


@click.command(name="personalize", cls=ConfiguredCommand)
@click.argument("photos", nargs=-1, type=click.Path(path_type=Path))
@click.option("--each", metavar="DIR",
              help="Instead of PHOTOS: a folder of people, each with one photo or a sub-folder of photos.")  # fmt: skip
@batch_option("People fitted at once with --each; auto: as many as fit into the GPU's memory, or a few on a CPU.")
@hypernet_option
@click.option("--out", type=click.Path(path_type=Path), show_default="the photo's name .safetensors; of DIR, DIR-loras",
              help="LoRA to write; with --each the folder of the LoRAs, where an interrupted run resumes.")  # fmt: skip
@start_option
@recipe_options([field.name for field in fields(PersonalizeConfig)], own=("token", "prompt"))
@click.option("--preview", "previews", multiple=True, metavar="PROMPT", help="Draw this too; may be repeated.")
@click.option("--no-preview", is_flag=True, help="Draw nothing, not even the LoRA's preview picture.")
@base_options
@click.option("--save-theta", type=click.Path(path_type=Path), help="Write the LiDB weights too (53 KB for SD1.5).")
@click.option("--from-theta", type=click.Path(path_type=Path), help="Start from LiDB weights written before.")
@overwrite_option
def command(
    photos,
    each,
    batch_size,
    hypernet,
    out,
    previews,
    no_preview,
    save_theta,
    from_theta,
    start,
    overwrite,
    **options,
) -> None:
    """Make a LoRA of the person in PHOTOS; several photos are one person. With --each, of many people at once.

    \b
    hdb personalize me.jpg
    hdb personalize me.jpg --hypernet my-hypernetwork/best
    hdb personalize me.jpg --preview "a sks face in the rain" --preview "a pencil drawing of a sks face"
    hdb personalize me1.jpg me2.jpg --base v1-5-pruned.safetensors --out me.safetensors --steps 160
    hdb personalize portrait.png --base testbed --no-crop --no-preview
    hdb personalize --each faces/ --out loras
    """  # fmt: skip
    _check_usage(photos, each, batch_size, hypernet, previews, no_preview, save_theta, from_theta)
    base = pop_base(options)
    seconds: dict[str, float] = {}
    with timed(seconds, "import"):
        from cli.progress import progress_bars
        from hypernet.bases.loading import as_base
        from hypernet.inputs.people import open_people
        from hypernet.personalization import make_person
        from hypernet.personalization_each import make_people
        from hypernet.request import request_people, request_person
        from hypernet.watching import StepReport, Watch

    common = {
        "hypernet": hypernet or "auto",
        "previews": None if no_preview else previews,
        "start": None if start == "none" else start,
        "base": base,
        "overwrite": overwrite,
        "options": given_options(options),
    }
    if each is None:
        out = out or Path(Path(photos[0]).stem + ".safetensors")
        request = request_person(photos, out, save_theta=save_theta, from_theta=from_theta, **common)
    else:
        folder = Path(each).resolve()
        people, out = open_people(each), out or Path(f"{folder.name if folder.is_dir() else folder.stem}-loras")
        request = request_people(people, out, batch_size=batch_size, **common)
    with timed(seconds, "import"):
        from diffusers import StableDiffusionPipeline  # noqa: F401 - else it would be a part of loading
    with timed(seconds, "load base"):
        model = as_base(base)
    last: deque[StepReport] = deque(maxlen=1)

    def read_loss(stage: str) -> float | None:
        return last[0].loss if last and last[0].stage == stage else None

    with progress_bars(per_hour="" if each is None else "people", read_loss=read_loss) as report:
        if each is None:
            result = make_person(request, model, report, Watch(on_step=last.append))
        else:
            result = make_people(request, model, report)
    (_tell_person if each is None else _tell_people)(result, out)
    seconds |= result.seconds
    click.echo("took " + ", ".join(f"{stage} {duration:.2f} s" for stage, duration in seconds.items()))
    trigger = request.config.trigger
    where, name = (out.name, out.stem) if each is None else ("the files", "NAME")
    click.echo(f'use it: put {where} into models/Lora and write "{trigger} <lora:{name}:1>"')
    if each is not None:
        click.echo(f'all of them answer to "{trigger}": take one at a time')


def _check_usage(photos, each, batch_size, hypernet, previews, no_preview, save_theta, from_theta) -> None:
    if each is None and not photos:
        raise click.UsageError("PHOTOS are missing; pass at least one photo, or --each with a folder of people")
    contradictions = {
        "PHOTOS and --each": photos and each,
        "--save-theta and --each": save_theta and each,
        "--from-theta and --each": from_theta and each,
        "--preview and --no-preview": previews and no_preview,
        "--hypernet and --from-theta": from_theta and hypernet not in (None, "none"),
    }
    for both, are_given in contradictions.items():
        if are_given:
            raise click.UsageError(f"{both} contradict each other; pass one of them")
    if batch_size is not None and each is None:
        raise click.UsageError("--batch-size is for many people; pass them with --each")


def _tell_person(result: "Personalization", out: Path) -> None:
    for sentence in result.left_out:
        click.echo(sentence, err=True)
    for photo in result.photos:
        if photo.note:
            click.echo(photo.note, err=True)
    if result.start_source:
        click.echo(f"the finetuning started from {result.start_source}", err=True)
    for note in result.loss_notes:
        click.echo(note, err=True)
    for file in result.files:
        click.echo(f"wrote {file}")


def _tell_people(result: "PersonalizedEach", out: Path) -> None:
    for note in result.notes:
        click.echo(note, err=True)
    for name, reason in result.skipped:
        click.echo(f"skipped {name}: {reason}")
    if not result.made and not result.kept:
        raise ValueError(f"there is nobody that a LoRA could be made of; {len(result.skipped)} were skipped, see above")
    if result.made:
        click.echo(f"made {len(result.made)} LoRAs in {out}, {result.per_hour:,.0f} an hour")
    if result.kept:
        click.echo(f"kept {len(result.kept)} LoRAs that were in {out}; delete one to have it made anew")
