"""Options that commands share, and what ``--base`` and ``--hypernet`` name.

`testbed` is the bundled miniature with its own recipe, and the hypernetwork of it; `load_base` and `HyperNetwork` take
anything else.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from hypernet.recipe import DEFAULT_BASE, PersonalizeConfig
from testbed import MINIATURE_RECIPE

if TYPE_CHECKING:
    from accelerate import PartialState

    from hypernet.base_models import BaseModel
    from lidb_peft import LiDBConfig

base_option = click.option(
    "--base",
    default=DEFAULT_BASE,
    show_default=True,
    metavar="ID|DIR|FILE|testbed",
    help="Base model: a Hugging Face id, a diffusers folder, a .safetensors checkpoint, or testbed, the miniature "
    "that ships with this package.",
)
seed_option = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Keys all noise."
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
precision_option = click.option(
    "--precision", default="auto", show_default=True, help="auto, fp32, bf16 or fp16: the base model's dtype."
)
hypernet_option = click.option(
    "--hypernet",
    metavar="ID|DIR|testbed|none",
    show_default="none; testbed has its own",
    help="Start at what this hypernetwork predicts from the photos: a Hugging Face id, a folder that hdb train wrote, "
    "or testbed, the bundled one; none does without.",
)

token_option = click.option(
    "--token", default=PersonalizeConfig.token, show_default=True, help="The rare word that means the person."
)
prompt_option = click.option(
    "--prompt", default=PersonalizeConfig.prompt, show_default=True, help="What the photos show; [V] is the token."
)
no_crop_option = click.option("--no-crop", is_flag=True, help="Do not look for faces: the images are faces already.")


class _CountOrAuto(click.IntRange):
    name = "auto|count"

    def convert(self, value, param, ctx):
        return None if value == "auto" else super().convert(value, param, ctx)


def batch_option(text: str):
    """An option for how many people are fitted at once; ``auto`` is None."""
    return click.option("--batch", type=_CountOrAuto(1), default="auto", show_default=True, help=text)


def recipe_option(flag: str, field: str, kind: click.ParamType | type, text: str):
    """An option for a field of `PersonalizeConfig` whose default is that of the base's own recipe."""
    default, miniature = getattr(PersonalizeConfig, field), getattr(MINIATURE_RECIPE, field)
    default = str(default) if default == miniature else f"{default}; testbed {miniature}"
    return click.option(flag, field, type=kind, default=None, help=text, show_default=default)


@dataclass(frozen=True)
class Base:
    """A loaded base and the LiDB bases that go with it."""

    model: "BaseModel"
    lidb_config: "LiDBConfig"


def base_recipe(name: str) -> PersonalizeConfig:
    """The recipe that goes with ``--base``."""
    return MINIATURE_RECIPE if name == "testbed" else PersonalizeConfig()


def base_hypernet(name: str) -> str:
    """The ``--hypernet`` that goes with ``--base``."""
    return "testbed" if name == "testbed" else "none"


def hypernet_source(name: str | None) -> str | None:
    """The id or folder that ``--hypernet`` names; None if there is to be no hypernetwork."""
    if name == "testbed":
        from testbed import miniature_hypernetwork_path

        return str(miniature_hypernetwork_path())
    return None if name == "none" else name


def open_base(name: str, device: str, precision: str) -> Base:
    """Load the base that ``--base`` names, and say what was chosen."""
    from cli.progress import quiet_libraries
    from hypernet.base_models import load_base
    from hypernet.devices import describe_choice
    from lidb_peft import LiDBConfig

    quiet_libraries()
    if name == "testbed":
        from testbed import miniature_lidb_config, miniature_path

        base = Base(load_base(str(miniature_path()), device, precision), miniature_lidb_config())
    else:
        base = Base(load_base(name, device, precision), LiDBConfig())
    click.echo(f"base {name} on {describe_choice(base.model.device, base.model.dtype)}", err=True)
    return base


def join_and_open(name: str, device: str, precision: str) -> tuple["PartialState", Base]:
    """Meet the processes that a launcher started, if one did, and `open_base` on this one's own device."""
    from hypernet.devices import choose_device, join_processes

    state = join_processes(choose_device(device))
    return state, open_base(name, device if state.num_processes == 1 else str(state.device), precision)
