"""`hdb eval`."""

from dataclasses import fields
from pathlib import Path

import click

from cli.base_models import base_options, given_options, hypernet_option, pop_base, recipe_options
from cli.options import Command, config_options
from hypernet.recipe import EvaluationConfig

# As in hypernet.comparison and hypernet.evaluation, which take seconds to import.
METHODS = ("ours", "only-hypernetwork", "no-hypernetwork", "dreambooth", "lora-dreambooth", "textual-inversion")
FACE_NETWORKS = ("auto", "facenet", "dlib", "none")
DINO, CLIP = "facebook/dino-vits16", "openai/clip-vit-large-patch14"

_FLAGS = {"seeds": "--num-seeds", "pictures": "--num-images", "num_steps": "--sampling-steps"}


class _Methods(click.ParamType):
    name = "methods"

    def convert(self, value, param, ctx) -> tuple[str, ...]:
        names = value if isinstance(value, tuple | list) else str(value).split(",")
        for name in names:
            if name not in METHODS:
                self.fail(f"{name!r} is not a method; choose from {', '.join(METHODS)}", param, ctx)
        return tuple(dict.fromkeys(names))

    def as_text(self, value: tuple[str, ...]) -> str:
        return ",".join(value)


class _Setting(click.ParamType):
    name = "setting"

    def convert(self, value, param, ctx) -> tuple[str, int | float | str]:
        if isinstance(value, tuple):
            return value
        name, separator, text = str(value).partition("=")
        if not separator:
            self.fail(f"{value!r} is not NAME=VALUE, such as dreambooth_steps=400", param, ctx)
        for kind in (int, float):
            try:
                return name, kind(text)
            except ValueError:
                continue
        return name, text

    def as_text(self, value: tuple[str, int | float | str]) -> str:
        return f"{value[0]}={value[1]}"


@click.command(name="eval", cls=Command)
@click.argument("people_source", metavar="[PEOPLE]", required=False)
@click.option("--methods", type=_Methods(), metavar="NAME,...", default=METHODS, show_default="all",
              help=f"Methods to compare: {', '.join(METHODS)}.")  # fmt: skip
@click.option("--lora", "loras", multiple=True, type=click.Path(path_type=Path),
              help="Evaluate this LoRA file instead of PEOPLE; may be repeated.")  # fmt: skip
@click.option("--reference", "references", multiple=True, type=click.Path(path_type=Path),
              help="Photo of the person in the LoRAs; may be repeated.")  # fmt: skip
@click.option("--trigger", show_default="from the file's metadata, else a sks face", help="Trigger words of the LoRAs.")
@hypernet_option
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="evaluation", show_default=True,
              help="Folder for scores, pictures, table and sheet; an interrupted run resumes there.")  # fmt: skip
@click.option("--face-network", type=click.Choice(FACE_NETWORKS), default="auto", show_default=True,
              help="Face recognition network: facenet-pytorch trained on VGGFace2, as in the paper, or dlib; auto is "
              "facenet if it is installed, and for testbed its own network.")  # fmt: skip
@click.option("--dino", default=DINO, show_default=True, metavar="ID|DIR|none", help="DINO model for transformers.")
@click.option("--clip", default=CLIP, show_default=True, metavar="ID|DIR|none", help="CLIP model for transformers.")
@click.option("--prompts", type=click.Path(dir_okay=False, path_type=Path), show_default="30 for faces",
              help="Text file with one prompt per line; {} stands for the person.")  # fmt: skip
@config_options(EvaluationConfig, [field.name for field in fields(EvaluationConfig)], _FLAGS)
@click.option("--baseline", "baselines", multiple=True, type=_Setting(), metavar="NAME=VALUE",
              help="Setting of a baseline, e.g. dreambooth_steps=400; may be repeated.")  # fmt: skip
@recipe_options(("steps", "crop", "face_detector", "face", "token", "prompt"), own=("token", "prompt"))
@base_options
def command(
    people_source, methods, loras, references, trigger, hypernet, out, face_network, dino, clip, prompts, baselines,
    **options,
) -> None:  # fmt: skip
    """Compare methods on PEOPLE by the paper's metrics, or evaluate LoRA files of a person.

    PEOPLE is a folder with a sub-folder of photos for each person: methods are given the first photo, and pictures are
    compared with the others. Scores and pictures are kept in --out; existing ones are not computed again.

    \b
    hdb eval faces/ --hypernet hypernet/best --methods ours,only-hypernetwork,no-hypernetwork,lora-dreambooth
    hdb eval --lora me.safetensors --lora theirs.safetensors --reference me1.jpg --reference me2.jpg
    """  # fmt: skip
    _check_usage(people_source, loras, references, trigger)
    base = pop_base(options)
    config = EvaluationConfig(**{field.name: options.pop(field.name) for field in fields(EvaluationConfig)})
    from cli.progress import progress_bars
    from hypernet.comparison import JudgeModels, evaluate, evaluate_loras

    common = {
        "base": base, "out": out, "models": JudgeModels(face_network, dino, clip), "prompts": prompts,
        "config": config, **given_options(options),
    }  # fmt: skip
    with progress_bars() as report:
        if loras:
            found = evaluate_loras(loras, references, trigger=trigger, progress=report, **common)
        else:
            found = evaluate(
                people_source, methods=methods, hypernet=hypernet or "auto",
                baseline_options=dict(baselines), progress=report, **common,
            )  # fmt: skip
    click.echo(found.table)
    for each in found.skipped:
        click.echo(f"left out {each.name}: {each.reason}", err=True)
    click.echo(f"wrote {found.out}")


def _check_usage(people, loras, references, trigger) -> None:
    if bool(people) == bool(loras):
        raise click.UsageError("pass either a folder of PEOPLE, or LoRA files with --lora and --reference")
    if loras and not references:
        raise click.UsageError("--lora requires --reference, a photo of the person to compare with")
    if people and (references or trigger):
        raise click.UsageError("--reference and --trigger require --lora; drop them")
