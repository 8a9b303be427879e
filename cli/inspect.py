"""`hdb inspect`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from converters import FileDescription
    from converters.inspection.facts import BlockStatistics

_HAS_WARNINGS = 3
_MAX_CHARS = 600
_MAX_NUMBERS = 8
_TOPIC_CHARS = 40


@click.command(name="inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
@click.option("--layers", is_flag=True, help="List each layer: rank, alpha, norm of its update, rms change.")
@click.pass_context
def command(context: click.Context, file: Path, as_json: bool, layers: bool) -> None:
    """Show what a LoRA or LiDB file contains, whoever made it, and warn about problems.

    For a PNG, show the generation parameters that Automatic1111 and hdb generate store in it.

    The exit code is 0 for a sound file, 3 for one with warnings, and 1 for one that cannot be read.

    \b
    hdb inspect me.safetensors
    hdb inspect me.safetensors --layers
    hdb inspect pytorch_lora_weights.safetensors --json
    hdb inspect picture.png
    """
    if file.suffix.lower() == ".png":
        _inspect_picture(file, as_json)
        return
    from converters import describe

    description = describe(file)
    click.echo(json.dumps(description.to_dict(), indent=2) if as_json else as_text(description))
    if layers and not as_json:  # which has them anyway
        click.echo(layers_as_text(description))
    if description.warnings:
        context.exit(_HAS_WARNINGS)


def _inspect_picture(file: Path, as_json: bool) -> None:
    from hypernet.infotext import read_picture
    from lidb_peft.safe_read import printable

    told = read_picture(file)
    if told is None:
        raise ValueError(f"{file} has no generation parameters; only those in Automatic1111's format can be read")
    rows = {"prompt": told.prompt, "negative prompt": told.negative, **told.fields}
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for topic, finding in rows.items():
        if finding:
            click.echo(f"{printable(topic, _TOPIC_CHARS):26}{printable(finding, _MAX_CHARS)}")


def as_text(description: "FileDescription") -> str:
    """A description as text: a topic and a finding per line, without what is unknown."""
    from lidb_peft.safe_read import printable

    rows = [
        ("file", f"{description.path} ({description.size_bytes / 1000:,.0f} KB)"),
        ("kind", description.kind),
        ("made by", description.made_by),
        ("base", " ".join(filter(None, [description.base, _in_brackets(description.base_model_name)])) or "not said"),
        ("rank", _numbers(description.ranks)),
        ("alpha", _numbers(description.alphas)),
        ("layers", _layers(description.layers)),
        ("LiDB", _lidb(description.metadata)),
        ("numbers", f"{description.num_parameters:,} in {', '.join(description.dtypes)}"),
        *((f"norm {name}", _block(block)) for name, block in description.blocks.items()),
        ("title", description.title),
        ("trigger words", ", ".join(description.trigger_words)),
        *((f"hash {name}", value) for name, value in description.hashes.items()),
        *(("note", note) for note in description.notes),
        *(("warning", warning) for warning in description.warnings),
    ]
    return "\n".join(f"{topic:26}{printable(finding, _MAX_CHARS)}" for topic, finding in rows if finding)


def layers_as_text(description: "FileDescription") -> str:
    """A line for each layer: rank, alpha, size of its update, and name."""
    from lidb_peft.safe_read import printable

    rows = [("rank", "alpha", "norm", "rms", "layer")]
    for layer in description.statistics:
        numbers = ("-" if number is None else f"{number:.4g}" for number in (layer.alpha, layer.norm, layer.rms))
        rows.append((str(layer.rank or "-"), *numbers, printable(layer.name, _MAX_CHARS)))
    return "\n".join(f"{rank:>6}{alpha:>10}{norm:>12}{rms:>12}  {name}" for rank, alpha, norm, rms, name in rows)


def _block(block: "BlockStatistics") -> str:
    ranks = f" of rank {_numbers(block.ranks)}" if block.ranks else ""
    layers = f"{block.num_layers} layer{'' if block.num_layers == 1 else 's'}{ranks}"
    return f"{block.norm:.4g}, rms {block.rms:.2g}, {layers}"


def _in_brackets(text: str) -> str:
    return f"({text})" if text else ""


def _numbers(values: tuple[float, ...]) -> str:
    more = f" and {len(values) - _MAX_NUMBERS} more" if len(values) > _MAX_NUMBERS else ""
    return ", ".join(f"{value:g}" for value in values[:_MAX_NUMBERS]) + more


def _layers(layers: dict[str, int]) -> str:
    parts = [f"{count} {component}" for component, count in layers.items() if component != "all"]
    return f"{sum(layers.values())}" + (f": {', '.join(parts)}" if parts else "")


def _lidb(metadata: dict[str, str]) -> str:
    """Dimensions, seed and kind of a theta file's bases; empty for other files."""
    from lidb_peft.record import from_metadata

    record = from_metadata(metadata)
    fields = {"down_dim": "down", "up_dim": "up", "seed": "seed", "scale": "scale", "basis": "basis"}
    found = {name: record.get(key) for key, name in fields.items()}
    return ", ".join(f"{name} {value}" for name, value in found.items() if value)
