"""`hdb doctor`."""

import click


@click.command(name="doctor")
def command() -> None:
    """Say which versions are installed, what the hardware is, and what `auto` would choose and why.

    \b
    hdb doctor
    """
    from hypernet.doctor import report

    for topic, finding in report():
        click.echo(f"{topic:24}{finding}")
