"""HyperDreamBooth from Python: one call for each command of ``hdb``, imported when it is first used.

    from hypernet import personalize
    personalize("me.jpg").save("me.safetensors")

``base`` is a Hugging Face id, a folder, a file, ``testbed`` (the bundled miniature) or a loaded base model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypernet.base_models.loading import load_base
    from hypernet.comparison import evaluate
    from hypernet.data_sets import learn_start, preoptimize, train
    from hypernet.inputs.crops import find_crops
    from hypernet.inputs.prepared import prepare
    from hypernet.network.hypernetwork import HyperNetwork
    from hypernet.personalization import personalize
    from hypernet.personalization_each import personalize_each
    from hypernet.sampling import generate
    from hypernet.sheets import draw_sheet

_PLACES = {
    "HyperNetwork": "hypernet.network.hypernetwork",
    "draw_sheet": "hypernet.sheets",
    "evaluate": "hypernet.comparison",
    "find_crops": "hypernet.inputs.crops",
    "generate": "hypernet.sampling",
    "learn_start": "hypernet.data_sets",
    "load_base": "hypernet.base_models.loading",
    "personalize": "hypernet.personalization",
    "personalize_each": "hypernet.personalization_each",
    "preoptimize": "hypernet.data_sets",
    "prepare": "hypernet.inputs.prepared",
    "train": "hypernet.data_sets",
}
__all__ = [
    "HyperNetwork",
    "draw_sheet",
    "evaluate",
    "find_crops",
    "generate",
    "learn_start",
    "load_base",
    "personalize",
    "personalize_each",
    "preoptimize",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
