"""What is wanted of a fit while it runs: intermediate LoRAs, sample pictures, its loss, to stop it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image

from hypernet.fitting.running import Observer, RunningFit


@dataclass(frozen=True)
class StepReport:
    """One step that is done.

    Attributes:
        stage: ``fit theta`` or ``finetune LoRA``.
        step, steps: done, and in all.
        pictures: the trigger prompt drawn with the weights so far, by the number of the person in the fit, if pictures
            were due.
    """

    stage: str
    step: int
    steps: int
    run: RunningFit
    pictures: Mapping[int, Image.Image] = field(default_factory=dict)

    @property
    def picture(self) -> Image.Image | None:
        """That of a fit of one person."""
        return self.pictures.get(0)

    @cached_property
    def loss(self) -> float:
        """The mean of the last ten steps; reading it waits for the device, so do not read it after every step."""
        return self.run.loss


@dataclass(frozen=True)
class Watch:
    """What is wanted of a fit while it runs.

    Attributes:
        save_every: steps between intermediate LoRAs; None keeps none.
        preview_every: steps between sample pictures; None draws none.
        on_step: called after every step.
        stop: asked after every step; True ends the fit with what there is, for example ``threading.Event().is_set``.
    """

    save_every: int | None = None
    preview_every: int | None = None
    on_step: Callable[[StepReport], None] | None = None
    stop: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        for name in ("save_every", "preview_every"):
            if (every := getattr(self, name)) is not None and every < 1:
                raise ValueError(f"{name} is {every}; expected 1 or more, or None")

    def observer(
        self,
        stage: str,
        keep: Callable[[RunningFit], None] | None = None,
        draw: Callable[[RunningFit], Mapping[int, Image.Image]] | None = None,
        save_state: Callable[[RunningFit], None] | None = None,
    ) -> Observer:
        """What to call after each step of a stage.

        Args:
            keep: takes the fit at each step whose LoRA is kept; None keeps none of this stage.
            draw: draws sample pictures; None draws none of this stage.
            save_state: takes the fit at the same steps, and where it is stopped.
        """

        def observe(run: RunningFit) -> bool:
            is_saved = _is_due(self.save_every, run)
            if keep is not None and is_saved:
                keep(run)
            pictures = draw(run) if draw is not None and _is_due(self.preview_every, run) else {}
            if self.on_step is not None:
                self.on_step(StepReport(stage, run.step, run.steps, run, pictures))
            is_stopped = run.step < run.steps and self.stop is not None and self.stop()
            if save_state is not None and (is_saved or is_stopped):
                save_state(run)
            return is_stopped

        return observe


def _is_due(every: int | None, run: RunningFit) -> bool:
    """What the last step leaves is the result, which is no intermediate one."""
    return every is not None and run.step % every == 0 and run.step < run.steps
