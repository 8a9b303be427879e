"""`hdb check`."""

from pathlib import Path

import click

from cli.base_models import device_option, precision_option


@click.command(name="check")
@device_option
@precision_option
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("hdb-check.json"),
              show_default=True, help="Report to write; attach it to a bug report.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an existing report.")
def command(device: str, precision: str, out: Path, overwrite: bool) -> None:
    """Check in two minutes whether everything works on your GPU, how fast it is and how much memory it uses.

    Nothing is downloaded: the bundled miniature and, if memory allows, a Stable Diffusion with random weights are
    fitted in several ways that must agree.

    \b
    hdb check
    hdb check --device cuda:1 --precision fp16
    """
    import json

    from cli.progress import progress_bars
    from hypernet.base_models.loading import load_base
    from hypernet.bundles import find_bundle
    from hypernet.check import check
    from lidb_peft.files import atomic_path
    from lidb_peft.outputs import check_output

    check_output(out, suffix=".json", overwrite=overwrite)
    base = load_base("testbed", device, precision)
    with progress_bars() as report_progress:
        report = check(
            base, find_bundle("testbed").lidb_config, lambda done, total: report_progress("check", done, total)
        )
    with atomic_path(out) as temporary:
        temporary.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    for finding in report.findings:
        click.echo(f"{finding.outcome:9}{finding.name}: {finding.detail}")
    click.echo(f"wrote {out}")
    if report.failed:
        raise click.ClickException(f"{len(report.failed)} checks failed; please open an issue with {out}")
