"""`hdb generate`."""

from pathlib import Path

import click

from cli.bases import (
    base_option,
    components_option,
    device_option,
    precision_option,
    quantize_option,
    seed_option,
)
from cli.results import overwrite_option


@click.command(name="generate")
@click.argument("prompts", nargs=-1, required=True)
@base_option
@click.option("--lora", type=click.Path(path_type=Path), help="LoRA file to draw with, ours or anybody's.")
@click.option("--weight", default=1.0, show_default=True, help="Strength of the LoRA.")
@click.option("--out", type=click.Path(path_type=Path), default="pictures.png", show_default=True,
              help="PNG to write: one picture, or a sheet of several.")  # fmt: skip
@click.option("--steps", "num_steps", default=30, show_default=True, type=click.IntRange(1), help="Sampling steps.")
@click.option("--guidance", type=float, show_default="the base's own: 7.5, 3.5 for FLUX.1, testbed 3",
              help="Guidance scale.")  # fmt: skip
@seed_option
@device_option
@precision_option
@components_option
@quantize_option
@overwrite_option
def command(
    prompts,
    base,
    lora,
    weight,
    out,
    num_steps,
    guidance,
    seed,
    device,
    precision,
    components,
    quantize,
    overwrite,
) -> None:
    """Draw PROMPTS, with or without a LoRA.

    \b
    hdb generate "a sks face" "a pencil drawing of a sks face" --lora me.safetensors
    hdb generate "a face at night" --base testbed
    """
    from cli.progress import progress_bars
    from hypernet.bases.loading import load_base
    from hypernet.sampling import check_pictures, generate_to_file

    check_pictures(out, base, lora, overwrite)
    model = load_base(base, device, precision, components=components, quantize=quantize)
    with progress_bars() as report:
        generate_to_file(
            model, prompts, out, lora=lora, weight=weight, seed=seed, num_steps=num_steps, guidance=guidance,
            overwrite=overwrite, progress=lambda done, total: report("draw", done, total),
        )  # fmt: skip
    click.echo(f"wrote {out}")
