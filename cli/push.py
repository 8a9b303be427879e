"""`hdb push`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hypernet.cards import Share

push_to_hub_option = click.option(
    "--push-to-hub", metavar="OWNER/NAME",
    help="Also upload the result to a private repository on the Hugging Face hub, with a model card; hdb push does so "
         "later.",
)  # fmt: skip


@click.command(name="push")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME", required=False)
@click.option("--base", metavar="ID", default="", help="The base model's id on the hub, for the card.")
@click.option("--license", "license_name", metavar="NAME", default="",
              help="License, by the hub's name for it, such as creativeml-openrail-m.")  # fmt: skip
@click.option("--public", is_flag=True, help="Make the repository public; it is private otherwise.")
@click.option("--consent", is_flag=True, help="Confirm that the person, or everybody it was trained on, has "
                                              "agreed; the card says so. Required by --public.")  # fmt: skip
def command(source: Path, repository: str | None, base: str, license_name: str, public: bool, consent: bool) -> None:
    """Upload a LoRA, or the folder of a hypernetwork, to the Hugging Face hub, with a model card.

    The card is written locally first: next to the LoRA as NAME.md, in the folder as README.md. An existing card is used
    unchanged, so you can edit it and push. Without OWNER/NAME nothing is uploaded. The LoRA's sidecar, preview and
    sheets are uploaded too, but no photos. Log in with hf auth login.

    \b
    hdb push me.safetensors                                    writes me.md, the card, and uploads nothing
    hdb push me.safetensors someone/me --base stable-diffusion-v1-5/stable-diffusion-v1-5
    hdb push hypernetwork/best someone/faces --consent --public --license apache-2.0
    """
    if public and not consent:
        raise click.UsageError("--public requires --consent: publish a person's likeness only with their agreement")
    from hypernet.cards import card_path, push, share, write_card

    shared = share(source, base, license_name, consent)
    card = card_path(source)
    was_there = card.exists()
    write_card(shared, card)
    click.echo(f"{'used the existing card' if was_there else 'wrote'} {card}")
    if repository is None:
        click.echo(f"would upload {', '.join(map(str, shared.files))}; name a repository, OWNER/NAME, to do so")
        return
    url = push(shared, card, repository, private=not public)
    click.echo(f"uploaded {len(shared.files) + 1} files to {url}{'' if public else '; a new repository is private'}")


def push_result(shared: "Share", source: Path, repository: str) -> None:
    """Upload what a command has just made, with its card, which is also written beside it."""
    from hypernet.cards import card_path, push, write_card

    url = push(shared, write_card(shared, card_path(source)), repository)
    click.echo(f"uploaded {source} and its card {card_path(source)} to {url}")
