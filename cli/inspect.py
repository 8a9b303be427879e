"""`hdb inspect`."""

import json
from pathlib import Path

import click


@click.command(name="inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def command(file: Path, as_json: bool) -> None:
    """Say what a LoRA or LiDB file holds, whoever made it, and what would go wrong with it.

    \b
    hdb inspect me.safetensors
    hdb inspect pytorch_lora_weights.safetensors --json
    """
    from converters import describe

    description = describe(file)
    click.echo(json.dumps(description.to_dict(), indent=2) if as_json else str(description))
