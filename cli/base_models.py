"""Options shared by commands."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import click

from cli.options import config_options, field_option
from hypernet.base_models.config import BaseConfig
from hypernet.recipe import PersonalizeConfig
from testbed import MINIATURE_RECIPE

device_option = field_option(BaseConfig, "device")
precision_option = field_option(BaseConfig, "precision")
prediction_option = field_option(BaseConfig, "prediction")
seed_option = field_option(PersonalizeConfig, "seed")
base_options = config_options(BaseConfig, [field.name for field in fields(BaseConfig)])
"""An option for each field of `BaseConfig`; `pop_base` removes their values from a command's arguments."""
drawing_base_options = config_options(
    BaseConfig,
    [field.name for field in fields(BaseConfig) if field.name not in ("train_text_encoder", "guidance_scale")],
)
"""`base_options` without those that only fits use."""


def pop_base(arguments: dict[str, Any]) -> BaseConfig:
    """Remove the values of base options from ``arguments`` and return them as a config."""
    return BaseConfig(
        **{field.name: arguments.pop(field.name) for field in fields(BaseConfig) if field.name in arguments}
    )


hypernet_option = click.option(
    "--hypernet",
    metavar="ID|DIR|testbed|none",
    show_default="none; testbed has its own",
    help="Start from the prediction of this hypernetwork: a Hugging Face id, a folder written by hdb train, "
    "or testbed, the bundled one; none uses no hypernetwork.",
)

start_option = click.option(
    "--start",
    metavar="auto|none|FILE",
    default="auto",
    show_default=True,
    help="LoRA to start the finetuning from, as made by hdb learn-start; auto: the one next to the hypernetwork, "
    "or next to the base if no hypernetwork is used, if there is one; none: start from scratch.",
)


class _CountOrAuto(click.IntRange):
    name = "auto|count"

    def convert(self, value, param, ctx):
        return None if value == "auto" else super().convert(value, param, ctx)


def batch_option(text: str):
    """The option for how many people to fit at once; ``auto`` becomes None."""
    return click.option("--batch-size", "batch_size", type=_CountOrAuto(1), default="auto", show_default=True,
                        help=text)  # fmt: skip


def recipe_options(only: Iterable[str], flags: Mapping[str, str] = MappingProxyType({}), own: Iterable[str] = ()):
    """A decorator that adds options for fields of `PersonalizeConfig`; None means the base's own recipe.

    Args:
        flags: field -> option, where the two have different names.
        own: fields for which a hypernetwork brings its own value.
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
    """Those of `recipe_options` that the user set."""
    return {name: value for name, value in options.items() if value not in (None, ())}
