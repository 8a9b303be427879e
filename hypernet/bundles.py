"""Bases that ship in a package: their own recipe, LiDB dimensions and hypernetwork go with them.

A bundle is called like the package that has it, which says what it holds in its function ``bundle``.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypernet.recipe import BaselineConfig, PersonalizeConfig

if TYPE_CHECKING:
    from lidb_peft import LiDBConfig

BUNDLES = ("testbed",)


@dataclass(frozen=True)
class Bundle:
    """What goes with a base model.

    Attributes:
        base: returns the base's folder; raises FileNotFoundError if it is not there.
        hypernetwork: likewise.
        recipe: how to personalise it.
        lidb_options: of its `LiDBConfig`.
        baselines: how what we compare with is fitted on it.
        faces: returns a `hypernet.evaluation.faces.FaceNetwork` for what it draws.
        recogniser: returns a `hypernet.inputs.recognition.Recogniser` for what it draws.
    """

    base: Callable[[], Path] | None = None
    hypernetwork: Callable[[], Path] | None = None
    recipe: PersonalizeConfig = field(default_factory=PersonalizeConfig)
    lidb_options: dict[str, Any] = field(default_factory=dict)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    faces: Callable[[], Any] | None = None
    recogniser: Callable[[], Any] | None = None

    @property
    def lidb_config(self) -> "LiDBConfig":
        from lidb_peft import LiDBConfig

        return LiDBConfig(**self.lidb_options)


def find_bundle(base: str | Path) -> Bundle:
    """What goes with a base that is called like a bundle or lies in its package, else Stable Diffusion's defaults."""
    for name in BUNDLES:
        package = importlib.import_module(name)
        if str(base) == name or Path(str(package.__file__)).parent in Path(base).parents:
            return package.bundle()
    return Bundle()


def base_source(base: str | Path) -> str:
    """The id, folder or file to load; a bundle's name stands for its folder."""
    bundle = find_bundle(base) if str(base) in BUNDLES else Bundle()
    return str(base if bundle.base is None else bundle.base())


def hypernetwork_source(hypernet: str | Path, base: str | Path) -> str | None:
    """The id or folder of a hypernetwork, None for none.

    Args:
        hypernet: an id or a folder; ``none``; ``auto``, the base's own if it has one; or a bundle's name.
    """
    if str(hypernet) not in ("auto", "none", *BUNDLES):
        return str(hypernet)
    bundle = Bundle() if hypernet == "none" else find_bundle(base if hypernet == "auto" else hypernet)
    return None if bundle.hypernetwork is None else str(bundle.hypernetwork())
