"""Progress bars with time left, on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from hypernet.recipe import StageProgress

ReadLoss = Callable[[str], float | None]
"""The loss of a stage so far; None where there is none."""

if TYPE_CHECKING:
    from hypernet.watching import StepReport

_LINE_EVERY_S = 20.0  # between the lines of a log
_LOSS_EVERY_S = 1.0  # between looks at a fit's loss, each of which waits for the device
_SPEED_OVER_S = 300.0  # rich's own 30 s are less than some steps take


class LastLoss:
    """The loss of a running fit; call it with every `StepReport`, on the fit's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._looked, self._losses = clock, None, {}

    def __call__(self, report: "StepReport") -> None:
        now = self._clock()
        if self._looked is None or now - self._looked >= _LOSS_EVERY_S or report.step == report.steps:
            self._looked, self._losses[report.stage] = now, report.loss

    def read(self, stage: str) -> float | None:
        """The most recent loss of a stage; None if there is none."""
        return self._losses.get(stage)


def report_lines(clock: Callable[[], float] = time.monotonic, read_loss: ReadLoss | None = None) -> StageProgress:
    """Return a callback that prints a line every so often: steps, loss, time and time left.

    Args:
        read_loss: called when a line is due.
    """
    began: dict[str, tuple[float, int]] = {}
    told: dict[str, float] = {}

    def report(stage: str, done: int, total: int | None) -> None:
        now = clock()
        start, first = began.setdefault(stage, (now, done))
        is_due = now - told.get(stage, start) >= _LINE_EVERY_S
        if not is_due and not (done == total and stage in told):
            return
        told[stage] = now
        left = (
            ""
            if total is None or done == first
            else f", {_as_time((now - start) * (total - done) / (done - first))} left"
        )
        of = "" if total is None else f" of {total}"
        loss = None if read_loss is None else read_loss(stage)
        at = "" if loss is None else f", loss {loss:.4f},"
        click.echo(f"{stage}: {done}{of}{at} in {_as_time(now - start)}{left}", err=True)

    return report


def _as_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


@contextmanager
def progress_bars(per_hour: str = "", read_loss: ReadLoss | None = None) -> Iterator[StageProgress]:
    """Yield a callback ``(stage, done, total)`` that shows one bar per stage; without a terminal, lines now and then.

    Args:
        per_hour: what is counted, to show how many are done per hour.
        read_loss: as for `report_lines`; also shown beside the bars, and called from another thread.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class PerHourColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = f"{3600 * task.speed:,.0f} {per_hour}/h" if task.speed else ""
            return Text(speed, no_wrap=True)

    class LossColumn(ProgressColumn):
        max_refresh = _LOSS_EVERY_S

        def __init__(self) -> None:
            super().__init__()
            self._known: dict[int, str] = {}

        def render(self, task: Task) -> Text:
            loss = read_loss(task.description)
            if loss is not None:
                self._known[task.id] = f"loss {loss:.4f}"
            return Text(self._known.get(task.id, ""), no_wrap=True)

    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(), *([PerHourColumn()] if per_hour else []),
               *([LossColumn()] if read_loss else []))  # fmt: skip
    console = Console(stderr=True)
    # In a log, under nohup and in a container bars are printed at the end only.
    also = (lambda *_: None) if console.is_terminal else report_lines(read_loss=read_loss)
    with Progress(*columns, console=console, speed_estimate_period=_SPEED_OVER_S) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, completed=done)  # what was there says no speed
            bars.update(tasks[stage], completed=done)
            also(stage, done, total)

        yield report
