"""`hdb generate`."""

import re
from pathlib import Path
from typing import Any

import click

from cli.base_models import drawing_base_options, pop_base, seed_option
from cli.options import Command
from cli.results import overwrite_option


class _Size(click.ParamType):
    """``768x512`` in pixels."""

    name = "WxH"

    def convert(self, value, param, ctx) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+) ?[xX] ?(\d+)", str(value))
        if match is None:
            self.fail(f"{value!r} is not a size; write it as 768x512, width first", param, ctx)
        return int(match[1]), int(match[2])

    def as_text(self, value: tuple[int, int]) -> str:
        return f"{value[0]}x{value[1]}"


class _Numbers(click.ParamType):
    """``0.6,0.8,1.0``."""

    name = "number,..."

    def __init__(self, kind: type = float) -> None:
        self.kind = kind

    def convert(self, value, param, ctx) -> tuple[Any, ...]:
        parts = value if isinstance(value, tuple | list) else str(value).split(",")
        try:
            return tuple(self.kind(part) for part in parts)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a list of numbers; write it as 0.6,0.8,1.0", param, ctx)

    def as_text(self, value: tuple[Any, ...]) -> str:
        return ",".join(map(str, value))


class _Sampler(click.ParamType):
    name = "NAME"

    def convert(self, value, param, ctx) -> str:
        from hypernet.samplers import check_sampler

        try:
            return check_sampler(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


weights_option = click.option(
    "--weights", type=_Numbers(), default="1.0", show_default=True,
    help="Strengths of the LoRAs, such as 0.6,0.8,1.0; each is a column of the sheet.",
)  # fmt: skip


@click.command(name="generate", cls=Command)
@click.argument("prompts", nargs=-1, required=True)
@click.option("--lora", "loras", type=click.Path(path_type=Path), multiple=True,
              help="LoRA file to draw with, whoever made it; may be repeated, one row each.")  # fmt: skip
@weights_option
@click.option("--out", type=click.Path(path_type=Path), default="pictures.png", show_default=True,
              help="PNG to write: one picture, or a sheet of several.")  # fmt: skip
@click.option("--pictures", type=click.Path(path_type=Path), metavar="DIR",
              help="Also write every picture to its own file in this new folder.")  # fmt: skip
@click.option("--negative", default="", help="Negative prompt.")
@click.option("--size", type=_Size(), show_default="the base model's", help="Width and height in pixels.")
@click.option("--sampler", type=_Sampler(), show_default="the base model's",
              help="Automatic1111's name of the sampler, such as 'Euler a' or 'DPM++ 2M Karras'; an unknown name "
              "lists all.")  # fmt: skip
@click.option("--steps", "num_steps", default=30, show_default=True, type=click.IntRange(1), help="Sampling steps.")
@click.option("--guidance", type=float, show_default="the base model's: 7.5, 3.5 for FLUX.1, testbed 3",
              help="Guidance scale, CFG scale in Automatic1111.")  # fmt: skip
@click.option("--clip-skip", default=1, show_default=True, type=click.IntRange(1),
              help="As in Automatic1111: 1 uses CLIP's last layer, 2 the second-to-last.")  # fmt: skip
@click.option("--num-images", default=1, show_default=True, type=click.IntRange(1),
              help="Pictures per prompt; their seeds count up from --seed.")  # fmt: skip
@click.option("--seeds", type=_Numbers(int), help="Several random seeds, such as 1,2,3, instead of --seed.")
@seed_option
@drawing_base_options
@overwrite_option
def command(prompts, loras, weights, out, pictures, num_images, seeds, seed, overwrite, **options) -> None:
    """Draw PROMPTS, with or without LoRAs.

    Several LoRAs, weights, prompts or seeds make a labelled sheet. Each PNG holds its generation parameters as
    Automatic1111 writes them; hdb inspect shows them.

    \b
    hdb generate "a sks face" "a pencil drawing of a sks face" --lora me.safetensors
    hdb generate "a sks face" --lora me-000040.safetensors --lora me.safetensors --weights 0.6,0.8,1.0
    hdb generate "a sks face" --lora me.safetensors --sampler "DPM++ 2M Karras" --steps 20 --negative blurry
    hdb generate "a face at night" --base testbed --num-images 4
    """
    if seeds is not None and num_images > 1:
        raise click.UsageError("--seeds and --num-images contradict each other; pass one of them")
    from cli.progress import progress_bars
    from hypernet.base_models.loading import as_base
    from hypernet.sheets import DrawConfig, check_pictures, generate_to_file

    base, config = pop_base(options), DrawConfig(**options)
    check_pictures(out, base, loras, pictures, overwrite)
    model = as_base(base)
    with progress_bars() as report:
        files = generate_to_file(
            model, prompts, out, loras, weights, seeds or range(seed, seed + num_images), config, pictures, overwrite,
            progress=lambda done, total: report("draw", done, total),
        )  # fmt: skip
    for file in files:
        click.echo(f"wrote {file}")
