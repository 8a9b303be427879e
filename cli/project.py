"""`hdb project`."""

from pathlib import Path

import click

from cli.base_models import prediction_option
from cli.results import overwrite_option, what_is_missed


@click.command(name="project")
@click.argument("source", metavar="LORA|MODEL", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--minus", metavar="DIR|FILE", type=click.Path(path_type=Path),
              help="Base model of a finetuned MODEL, whose difference from it is projected.")  # fmt: skip
@click.option("--base", metavar="ID|DIR|FILE|testbed",
              help="Base model, if it belongs to no known family.")  # fmt: skip
@prediction_option
@overwrite_option
def command(source, out, minus, base, prediction, overwrite) -> None:
    """Write the LiDB weights nearest to a LoRA, for training a hypernetwork, and report the error.

    Most LoRAs change more than two random bases can represent. Layers that LiDB does not adapt are dropped.

    \b
    hdb project theirs.safetensors theta.safetensors
    hdb project dreambooth.safetensors theta.safetensors --minus sd15.safetensors
    """
    from converters.arithmetic.project import project_to_file
    from lidb_peft.outputs import check_output

    check_output(out, [source, minus, base], overwrite=overwrite)
    options = {}
    if base is not None:
        from hypernet.base_models.loading import load_base
        from hypernet.bundles import find_bundle

        model = load_base(base, device="cpu", precision="fp32", prediction=prediction)
        options = {"models": model.adapted, "config": find_bundle(base).lidb_config}
    found = project_to_file(source, out, minus, overwrite=overwrite, **options)
    click.echo(f"wrote {out}")
    click.echo(f"{len(found.errors)} {what_is_missed(found.errors)}; {len(found.left_out)} were left out")
