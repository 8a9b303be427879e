"""Pictures from a base model, plain or with somebody's weights, and labelled sheets of them."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from converters import describe
from hypernet.base_models import BaseModel
from hypernet.fit import Progress
from lidb_peft import LiDBSpace, LoraFactors
from lidb_peft.files import atomic_path, check_writable


@torch.no_grad()
def generate(
    base: BaseModel,
    prompts: Sequence[str],
    space: LiDBSpace | None = None,
    factors: LoraFactors | None = None,
    seed: int = 0,
    num_steps: int = 30,
    guidance: float = 7.5,
    negative_prompt: str = "",
    progress: Progress | None = None,
) -> list[Image.Image]:
    """Draw one picture per prompt, all from the same starting noise.

    Args:
        factors: every layer's ``lora_A`` ``(r, in)`` and ``lora_B`` ``(out, r)``, applied through ``space``;
            None draws with the base as it is.
        seed: starting noise, drawn on the CPU, so that every device draws the same.
    """
    pipeline = base.pipeline()
    steps_done = 0

    def count(pipeline, step, timestep, tensors):
        nonlocal steps_done
        steps_done += 1
        if progress is not None:
            progress(steps_done, num_steps)
        return tensors

    with space.apply(factors) if factors is not None else nullcontext():
        return pipeline(
            list(prompts),
            negative_prompt=[negative_prompt] * len(prompts),
            num_inference_steps=num_steps,
            guidance_scale=guidance,
            height=base.size_px,
            width=base.size_px,
            generator=[torch.Generator().manual_seed(seed) for _ in prompts],
            callback_on_step_end=count,
        ).images


def generate_to_file(
    base: BaseModel,
    prompts: Sequence[str],
    out: str | Path,
    lora: str | Path | None = None,
    weight: float = 1.0,
    progress: Progress | None = None,
    **options,
) -> None:
    """Draw prompts, with a LoRA file of any author if given, and write one picture, or a sheet of several.

    Args:
        lora: loaded by diffusers' own reader, in place, into the base.
        options: of `generate`.

    Raises:
        ValueError: the LoRA file is damaged, or no LoRA.
    """
    check_writable(out)
    if lora is not None:
        description = describe(lora)
        pipeline = base.pipeline()
        path = Path(description.path)
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora")
        pipeline.set_adapters(["lora"], [weight])
    pictures = generate(base, prompts, progress=progress, **options)
    label = "base" if lora is None else Path(lora).stem
    sheet = pictures[0] if len(pictures) == 1 else contact_sheet([(label, pictures)], prompts, max(base.size_px, 192))
    with atomic_path(out) as temporary:
        sheet.save(temporary, format="PNG")


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], column_labels: Sequence[str], cell_px: int = 192
) -> Image.Image:
    """Lay pictures out in labelled rows and columns; small pictures are enlarged without smoothing."""
    margin, label_px, left = 8, 26, 150
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new(
        "RGB",
        (left + columns * (cell_px + margin) + margin, label_px + len(rows) * (cell_px + margin) + margin),
        "white",
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for column, label in enumerate(column_labels):
        centre = left + margin + column * (cell_px + margin) + cell_px // 2
        pen.text((centre, label_px // 2 + 2), label, fill="black", font=font, anchor="mm")
    for row, (label, pictures) in enumerate(rows):
        top = label_px + margin + row * (cell_px + margin)
        pen.multiline_text((left - 6, top + cell_px // 2), label, fill="black", font=font, anchor="rm", align="right")
        for column, picture in enumerate(pictures):
            method = Image.Resampling.NEAREST if picture.width < cell_px // 2 else Image.Resampling.LANCZOS
            place = (left + margin + column * (cell_px + margin), top)
            sheet.paste(picture.convert("RGB").resize((cell_px, cell_px), method), place)
    return sheet
