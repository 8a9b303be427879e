"""`hdb convert`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.base_models import prediction_option
from cli.main import as_sentence
from cli.results import dtype_option, family_option

if TYPE_CHECKING:
    from converters.batch import Outcome

# As in converters.convert, which takes seconds to import.
FORMATS = ("kohya", "diffusers", "diffusers-old", "peft", "theta", "lidb")


@click.command(name="convert")
@click.argument("sources", metavar="IN...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(FORMATS), default="kohya", show_default=True,
              help="kohya: a file for A1111, Forge, ComfyUI, kohya and diffusers. diffusers: its own file; -old: names "
              "before 0.20, which ComfyUI reads too. peft: a folder. theta, lidb: LiDB weights as a file or as PEFT's "
              "folder.")  # fmt: skip
@dtype_option()
@family_option
@click.option("--rank", type=click.IntRange(1), help="Rank of the nearest LoRA if IN is LoHa, LoKr or a difference.")
@click.option("--alpha", type=float, help="Alpha of PEFT tensors that lack their adapter_config.json.")
@click.option("--drop-nan", is_flag=True, help="Drop layers that contain NaN or infinity.")
@click.option("--trigger", default="", help='Trigger words to store for A1111, e.g. "a sks face".')
@click.option("--base", metavar="ID|DIR|FILE|testbed",
              help="Base model of LiDB weights, if it belongs to no known family.")  # fmt: skip
@prediction_option
@click.option("--dry-run", is_flag=True, help="Do everything except write files.")
@click.option("--overwrite", is_flag=True, help="Replace existing outputs; otherwise they are kept.")
def command(
    sources, out, to, dtype, family, rank, alpha, drop_nan, trigger, base, prediction, dry_run, overwrite
) -> None:
    """Convert LoRAs and LiDB weights, whoever made them, from one format to another.

    The format of IN is detected from its content: a kohya or diffusers file, a PEFT folder, or LiDB weights. With
    several inputs, or a folder of files, OUT is a folder. A1111's sidecar and preview of IN are copied along with a
    kohya file.

    \b
    hdb convert theirs.safetensors mine.safetensors               any LoRA, for A1111, ComfyUI and the others
    hdb convert me.safetensors me-peft --to peft                  for PeftModel.from_pretrained
    hdb convert theta.safetensors me.safetensors --trigger "a sks face"
    hdb convert loras/ converted/ --to diffusers --dry-run
    """
    from cli.progress import progress_bars
    from converters.batch import convert_batch, plan_batch
    from lidb_peft.outputs import check_not_an_input

    jobs = plan_batch(sources, out, to)
    models, v_prediction = None, None
    if base is not None:
        check_not_an_input(out, [base])
        from hypernet.base_models.loading import load_base

        opened = load_base(base, device="cpu", precision="fp32", prediction=prediction)
        models, family = opened.adapted, family or opened.family
        v_prediction = opened.prediction_type == "v_prediction"
    options = {"dtype": dtype, "family": family, "trigger": trigger, "v_prediction": v_prediction,
               "models": models, "rank": rank, "drop_nan": drop_nan, "alpha": alpha}  # fmt: skip
    outcomes = []
    with progress_bars() as report:
        for outcome in convert_batch(jobs, to, overwrite, dry_run, **options):
            outcomes.append(outcome)
            report("convert", len(outcomes), len(jobs))
    for outcome in outcomes:
        if len(jobs) > 1 or not outcome.error:
            click.echo(as_text(outcome, to))
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        raise errors[0] if len(jobs) == 1 else ValueError(f"{len(errors)} of {len(jobs)} were not converted; see above")


def as_text(outcome: "Outcome", to: str) -> str:
    """An outcome as text: a line for each file, and below it the notes of the conversion."""
    if outcome.error:
        sentence = as_sentence(outcome.error)
        return f"failed {sentence if str(outcome.source) in sentence else f'{outcome.source}: {sentence}'}"
    if outcome.kept:
        return f"kept {outcome.target}, which exists; --overwrite replaces it"
    planned = [f"would write {outcome.target} ({to}) from {outcome.source} ({outcome.found})"]
    return "\n".join([f"wrote {file}" for file in outcome.written] or planned) + "".join(
        f"\n  {note}" for note in outcome.notes
    )
