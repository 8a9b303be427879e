"""Pictures from a base model, plain or with somebody's weights, and labelled sheets of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from converters import FileDescription, describe
from converters.lora import is_finite
from hypernet.bases.base import BaseModel
from hypernet.bases.loading import as_base
from hypernet.bundles import find_bundle
from hypernet.prompts import warn_of_prompts
from hypernet.recipe import Progress
from lidb_peft import LiDBConfig, LiDBSpace, LoraFactors
from lidb_peft.families import FAMILIES, get_family
from lidb_peft.files import atomic_path
from lidb_peft.outputs import check_output
from lidb_peft.safe_read import iter_tensors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_AT_ONCE = 4  # prompts; with guidance twice as many noisy latents


@torch.no_grad()
def generate(
    base: BaseModel | str | Path,
    prompts: str | Sequence[str],
    space: LiDBSpace | None = None,
    factors: LoraFactors | None = None,
    seed: int = 0,
    num_steps: int = 30,
    guidance: float | None = None,
    progress: Progress | None = None,
    lora: str | Path | None = None,
    weight: float = 1.0,
) -> list[Image.Image]:
    """Draw one picture per prompt, all from the same starting noise.

    Args:
        base: a loaded base model, or what `load_base` loads.
        factors: every layer's ``lora_A`` ``(r, in)`` and ``lora_B`` ``(out, r)``; None draws with the base as it is.
        space: of the factors' layers; by default the attention projections of the models that they name.
        seed: starting noise, drawn on the CPU, so that every device draws the same.
        guidance: of classifier-free guidance; None is the base's own.
        lora: a LoRA file of any author to draw with, ``weight`` times.

    Raises:
        ValueError: there are no prompts, or ``factors`` or ``lora`` do not fit the base; or a picture holds NaN or
            infinity.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("there is no prompt; pass at least one")
    base = as_base(base)
    if factors is not None and space is None:
        components = {name.partition(".")[0] for name in factors}
        space = LiDBSpace({name: model for name, model in base.adapted.items() if name in components}, LiDBConfig())
    if guidance is None:
        bundled = find_bundle(base.name).recipe.guidance
        guidance = base.guidance if bundled is None else bundled
    pipeline, steps_done = base.pipeline(), 0

    def count(pipeline, step, timestep, tensors):
        nonlocal steps_done
        steps_done += 1
        if progress is not None:
            progress(steps_done, len(parts) * pipeline.num_timesteps)  # some schedulers take a step more than asked for
        return tensors

    parts = [prompts[first : first + _AT_ONCE] for first in range(0, len(prompts), _AT_ONCE)]
    pictures = []
    with (
        nullcontext() if lora is None else lora_applied(base, lora, weight),
        nullcontext() if factors is None else space.apply(factors),
    ):
        for part in parts:
            drawn = pipeline(
                **base.pipeline_inputs(part, guidance),
                num_inference_steps=num_steps,
                height=base.size_px,
                width=base.size_px,
                generator=[torch.Generator().manual_seed(seed) for _ in part],
                callback_on_step_end=count,
                output_type="np",
            ).images
            if not np.isfinite(drawn).all():  # which a picture has as black
                reason = (
                    "half precision cannot hold its numbers: pass --precision fp32"
                    if base.dtype == torch.float16
                    else ("the base is damaged, or the LoRA is too strong: draw without it to see which")
                )
                raise ValueError(f"what {base.name} draws is not finite; {reason}")
            pictures += pipeline.image_processor.numpy_to_pil(drawn)
    return pictures


def generate_to_file(
    base: BaseModel,
    prompts: Sequence[str],
    out: str | Path,
    lora: str | Path | None = None,
    weight: float = 1.0,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options,
) -> None:
    """Draw prompts, with a LoRA file of any author if given, and write one picture, or a sheet of several.

    Args:
        overwrite: a file ``out`` may be replaced.
        options: of `generate`.

    Raises:
        ValueError, OSError: as `check_pictures`, or `lora_applied` refuses the LoRA.
    """
    check_pictures(out, base.name, lora, overwrite)
    warn_of_prompts(base, prompts)
    pictures = generate(base, prompts, progress=progress, lora=lora, weight=weight, **options)
    label = "base" if lora is None else Path(lora).stem
    sheet = pictures[0] if len(pictures) == 1 else contact_sheet([(label, pictures)], prompts)
    save_picture(sheet, out)


