"""Progress bars with time left, on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager

from hypernet.recipe import StageProgress


def quiet_libraries() -> None:
    """Silence the loading bars of diffusers and transformers; downloads keep theirs."""
    import diffusers
    import huggingface_hub
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()  # which switches off the hub's bars too
    if not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:  # the user's own choice
        huggingface_hub.utils.enable_progress_bars()


@contextmanager
def progress_bars() -> Iterator[StageProgress]:
    """Yield a callback ``(stage, done, total)`` that shows one bar per stage."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield report
