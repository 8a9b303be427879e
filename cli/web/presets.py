"""The presets of ``hdb personalize --preset``, as the page takes them."""

from typing import Any, NamedTuple

from cli.options import PRESETS

NONE = "none"
LABELS = {
    NONE: "Usual steps",
    "portrait-fast": "A first look: half the steps",
    "portrait-best": "More to choose from: twice the steps",
    "12gb": "Graphics card with 12 GB",
    "6gb": "Graphics card with 6 GB",
}
CHOICES = [(LABELS.get(name, name), name) for name in sorted({NONE, *PRESETS}, key=[*LABELS, *PRESETS].index)]
_NUM_STEPS_KEPT = 4  # LoRAs of the way to choose among, where no preset says how many


class Preset(NamedTuple):
    """Options that go together.

    Attributes:
        recipe: fields of the recipe.
        save_every, preview_every: steps between intermediate LoRAs, and between sample pictures; None: see `every`.
        weights: of the LoRAs on the sheet.
    """

    recipe: dict[str, Any]
    save_every: int | None = None
    preview_every: int | None = None
    weights: tuple[float, ...] = (0.6, 0.8, 1.0)

    def every(self, steps: int) -> tuple[int, int]:
        """Steps between intermediate LoRAs, and between sample pictures, of a fit of so many steps."""
        save = self.save_every if self.save_every and self.save_every < steps else -(-steps // _NUM_STEPS_KEPT)
        return max(1, save), max(1, self.preview_every or save)


def read_preset(name: str | None) -> Preset:
    """The preset of this name; ``none`` leaves everything as the base has it.

    Raises:
        ValueError: there is none of this name.
    """
    if not name or name == NONE:
        return Preset({})
    if name not in PRESETS:
        raise ValueError(f"the preset is {name!r}; choose {', '.join(name for _, name in CHOICES)}")
    import yaml

    found = yaml.safe_load(PRESETS[name].read_text(encoding="utf-8"))
    weights = tuple(float(part) for part in str(found.pop("weights", "0.6,0.8,1.0")).split(","))
    return Preset(
        weights=weights, **{key: found.pop(key, None) for key in ("save_every", "preview_every")}, recipe=found
    )
