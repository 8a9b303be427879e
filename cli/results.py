"""Options of the commands that compute with LoRAs; writing what they made, and saying what was lost."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

    from converters import Lora

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class _Dtype(click.Choice):
    def convert(self, value, parameter, context) -> "torch.dtype":
        import torch

        return getattr(torch, DTYPES[super().convert(value, parameter, context)])


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace outputs that are there.")
rank_option = click.option("--rank", type=click.IntRange(1), help="The new rank.")


def dtype_option(default: str | None = None):
    """The option for the dtype of what is written, as torch's."""
    shown = "as it is" if default is None else True
    return click.option("--dtype", type=_Dtype(tuple(DTYPES)), default=default, show_default=shown,
                        help="Of the tensors.")  # fmt: skip


def write_result(
    lora: "Lora", sources: list[Path], out: Path, errors: dict[str, float], to: str = "", overwrite: bool = False
) -> None:
    """Write a LoRA in the format of the first source, or in ``to``; ``errors`` are its layers' relative ones."""
    from converters.convert import prepare_writing

    conversion = prepare_writing(lora, sources, out, to, overwrite)
    for file in conversion.write():
        click.echo(f"wrote {file}")
    for note in conversion.notes:
        click.echo(f"  {note}")
    if any(errors.values()):
        click.echo(f"rank {max(layer.rank for layer in lora.layers.values())}: {what_is_missed(errors)}")


def echo_notes(lora: "Lora") -> None:
    """Say what reading a LoRA took, and what of it a model cannot hold."""
    from lidb_peft.safe_read import examples

    for note in lora.notes:
        click.echo(f"  {note}")
    if lora.embeddings:
        click.echo(f"  embeddings left out, which a model's file does not hold: {examples(list(lora.embeddings))}")


def what_is_missed(errors: dict[str, float]) -> str:
    """What layers miss, for people; ``errors`` are relative, by layer."""
    worst = max(errors, key=errors.__getitem__)
    return (
        f"layers miss {median(errors.values()):.1%} of their norm in the median, {errors[worst]:.1%} at most ({worst})"
    )