def to_image(pixels: Tensor) -> Image.Image:
    """A picture of ``pixels`` ``(3, h, w)``; what is outside of [-1, 1] is cut off."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def check_pictures(out: str | Path, base: str = "", lora: str | Path | None = None, overwrite: bool = False) -> None:
    """Raise ValueError or OSError now if pictures cannot be written to ``out`` or ``lora`` is no usable LoRA.

    Args:
        base: the base model's name, which is not to be written over.
    """
    check_output(out, [base, lora], ".png", overwrite)
    if lora is not None:
        _check_lora(lora)


@contextmanager
def lora_applied(base: BaseModel, lora: str | Path, weight: float = 1.0) -> Iterator[None]:
    """Put a LoRA file of any author on the base for a block, by diffusers' own reader.

    Raises:
        ValueError: the file is damaged, no LoRA, holds NaN, or is made for another base.
    """
    description = _check_lora(lora)
    ours = get_family(base.family).a1111_version
    if description.base != ours and description.base in {family.a1111_version for family in FAMILIES.values()}:
        raise ValueError(f"{lora} is made for {description.base} and {base.name} is {ours}")
    pipeline = base.pipeline()
    try:
        _load_quietly(pipeline, Path(description.path))
        if not any("lora" in names for names in pipeline.get_list_adapters().values()):
            raise ValueError("none of its layers is there")
        pipeline.set_adapters(["lora"], [weight])
    except (ValueError, RuntimeError, AssertionError) as error:  # the last, of fused layers
        pipeline.unload_lora_weights()
        raise ValueError(
            f"{lora} does not fit {base.name}: its layers have other names or widths; draw with the base it is made for"
        ) from error
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


def _load_quietly(pipeline: "DiffusionPipeline", path: Path) -> None:
    """Load the adapter ``lora``; diffusers would log a line for each of hundreds of layers that do not fit."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora")
    finally:
        logging.set_verbosity(verbosity)


def _check_lora(lora: str | Path) -> FileDescription:
    """Refuse what diffusers would load wrongly or without a word."""
    description = describe(lora)
    if description.kind == "LiDB theta":
        raise ValueError(f"{lora} holds LiDB weights, not a LoRA; make one of them with hdb convert")
    if not description.kind.endswith((" LoRA", " DoRA")):
        raise ValueError(f"{lora} is a {description.kind}; only a LoRA can be drawn with")
    bad = [name for name, tensor in iter_tensors(description.path) if not is_finite(tensor)]
    if bad:
        raise ValueError(f"{lora} holds NaN or infinity in {len(bad)} tensors, e.g. {bad[0]}; it draws nothing")
    return description


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], column_labels: Sequence[str]) -> Image.Image:
    """Lay pictures out in labelled rows and columns; small pictures are enlarged without smoothing."""
    cell_px = max(192, *(picture.width for _, pictures in rows for picture in pictures))
    font, line_px, margin, left = ImageFont.load_default(size=15), 18, 8, 150
    labels = [_wrap(label, font, cell_px) for label in column_labels]
    top_px = margin + line_px * max(label.count("\n") + 1 for label in labels)
    columns = max(len(pictures) for _, pictures in rows)
    size = (left + columns * (cell_px + margin) + margin, top_px + len(rows) * (cell_px + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        centre = left + margin + column * (cell_px + margin) + cell_px // 2
        place = (centre, (top_px + margin) // 2)
        pen.multiline_text(place, label, fill="black", font=font, anchor="mm", align="center")
    for row, (label, pictures) in enumerate(rows):
        top = top_px + margin + row * (cell_px + margin)
        pen.multiline_text((left - 6, top + cell_px // 2), label, fill="black", font=font, anchor="rm", align="right")
        for column, picture in enumerate(pictures):
            method = Image.Resampling.NEAREST if picture.width < cell_px // 2 else Image.Resampling.LANCZOS
            place = (left + margin + column * (cell_px + margin), top)
            sheet.paste(picture.convert("RGB").resize((cell_px, cell_px), method), place)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """Break text into lines of at most ``width_px``."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width_px or not lines[-1] else [lines[-1], word]
    return "\n".join(lines)
