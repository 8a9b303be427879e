"""Options of the commands that do arithmetic on LoRAs; writing results and reporting errors."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from cli.families import family_names

if TYPE_CHECKING:
    import torch

    from converters import Lora
    from converters.arithmetic.ranks import RankRule

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class _Dtype(click.Choice):
    def convert(self, value, parameter, context) -> "torch.dtype":
        import torch

        return getattr(torch, DTYPES[super().convert(value, parameter, context)])


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace existing outputs.")
family_option = click.option(
    "--family", metavar="|".join(family_names()), default="",
    help="Family of the base model, if it cannot be detected from the LoRA.",
)  # fmt: skip
_RANKS = {
    "conv_rank": click.option("--conv-rank", type=click.IntRange(1), show_default="as --rank",
                              help="Maximum rank of 3x3 convolutions."),
    "energy": click.option("--energy", type=click.FloatRange(0, 1, min_open=True),
                           help="Give each layer the lowest rank that keeps this fraction of its squared norm."),
    "sv_fro": click.option("--sv-fro", type=click.FloatRange(0, 1, min_open=True),
                           help="Keep this fraction of its norm, like kohya's sv_fro."),
    "sv_cumulative": click.option("--sv-cumulative", type=click.FloatRange(0, 1, min_open=True),
                                  help="Keep this fraction of the singular values' sum, like kohya's sv_cumulative."),
    "sv_ratio": click.option("--sv-ratio", type=click.FloatRange(1),
                             help="Keep singular values down to the largest divided by this, like kohya's sv_ratio."),
}  # fmt: skip


def rank_options(default: int | None = None):
    """Options for the rank of each layer; `pop_rank_rule` removes them from a command's arguments."""
    rank = click.option("--rank", type=click.IntRange(1), default=default, show_default=default is not None,
                        help="Maximum rank of a layer.")  # fmt: skip

    def add(command):
        for option in reversed((rank, *_RANKS.values())):
            command = option(command)
        return command

    return add


def pop_rank_rule(arguments: dict[str, Any]) -> "RankRule | None":
    """Remove the values of `rank_options` from ``arguments`` and return them as a rule; None if none is set."""
    rank, conv_rank = arguments.pop("rank"), arguments.pop("conv_rank")
    amounts = {name: arguments.pop(name) for name in _RANKS if name != "conv_rank"}
    given = [(name, amount) for name, amount in amounts.items() if amount is not None]
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name, _ in given)
        raise click.UsageError(f"{names} contradict each other; pass one of them")
    if rank is None and conv_rank is None and not given:
        return None
    from converters.arithmetic.ranks import RankRule

    return RankRule(rank, conv_rank, *(given[0] if given else ()))


def dtype_option(default: str | None = None):
    """The option for the dtype of the output; its value is a torch dtype."""
    shown = "unchanged" if default is None else True
    return click.option("--dtype", type=_Dtype(tuple(DTYPES)), default=default, show_default=shown,
                        help="Dtype of the output's tensors.")  # fmt: skip


def write_result(
    lora: "Lora", sources: list[Path], out: Path, errors: dict[str, float], to: str = "", **options: Any
) -> None:
    """Write a LoRA in the format of the first source, or in ``to``; ``errors`` are relative, by layer.

    Args:
        options: of `prepare_writing`.
    """
    from converters.convert import prepare_writing

    conversion = prepare_writing(lora, sources, out, to, **options)
    for file in conversion.write():
        click.echo(f"wrote {file}")
    for note in conversion.notes:
        click.echo(f"  {note}")
    if any(errors.values()):
        ranks = {layer.rank for layer in lora.layers.values()}
        shown = f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
        click.echo(f"{shown}: {what_is_missed(errors)}")


def echo_notes(lora: "Lora") -> None:
    """Print the notes of reading a LoRA, and which parts of it a model cannot hold."""
    from lidb_peft.safe_read import examples

    for note in lora.notes:
        click.echo(f"  {note}")
    if lora.embeddings:
        click.echo(f"  left out embeddings, which a model file cannot hold: {examples(list(lora.embeddings))}")


def what_is_missed(errors: dict[str, float]) -> str:
    """A sentence about the layers' errors, which are relative, by layer."""
    worst = max(errors, key=errors.__getitem__)
    return (
        f"layers miss {median(errors.values()):.1%} of their norm in the median, {errors[worst]:.1%} at most ({worst})"
    )
