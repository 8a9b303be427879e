"""Progress bars with time left, on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager

from hypernet.recipe import StageProgress

_SPEED_OVER_S = 300.0  # rich's own 30 s are less than some steps take


@contextmanager
def progress_bars(per_hour: str = "") -> Iterator[StageProgress]:
    """Yield a callback ``(stage, done, total)`` that shows one bar per stage.

    Args:
        per_hour: name of what is done, to show how many of it an hour.
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

    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(), *([PerHourColumn()] if per_hour else []))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=_SPEED_OVER_S) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, completed=done)  # what was there says no speed
            bars.update(tasks[stage], completed=done)

        yield report
