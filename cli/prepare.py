"""`hdb prepare`."""

from pathlib import Path

import click

from cli.base_models import base_options, given_options, pop_base, recipe_options
from cli.options import Command


class _Part(click.ParamType):
    """``3/8``."""

    name = "part"

    def convert(self, value, param, ctx) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        number, _, count = str(value).partition("/")
        if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
            self.fail(f"{str(value)!r} is not a part; write 0/8, 1/8 and so on to 7/8", param, ctx)
        return int(number), int(count)

    def as_text(self, value: tuple[int, int]) -> str:
        return f"{value[0]}/{value[1]}"


@click.command(name="prepare", cls=Command)
@click.argument("images")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True,
              help="Folder for the data set; an interrupted run resumes there.")  # fmt: skip
@click.option("--resolution", "size_px", type=click.IntRange(1), default=512, show_default=True,
              help="Side of the squares in pixels; use the base model's, 1024 for SDXL, 32 for testbed.")  # fmt: skip
@click.option("--part", type=_Part(), metavar="I/N", show_default="all",
              help="Make every N-th shard, from the I-th (from 0), for machines without a shared --out.")  # fmt: skip
@click.option("--num-workers", type=click.IntRange(0), default=4, show_default=True,
              help="Processes that find faces.")  # fmt: skip
@click.option("--moments", is_flag=True,
              help="Store the moments of --base's VAE too, in float16: a training without --flip and --jitter then "
              "encodes no photo.")  # fmt: skip
@recipe_options(("crop", "face_detector", "face"))
@base_options
def command(images, out, size_px, part, num_workers, moments, **options) -> None:
    """Decode the photos in IMAGES and crop the faces once, for hdb preoptimize and hdb train.

    IMAGES has the format of hdb preoptimize. --out is a folder of parquet files, which the datasets library reads and
    the Hugging Face hub displays; unusable photos are listed in it with the reason. Start the same command on several
    machines with a shared --out to share the work; what a killed one had claimed is made by the others.

    \b
    hdb prepare faces/ --out prepared
    hdb train prepared --out hypernetwork
    hdb prepare faces/ --out prepared --moments --base stable-diffusion-v1-5/stable-diffusion-v1-5
    hdb prepare somebody/faces --out prepared --part 3/8
    """
    from cli.progress import progress_bars
    from hypernet.base_models.loading import as_base
    from hypernet.inputs.prepared import prepare

    chosen = pop_base(options)
    base = as_base(chosen) if moments else None
    with progress_bars(per_hour="people") as report:
        made = prepare(
            images, out, size_px, part=part or (0, 1), num_workers=num_workers, progress=report, base=base,
            **given_options(options),
        )  # fmt: skip
    found = f"; found {made.found} shards of an earlier run" if made.found else ""
    click.echo(f"prepared {made.people} people in {made.seconds:.1f} s{found}")
    for name, reason in list(made.left_out.items())[:5]:
        click.echo(f"left out {name}: {reason}", err=True)
    if made.left_out:
        click.echo(f"left out {len(made.left_out)} photos in all; the reasons are in the data set")
    if made.missing:
        click.echo(f"{made.missing} shards of other parts are still missing")
    click.echo(f"wrote {out}")
