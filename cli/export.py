"""`hdb export`."""

from pathlib import Path

import click

from cli.bases import base_option, open_base
from hypernet.recipe import PersonalizeConfig


@click.command(name="export")
@click.argument("theta", type=click.Path(path_type=Path))
@base_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="LoRA to write.  [default: THETA's name -lora.safetensors]"
)
@click.option(
    "--token", default=PersonalizeConfig.token, show_default=True, help="The rare word that means this person."
)
@click.option(
    "--prompt", default=PersonalizeConfig.prompt, show_default=True, help="What calls the person up; [V] is the token."
)
def command(theta: Path, base: str, out: Path | None, token: str, prompt: str) -> None:
    """Write LiDB weights (a theta file of 53 KB) as a LoRA that every reader loads.

    \b
    hdb export me-theta.safetensors --out me.safetensors
    """
    from hypernet.personalize import check_request, export_theta

    out = out or theta.with_name(theta.stem + "-lora.safetensors")
    trigger = PersonalizeConfig(token=token, prompt=prompt).trigger
    check_request([], out, from_theta=theta)
    opened = open_base(base, device="cpu", precision="fp32")
    for file in export_theta(theta, opened.model, out, trigger):
        click.echo(f"wrote {file}")
