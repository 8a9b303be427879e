"""How far a job is, as people see it: a bar and a sentence; and as programs do."""

import html
from typing import Any

from cli.web.jobs import DONE, FAILED, RUNNING, STOPPED, WAITING, Job, Jobs

_COLOURS = {DONE: "var(--hdb-good)", FAILED: "var(--hdb-bad)", STOPPED: "var(--hdb-muted)"}
NO_SUCH_RUN = "there is no such run; it may belong to an earlier start of hdb ui, whose files are kept"
HOW_TO = """<ol class="hdb-status hdb-idle">
<li>Tick the box at the top.</li>
<li>Drop one or more photos of one person, and check how they are cropped.</li>
<li>Press Start. You can close the page meanwhile, and come back to it.</li>
<li>Choose the pictures you like best, and download the LoRA that drew them.</li>
</ol>"""
HOW_TO_MANY = """<ol class="hdb-status hdb-idle">
<li>Tick the box at the top.</li>
<li>Drop a photo of each person.</li>
<li>Press Start: everybody gets a LoRA of their own, which you can download as soon as it is there.</li>
</ol>"""


HOW_TO_FILES = """<div class="hdb-status hdb-idle">Drop LoRA files of any program. Inspect shows what they hold; the
other buttons make new files of them, and leave yours as they are.</div>"""


def headline(job: Job, ahead: int = 0) -> str:
    """One line: what is being done, or what came of it."""
    if job.state == WAITING:
        return f"waiting: {ahead} before this one"
    if job.state == RUNNING:
        count = f" {job.step} of {job.steps}" if job.steps else ""
        stopping = ", stopping" if job.stop.is_set() else ""
        return f"{job.stage or 'begin'}{count}{stopping}"
    if job.state == FAILED:
        return job.error
    kept = "" if job.state == DONE else "; what there is can be downloaded" if job.results else "; nothing was made"
    return f"{job.state} in {job.seconds:.0f} s{kept}"


def as_html(job: Job | None, jobs: Jobs) -> str:
    """The status line with its bar, its loss, and the notes below it."""
    if job is None:
        return HOW_TO
    share = 100.0 if job.is_over else 100 * job.step / job.steps if job.steps else 3.0
    loss = f" · loss {job.losses[-1][1]:.3f}" if job.losses and job.state == RUNNING else ""
    line = html.escape(headline(job, jobs.ahead(job)) + loss)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in job.notes)
    colour = _COLOURS.get(job.state, "var(--hdb-accent)")
    return (
        f'<div class="hdb-status" data-state="{job.state}" role="status"><b>{html.escape(job.title)}</b> {line}'
        f'<div class="hdb-bar"><div style="width:{share:.0f}%;background:{colour}"></div></div>'
        f"{f'<ul>{notes}</ul>' if notes else ''}</div>"
    )


def outcome_table(outcomes: dict[str, str]) -> str:
    """Person -> what became of them, as a table; "" without anybody."""
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(outcome)}</td></tr>"
                   for name, outcome in outcomes.items())  # fmt: skip
    return f'<table class="hdb-people">{rows}</table>' if rows else ""


def as_json(job: Job | None, jobs: Jobs) -> dict[str, Any]:
    """The same for programs.

    Raises:
        ValueError: there is no such job.
    """
    if job is None:
        raise ValueError(NO_SUCH_RUN)
    return {
        "state": job.state,
        "says": headline(job, jobs.ahead(job)),
        "stage": job.stage,
        "step": job.step,
        "steps": job.steps,
        "losses": [[step, loss] for step, loss in job.losses],
        "notes": job.notes,
        "error": job.error,
        "steps_kept": sorted(job.results["loras"]) if isinstance(job.results.get("loras"), dict) else [],
    }


def loss_table(job: Job | None):
    """The losses as a plot takes them."""
    import pandas

    losses = [] if job is None else job.losses
    return pandas.DataFrame({"step": [step for step, _ in losses], "loss": [loss for _, loss in losses]})
