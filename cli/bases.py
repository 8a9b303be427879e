"""What ``--base`` names: `testbed` is the bundled miniature with its own recipe, anything else goes to `load_base`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from hypernet.recipe import PersonalizeConfig

if TYPE_CHECKING:
    from hypernet.base_models import BaseModel
    from lidb_peft import LiDBConfig

DEFAULT_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"

base_option = click.option(
    "--base",
    default=DEFAULT_BASE,
    show_default=True,
    metavar="ID|DIR|FILE|testbed",
    help="Base model: a Hugging Face id, a diffusers folder, a .safetensors checkpoint, or testbed, the miniature "
    "that ships with this package.",
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
precision_option = click.option(
    "--precision", default="auto", show_default=True, help="auto, fp32, bf16 or fp16: the base model's dtype."
)


@dataclass(frozen=True)
class Base:
    """A loaded base with the recipe and bases that go with it."""

    model: "BaseModel"
    recipe: PersonalizeConfig
    lidb_config: "LiDBConfig"


def open_base(name: str, device: str, precision: str) -> Base:
    """Load the base that ``--base`` names, and say what was chosen."""
    from cli.progress import quiet_libraries
    from hypernet.base_models import load_base
    from hypernet.devices import describe_choice
    from lidb_peft import LiDBConfig

    quiet_libraries()
    if name == "testbed":
        from testbed import MINIATURE_RECIPE, miniature_lidb_config, miniature_path

        base = Base(load_base(str(miniature_path()), device, precision), MINIATURE_RECIPE, miniature_lidb_config())
    else:
        base = Base(load_base(name, device, precision), PersonalizeConfig(), LiDBConfig())
    click.echo(f"base {name} on {describe_choice(base.model.device, base.model.dtype)}", err=True)
    return base
