"""`hdb export`."""

from pathlib import Path

import click

from cli.bases import base_option, open_base


@click.command(name="export")
@click.argument("theta", type=click.Path(path_type=Path))
@base_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="LoRA to write.  [default: THETA's name -lora.safetensors]"
)
@click.option("--token", default="sks", show_default=True, help="The rare word that means this person.")
@click.option("--prompt", default="a [V] face", show_default=True, help="What calls the person up; [V] is the token.")
def command(theta: Path, base: str, out: Path | None, token: str, prompt: str) -> None:
    """Write LiDB weights (a theta file of 53 KB) as a LoRA that every reader loads.

    \b
    hdb export me-theta.safetensors --out me.safetensors
    """
    from hypernet.personalize import export_theta

    out = out or theta.with_name(theta.stem + "-lora.safetensors")
    opened = open_base(base, device="cpu", precision="fp32")
    export_theta(theta, opened.model, out, trigger=prompt.replace("[V]", token))
    click.echo(f"wrote {out}")
