"""The families of base models: one file each; nothing outside this folder is keyed by family.

To add one, write its file and list it in ``FAMILIES``.
"""

from collections.abc import Mapping

from .family import Component, Family, Mark, Stacked, Version
from .flux1 import FLUX1
from .sd1 import SD1
from .sd2 import SD2
from .sdxl import SDXL

FAMILIES: dict[str, Family] = {family.name: family for family in (SD1, SD2, SDXL, FLUX1)}
"""Name -> family."""

TITLES = "Stable Diffusion 1, 2 or XL, or FLUX.1"
"""All of them, for messages."""

_ALL = tuple(component for family in FAMILIES.values() for component in family.components)

DENOISERS = tuple(dict.fromkeys(component.name for component in _ALL if component.role == "denoiser"))
TEXT_ENCODERS = tuple(dict.fromkeys(component.name for component in _ALL if component.role == "text encoder"))
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)
"""Names of all families' components, in the order in which spaces list them."""


def get_family(name: str) -> Family:
    """Return a family by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in FAMILIES:
        raise ValueError(f"model family is {name!r}; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def families_of_pipeline(class_name: str) -> tuple[Family, ...]:
    """Return the families that a diffusers pipeline of that class may hold; none for an unknown class."""
    return tuple(family for family in FAMILIES.values() if class_name in family.pipelines)


def family_of_pipeline(class_name: str, denoiser_config: Mapping[str, object]) -> Family:
    """Return the family of a pipeline by its class and the config of its denoiser.

    A model with a family's architecture but other widths, such as a miniature, counts as the first family's.

    Raises:
        ValueError: no family has that pipeline class.
    """
    families = families_of_pipeline(class_name)
    if not families:
        raise ValueError(f"a {class_name} is none of {TITLES}; choose a base model of one of them")
    fitting = (
        family
        for family in families
        if all(denoiser_config.get(key) == value for key, value in family.denoiser.config.items())
    )
    return next(fitting, families[0])


__all__ = [
    "COMPONENTS",
    "DENOISERS",
    "FAMILIES",
    "TEXT_ENCODERS",
    "TITLES",
    "Component",
    "Family",
    "Mark",
    "Stacked",
    "Version",
    "families_of_pipeline",
    "family_of_pipeline",
    "get_family",
]
