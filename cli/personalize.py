"""`hdb personalize`."""

from dataclasses import replace
from pathlib import Path

import click

from cli.bases import (
    base_hypernet,
    base_option,
    base_recipe,
    device_option,
    hypernet_option,
    hypernet_source,
    open_base,
    precision_option,
    recipe_option,
    seed_option,
)
from hypernet.recipe import PersonalizeConfig

_RECIPE = PersonalizeConfig()


@click.command(name="personalize")
@click.argument("photos", nargs=-1, required=True, type=click.Path(path_type=Path))
@base_option
@hypernet_option
@click.option("--out", type=click.Path(path_type=Path), help="LoRA to write.  [default: the photo's name .safetensors]")
@recipe_option("--theta-steps", "theta_steps", click.IntRange(0), "Steps of a LiDB fit before the finetuning.")
@recipe_option("--theta-lr", "theta_lr", float, "Learning rate of the LiDB fit.")
@recipe_option(
    "--steps", "steps", click.IntRange(0), "Steps of the rank-relaxed finetuning, by default half after a prediction."
)
@recipe_option("--lr", "lr", float, "Learning rate of the finetuning.")
@recipe_option("--rank", "rank", click.IntRange(1), "Rank of the finetuned LoRA; LiDB weights add 1 to the file's.")
@recipe_option("--preservation", "preservation", click.FloatRange(0), "How strongly prompts keep their effect; 0: off.")
@recipe_option("--background", "background", click.FloatRange(0), "How much the background counts; the head counts 1.")
@click.option("--token", show_default=f"{_RECIPE.token}; a hypernetwork has its own",
              help="The rare word that will mean this person.")  # fmt: skip
@click.option("--prompt", show_default=f"{_RECIPE.prompt}; a hypernetwork has its own",
              help="What the photos show; [V] is the token.")  # fmt: skip
@click.option("--preview", "previews", multiple=True, metavar="PROMPT", help="Draw this too; may be repeated.")
@click.option("--no-preview", is_flag=True, help="Draw nothing, not even the LoRA's preview picture.")
@seed_option
@device_option
@precision_option
@click.option("--no-crop", is_flag=True, help="Do not look for a face: take the photo's middle square.")
@click.option("--save-theta", type=click.Path(path_type=Path), help="Write the LiDB weights too (53 KB for SD1.5).")
@click.option("--from-theta", type=click.Path(path_type=Path), help="Start from LiDB weights written before.")
def command(
    photos, base, hypernet, out, previews, no_preview, device, precision, no_crop, save_theta, from_theta, **options
) -> None:
    """Make a LoRA of the person in PHOTOS; several photos are one person.

    \b
    hdb personalize me.jpg
    hdb personalize me.jpg --hypernet my-hypernetwork/best
    hdb personalize me.jpg --preview "a sks face in the rain" --preview "a pencil drawing of a sks face"
    hdb personalize me1.jpg me2.jpg --base v1-5-pruned.safetensors --out me.safetensors --steps 160
    hdb personalize portrait.png --base testbed --no-crop --no-preview
    """
    from cli.progress import progress_bars
    from hypernet.network.hypernetwork import read_config
    from hypernet.network.prediction import predicted_recipe
    from hypernet.personalize import check_request, personalize_to_files

    if previews and no_preview:
        raise click.UsageError("--preview and --no-preview contradict each other; pass one of them")
    if from_theta is not None:
        if hypernet not in (None, "none"):
            raise click.UsageError("--hypernet and --from-theta contradict each other; pass one of them")
        hypernet = "none"
    source = hypernet_source(hypernet or base_hypernet(base))
    recipe, network = base_recipe(base), None
    if source is not None:
        network = read_config(source)
        recipe = predicted_recipe(network, recipe)
        click.echo(f"starting at the prediction of the hypernetwork {source}", err=True)
    out = out or Path(Path(photos[0]).stem + ".safetensors")
    given = {name: value for name, value in options.items() if value is not None}
    recipe = replace(recipe, **given, crop=not no_crop)
    check_request(photos, out, recipe, save_theta, from_theta, network)
    opened = open_base(base, device, precision)
    with progress_bars() as report:
        result = personalize_to_files(
            photos, opened.model, out, recipe, opened.lidb_config,
            previews=None if no_preview else previews, save_theta=save_theta, from_theta=from_theta, hypernet=network,
            progress=report,
        )  # fmt: skip
    for photo in result.photos:
        if photo.note:
            click.echo(photo.note, err=True)
    for file in result.files:
        click.echo(f"wrote {file}")
    click.echo("took " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items()))
    click.echo(f'use it: put {out.name} into models/Lora and write "{recipe.trigger} <lora:{out.stem}:1>"')
