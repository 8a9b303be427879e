"""The loss of a fit as a picture."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_SIZE_PX, _LEFT, _TOP, _RIGHT, _BOTTOM = (640, 360), 64, 40, 16, 44
_RECENT = 10  # steps that the line is the mean of; the loss of one tells little, for it depends on its timestep
_TICKS = 5
_PALE, _STRONG, _GRID = "#b8c4d6", "#1f4e9c", "#e4e4e4"


def loss_curve(losses: Mapping[str, Tensor]) -> Image.Image:
    """Draw the losses of the stages of a fit, one after the other.

    Args:
        losses: of each step, ``(steps, people)``, by stage, as a result's ``losses``; people are averaged.

    Raises:
        ValueError: there is no step in them.
    """
    stages = {name: values.float().mean(dim=1).tolist() for name, values in losses.items() if len(values)}
    if not stages:
        raise ValueError("there is no loss to draw; nothing was fitted")
    means = {name: _running_mean(values) for name, values in stages.items()}
    finite = [value for values in stages.values() for value in values if math.isfinite(value)] or [0.0]
    num_steps = sum(map(len, stages.values()))
    low, high = min(finite), max(finite)
    margin = (high - low) / 20 or 0.05
    low, high = max(0.0, low - margin), high + margin
    picture = Image.new("RGB", _SIZE_PX, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    width, height = _SIZE_PX[0] - _LEFT - _RIGHT, _SIZE_PX[1] - _TOP - _BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - 1) / max(1, num_steps - 1)
        return _LEFT + width * across, _TOP + height * (high - value) / (high - low)

    for tick in range(_TICKS):
        value = low + (high - low) * tick / (_TICKS - 1)
        y = place(1, value)[1]
        pen.line([(_LEFT, y), (_LEFT + width, y)], fill=_GRID)
        pen.text((_LEFT - 8, y), f"{value:.3f}", fill="black", font=font, anchor="rm")
    for step in sorted({max(1, round(num_steps * tick / (_TICKS - 1))) for tick in range(_TICKS)}):
        pen.text((place(step, low)[0], _TOP + height + 8), str(step), fill="black", font=font, anchor="mt")
    what = f"step; the line is the mean of the last {_RECENT} losses"
    pen.text((_LEFT + width // 2, _SIZE_PX[1] - 6), what, fill="black", font=font, anchor="mb")
    first = 1
    for name, values in stages.items():
        if first > 1:
            x = place(first - 0.5, low)[0]
            pen.line([(x, _TOP), (x, _TOP + height)], fill="gray")
        line = [place(first + number, value) for number, value in enumerate(means[name]) if math.isfinite(value)]
        for number, value in enumerate(values):
            if math.isfinite(value):
                x, y = place(first + number, value)
                pen.ellipse([x - 1.5, y - 1.5, x + 1.5, y + 1.5], fill=_PALE)
        pen.line(line, fill=_STRONG, width=2, joint="curve")
        label = f"{name}: {means[name][-1]:.3f} at the end"
        place_of_label = (place(first, high)[0] + 4, _TOP - 6)
        pen.text(place_of_label, label, fill="black", font=font, anchor="lb")
        first += len(values)
    return picture


def _running_mean(values: Sequence[float]) -> list[float]:
    parts = (values[max(0, number + 1 - _RECENT) : number + 1] for number in range(len(values)))
    return [sum(part) / len(part) for part in parts]
