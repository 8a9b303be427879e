"""Writing what a command computed from LoRAs, and saying what was lost."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from converters import Lora

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
rank_option = click.option("--rank", type=click.IntRange(1), help="The new rank.")
dtype_option = click.option("--dtype", type=click.Choice(list(DTYPES)), show_default="as it is", help="Of the tensors.")


def write_result(lora: "Lora", sources: list[Path], out: Path, errors: dict[str, float], to: str = "") -> None:
    """Write a LoRA in the format of the first source, or in ``to``; ``errors`` are its layers' relative ones."""
    from converters.convert import prepare_writing

    conversion = prepare_writing(lora, sources, out, to)
    for file in conversion.write():
        click.echo(f"wrote {file}")
    for note in conversion.notes:
        click.echo(f"  {note}")
    if any(errors.values()):
        rank, worst = max(layer.rank for layer in lora.layers.values()), max(errors, key=errors.__getitem__)
        click.echo(f"rank {rank}: layers miss {median(errors.values()):.1%} of their norm in the median, "
                   f"{errors[worst]:.1%} at most ({worst})")  # fmt: skip
