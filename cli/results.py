"""Options of the commands that compute with LoRAs; writing what they made, and saying what was lost."""

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


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace outputs that are there.")
family_option = click.option(
    "--family", metavar="|".join(family_names()), default="", help="The base model's, where a LoRA does not tell.",
)  # fmt: skip
_RANKS = {
    "conv_rank": click.option("--conv-rank", type=click.IntRange(1), show_default="as --rank",
                              help="Of 3x3 convolutions, at most."),
    "energy": click.option("--energy", type=click.FloatRange(0, 1, min_open=True),
                           help="In each layer the lowest rank that keeps this share of its squared norm."),
    "sv_fro": click.option("--sv-fro", type=click.FloatRange(0, 1, min_open=True),
                           help="Or this share of its norm, as kohya's sv_fro."),
    "sv_cumulative": click.option("--sv-cumulative", type=click.FloatRange(0, 1, min_open=True),
                                  help="Or of the sum of its singular values, as kohya's sv_cumulative."),
    "sv_ratio": click.option("--sv-ratio", type=click.FloatRange(1),
                             help="Or singular values down to the largest over this, as kohya's sv_ratio."),
}  # fmt: skip


def rank_options(default: int | None = None):
    """Options for the rank of each layer, which `pop_rank_rule` takes out of a command's arguments."""
    rank = click.option("--rank", type=click.IntRange(1), default=default, show_default=default is not None,
                        help="Of a layer, at most.")  # fmt: skip

    def add(command):
        for option in reversed((rank, *_RANKS.values())):
            command = option(command)
        return command

    return add


def pop_rank_rule(arguments: dict[str, Any]) -> "RankRule | None":
    """Take what `rank_options` gave out of ``arguments``; None if nothing is asked for."""
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
    """The option for the dtype of what is written, as torch's."""
    shown = "as it is" if default is None else True
    return click.option("--dtype", type=_Dtype(tuple(DTYPES)), default=default, show_default=shown,
                        help="Of the tensors.")  # fmt: skip


def write_result(
    lora: "Lora", sources: list[Path], out: Path, errors: dict[str, float], to: str = "", **options: Any
) -> None:
    """Write a LoRA in the format of the first source, or in ``to``; ``errors`` are its layers' relative ones.

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
