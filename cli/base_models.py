"""Options that commands share."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import click

from cli.options import config_options, field_option
from hypernet.base_models.config import BaseConfig
from hypernet.recipe import PersonalizeConfig
from testbed import MINIATURE_RECIPE

base_option = field_option(BaseConfig, "base")
device_option = field_option(BaseConfig, "device")
precision_option = field_option(BaseConfig, "precision")
components_option = field_option(BaseConfig, "components")
prediction_option = field_option(BaseConfig, "prediction")
quantize_option = field_option(BaseConfig, "quantize")
seed_option = field_option(PersonalizeConfig, "seed")
base_options = config_options(BaseConfig, [field.name for field in fields(BaseConfig)])
"""All fields of `BaseConfig`; `pop_base` takes their values out of a command's arguments."""


def pop_base(arguments: dict[str, Any]) -> BaseConfig:
    """Take what `base_options` gave out of ``arguments``."""
    return BaseConfig(**{field.name: arguments.pop(field.name) for field in fields(BaseConfig)})


hypernet_option = click.option(
    "--hypernet",
    metavar="ID|DIR|testbed|none",
    show_default="none; testbed has its own",
    help="Start from what this hypernetwork predicts from the photos: a Hugging Face id, a folder that hdb train "
    "wrote, or testbed, the bundled one; none uses no hypernetwork.",
)

start_option = click.option(
    "--start",
    metavar="auto|none|FILE",
    default="auto",
    show_default=True,
    help="A LoRA that the finetuning starts from, as hdb learn-start makes it; auto: the one beside the hypernetwork, "
    "or without one beside the base, if there is one; none: a fresh LoRA.",
)


class _CountOrAuto(click.IntRange):
    name = "auto|count"

    def convert(self, value, param, ctx):
        return None if value == "auto" else super().convert(value, param, ctx)


def batch_option(text: str):
    """An option for how many people are fitted at once; ``auto`` is None."""
    return click.option("--batch-size", "batch_size", type=_CountOrAuto(1), default="auto", show_default=True,
                        help=text)  # fmt: skip


def recipe_options(only: Iterable[str], flags: Mapping[str, str] = MappingProxyType({}), own: Iterable[str] = ()):
    """A decorator that adds options of fields of `PersonalizeConfig`: None is the base's own recipe.

    Args:
        flags: of those that are not called like their field.
        own: fields of which a hypernetwork has its own.
    """

    def add(command: Callable) -> Callable:
        for name in reversed(list(only)):
            default, miniature = getattr(PersonalizeConfig, name), getattr(MINIATURE_RECIPE, name)
            shown = "" if isinstance(default, tuple) else str(default)
            shown += "" if default == miniature or not shown else f"; testbed {miniature}"
            shown += "; a hypernetwork has its own" if name in own else ""
            if isinstance(default, bool) or default is None:
                shown = {True: "on", False: "off", None: "the base's own"}[default]
            command = field_option(
                PersonalizeConfig, name, flags.get(name, "--preserve" if name == "preserved" else ""), True, shown
            )(command)
        return command

    return add


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `recipe_options` that were given."""
    return {name: value for name, value in options.items() if value not in (None, ())}
