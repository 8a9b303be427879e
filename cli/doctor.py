"""`hdb doctor`."""

import json

import click


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, which is what a bug report should include.")
def command(as_json: bool) -> None:
    """Show installed versions, the hardware, and what `auto` would choose and why.

    \b
    hdb doctor
    hdb doctor --json
    """
    from hypernet.doctor import report

    findings = report()
    if as_json:
        click.echo(json.dumps(dict(findings), indent=2))
        return
    for topic, finding in findings:
        click.echo(f"{topic:24}{finding}")
    click.echo("\nTo report a problem, include the output of: hdb doctor --json")
