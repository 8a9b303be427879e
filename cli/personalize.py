"""`hdb personalize`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.bases import (
    base_option,
    batch_option,
    checkpointing_option,
    face_detector_option,
    hypernet_option,
    loading_options,
    optimizer_option,
    pop_base,
    recipe_option,
    seed_option,
    start_option,
)
from cli.results import overwrite_option
from hypernet.recipe import NUM_TIMESTEPS, PERSONALIZE_CHOICES, PersonalizeConfig
from hypernet.timing import timed

if TYPE_CHECKING:
    from hypernet.personalization import Personalization
    from hypernet.personalization_each import PersonalizedEach

_RECIPE = PersonalizeConfig()


@click.command(name="personalize")
@click.argument("photos", nargs=-1, type=click.Path(path_type=Path))
@click.option("--each", metavar="DIR",
              help="Instead of PHOTOS: a folder of people, each with one photo or a sub-folder of photos.")  # fmt: skip
@batch_option("People fitted at once with --each; auto: as many as fit into the GPU's memory, or a few on a CPU.")
@base_option
@hypernet_option
@click.option("--out", type=click.Path(path_type=Path), show_default="the photo's name .safetensors; of DIR, DIR-loras",
              help="LoRA to write; with --each the folder of the LoRAs, where an interrupted run resumes.")  # fmt: skip
@recipe_option("--theta-steps", "theta_steps", click.IntRange(0), "Steps of a LiDB fit before the finetuning.")
@recipe_option("--theta-lr", "theta_lr", float, "Learning rate of the LiDB fit.")
@recipe_option(
    "--steps", "steps", click.IntRange(0), "Steps of the rank-relaxed finetuning, by default half after a prediction."
)
@start_option
@recipe_option("--adapt", "adapt", click.Choice(PERSONALIZE_CHOICES["adapt"]),
               "Which layers, where no hypernetwork says so: the denoiser's, or the text encoders' too.")  # fmt: skip
@recipe_option("--lr", "lr", float, "Learning rate of the finetuning.")
@recipe_option("--rank", "rank", click.IntRange(1), "Rank of the finetuned LoRA; LiDB weights add 1 to the file's.")
@recipe_option("--max-timestep", "max_timestep", click.IntRange(1, NUM_TIMESTEPS),
               "Finetune on timesteps below this one; fewer leave composition as it was.")  # fmt: skip
@recipe_option("--preservation", "preservation", click.FloatRange(0), "How strongly prompts keep their effect; 0: off.")
@recipe_option("--background", "background", click.FloatRange(0), "How much the background counts; the head counts 1.")
@click.option("--token", show_default=f"{_RECIPE.token}; a hypernetwork has its own",
              help="The rare word that will mean this person.")  # fmt: skip
@click.option("--prompt", show_default=f"{_RECIPE.prompt}; a hypernetwork has its own",
              help="What the photos show; [V] is the token.")  # fmt: skip
@click.option("--preview", "previews", multiple=True, metavar="PROMPT", help="Draw this too; may be repeated.")
@click.option("--no-preview", is_flag=True, help="Draw nothing, not even the LoRA's preview picture.")
@optimizer_option
@checkpointing_option
@seed_option
@loading_options
@face_detector_option
@click.option("--no-crop", is_flag=True, help="Do not look for a face: take the photo's middle square.")
@click.option("--save-theta", type=click.Path(path_type=Path), help="Write the LiDB weights too (53 KB for SD1.5).")
@click.option("--from-theta", type=click.Path(path_type=Path), help="Start from LiDB weights written before.")
@overwrite_option
def command(
    photos,
    each,
    batch,
    hypernet,
    out,
    previews,
    no_preview,
    no_crop,
    face_detector,
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
    _check_usage(photos, each, batch, hypernet, previews, no_preview, save_theta, from_theta)
    base = pop_base(options)
    seconds: dict[str, float] = {}
    with timed(seconds, "import"):
        from cli.progress import progress_bars
        from hypernet.bases.loading import as_base
        from hypernet.inputs.people import open_people
        from hypernet.personalization import make_person
        from hypernet.personalization_each import make_people
        from hypernet.request import request_people, request_person

    given = {name: value for name, value in options.items() if value is not None}
    given |= {"crop": not no_crop, "face_detector": face_detector}
    common = {
        "hypernet": hypernet or "auto",
        "previews": None if no_preview else previews,
        "start": None if start == "none" else start,
        "base": base,
        "overwrite": overwrite,
        "options": given,
    }
    if each is None:
        out = out or Path(Path(photos[0]).stem + ".safetensors")
        request = request_person(photos, out, save_theta=save_theta, from_theta=from_theta, **common)
    else:
        folder = Path(each).resolve()
        people, out = open_people(each), out or Path(f"{folder.name if folder.is_dir() else folder.stem}-loras")
        request = request_people(people, out, batch=batch, **common)
    with timed(seconds, "import"):
        from diffusers import StableDiffusionPipeline  # noqa: F401 - else it would be a part of loading
    with timed(seconds, "load base"):
        model = as_base(base)
    with progress_bars(per_hour="" if each is None else "people") as report:
        result = (make_person if each is None else make_people)(request, model, report)
    (_tell_person if each is None else _tell_people)(result, out)
    seconds |= result.seconds
    click.echo("took " + ", ".join(f"{stage} {duration:.2f} s" for stage, duration in seconds.items()))
    trigger = request.config.trigger
    where, name = (out.name, out.stem) if each is None else ("the files", "NAME")
    click.echo(f'use it: put {where} into models/Lora and write "{trigger} <lora:{name}:1>"')
    if each is not None:
        click.echo(f'all of them answer to "{trigger}": take one at a time')


def _check_usage(photos, each, batch, hypernet, previews, no_preview, save_theta, from_theta) -> None:
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
    if batch is not None and each is None:
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
