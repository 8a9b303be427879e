"""Options that commands share."""

import re
from typing import Any

import click

from hypernet.bases.config import BaseConfig
from hypernet.recipe import (
    ATTENTIONS,
    AUTO,
    DEFAULT_BASE,
    FACE_DETECTORS,
    OPTIMIZERS,
    QUANTIZATIONS,
    PersonalizeConfig,
)
from testbed import MINIATURE_RECIPE


class MemorySize(click.ParamType):
    """``4GB``, ``3.5 GB``, ``800MB`` in bytes."""

    name = "size"

    def convert(self, value, param, ctx) -> int:
        if isinstance(value, int):  # bytes, from a saved config
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM])B?", str(value), flags=re.IGNORECASE)
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is not a size; write it as 4GB or 800MB", param, ctx)
        return round(float(match[1]) * {"G": 1e9, "M": 1e6}[match[2].upper()])


base_option = click.option(
    "--base",
    default=DEFAULT_BASE,
    show_default=True,
    metavar="ID|DIR|FILE|testbed",
    help="Base model: a Hugging Face id, a diffusers folder, a .safetensors checkpoint, or testbed, the miniature "
    "that ships with this package.",
)
seed_option = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Random seed."
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
precision_option = click.option(
    "--precision", default="auto", show_default=True, help="auto, fp32, bf16 or fp16: the base model's dtype."
)
components_option = click.option(
    "--components", type=click.Path(file_okay=False), metavar="DIR",
    help="Where --base is a file of FLUX.1's transformer alone: a diffusers folder with the other components.",
)  # fmt: skip
quantize_option = click.option(
    "--quantize", type=click.Choice(QUANTIZATIONS), help="Hold FLUX.1's transformer in 4 or 8 bits, by bitsandbytes."
)
_LOADING = {
    "device": device_option,
    "precision": precision_option,
    "attention": click.option(
        "--attention", default="auto", show_default=True, type=click.Choice(ATTENTIONS),
        help="Attention backend of the denoiser: sdpa, which is torch's own, or xformers; auto is sdpa.",
    ),
    "compile": click.option(
        "--compile", is_flag=True, help="Compile the denoiser at first use: minutes, for thousands of people."
    ),
    "components": components_option,
    "quantize": quantize_option,
    "train_text_encoder": click.option(
        "--train-text-encoder", is_flag=True, help="Adapt FLUX.1's CLIP too; Stable Diffusion's always is."
    ),
    "guidance_scale": click.option(
        "--guidance-scale", type=click.FloatRange(0), show_default="1",
        help="What FLUX.1 dev, which is distilled from guidance, is told while it is fitted.",
    ),
    "revision": click.option(
        "--revision", metavar="BRANCH|TAG|COMMIT", help="Of the base on the Hugging Face hub; else it follows main."
    ),
    "max_vram": click.option(
        "--max-vram", type=MemorySize(), metavar="SIZE",
        help="Limit the GPU memory that torch may use, e.g. 4GB; what CUDA itself needs comes on top.",
    ),
}  # fmt: skip


def loading_options(command):
    """Add the options of `BaseConfig`, ``--base`` aside; `pop_base` takes their values out of a command's arguments."""
    for option in reversed(_LOADING.values()):
        command = option(command)
    return command


def pop_base(arguments: dict[str, Any]) -> BaseConfig:
    """Take what `base_option` and `loading_options` gave out of ``arguments``."""
    return BaseConfig(**{name: arguments.pop(name) for name in ("base", *_LOADING)})


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

token_option = click.option(
    "--token", default=PersonalizeConfig.token, show_default=True, help="The rare word that means the person."
)
prompt_option = click.option(
    "--prompt", default=PersonalizeConfig.prompt, show_default=True, help="What the photos show; [V] is the token."
)
face_detector_option = click.option(
    "--face-detector", default="auto", show_default=True, type=click.Choice(FACE_DETECTORS),
    help="What looks for faces: YuNet, whose file (233 KB) comes from the Hugging Face hub at first use, or OpenCV 4's "
    "cascades, which miss more; auto is YuNet where it can be had.",
)  # fmt: skip
no_crop_option = click.option("--no-crop", is_flag=True, help="Do not look for faces: the images are faces already.")


class _CountOrAuto(click.IntRange):
    name = "auto|count"

    def convert(self, value, param, ctx):
        return None if value == "auto" else super().convert(value, param, ctx)


def batch_option(text: str):
    """An option for how many people are fitted at once; ``auto`` is None."""
    return click.option("--batch-size", "batch", type=_CountOrAuto(1), default="auto", show_default=True, help=text)


def recipe_option(flag: str, field: str, kind: click.ParamType | type, text: str):
    """An option for a field of `PersonalizeConfig` whose default is that of the base's own recipe."""
    default, miniature = getattr(PersonalizeConfig, field), getattr(MINIATURE_RECIPE, field)
    default = str(default) if default == miniature else f"{default}; testbed {miniature}"
    return click.option(flag, field, type=kind, default=None, help=text, show_default=default)


optimizer_option = recipe_option(
    "--optimizer", "optimizer", click.Choice(OPTIMIZERS), "adamw8bit requires bitsandbytes; auto is adamw."
)
checkpointing_option = recipe_option(
    "--gradient-checkpointing", "gradient_checkpointing", click.Choice(AUTO),
    "Use less memory but be slower; auto turns it on if a step does not fit into the GPU's memory.",
)  # fmt: skip
