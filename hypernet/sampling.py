"""Pictures from a base model, plain or with somebody's weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from converters import FileDescription, describe
from converters.layer import is_finite
from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import as_base
from hypernet.bundles import find_bundle
from hypernet.infotext import PNG_KEY
from hypernet.quiet import silent_diffusers
from hypernet.recipe import Progress
from hypernet.samplers import make_sampler
from lidb_peft import LiDBConfig, LiDBSpace, LoraFactors
from lidb_peft.families import FAMILIES, get_family
from lidb_peft.files import atomic_path
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
    seed: int | Sequence[int] = 0,
    num_steps: int = 30,
    guidance: float | None = None,
    progress: Progress | None = None,
    lora: str | Path | None = None,
    weight: float = 1.0,
    negative: str = "",
    size: tuple[int, int] | None = None,
    sampler: str | None = None,
    clip_skip: int = 1,
) -> list[Image.Image]:
    """Draw one picture per prompt, all from the same starting noise unless there is a seed for each.

    Args:
        base: a loaded base model, or what `load_base` loads.
        factors: every layer's ``lora_A`` ``(r, in)`` and ``lora_B`` ``(out, r)``; None draws with the base as it is.
        space: of the factors' layers; by default the attention projections of the models that they name.
        seed: starting noise, drawn on the CPU, so that every device draws the same; one for all, or one per prompt.
        guidance: scale of classifier-free guidance; None is the base's own.
        lora: a LoRA file of any author to draw with.
        weight: strength of ``lora`` or ``factors``.
        negative: negative prompt.
        size: width and height in pixels; None is the base's own.
        sampler: one of `hypernet.samplers.SAMPLERS`, by Automatic1111's names; None is the base's own.
        clip_skip: CLIP layer to use, counted from the last, which is 1.

    Raises:
        ValueError: there are no prompts, or not as many seeds as prompts; ``factors`` or ``lora`` do not fit the base;
            the base does not support an option; or a picture holds NaN or infinity.
    """
    prompts, seeds = _with_seeds(prompts, seed)
    base = as_base(base)
    if factors is not None and space is None:
        components = {name.partition(".")[0] for name in factors}
        space = LiDBSpace({name: model for name, model in base.adapted.items() if name in components}, LiDBConfig())
    if factors is not None and weight != 1:
        factors = {name: (lora_A, weight * lora_B) for name, (lora_A, lora_B) in factors.items()}
    guidance = own_guidance(base) if guidance is None else guidance
    pipeline = base.pipeline()
    pipeline.scheduler = make_sampler(base.scheduler, sampler)
    width, height = own_size(base) if size is None else check_size(pipeline, size)
    parts = [slice(first, first + _AT_ONCE) for first in range(0, len(prompts), _AT_ONCE)]
    count = _step_counter(progress, len(parts))
    pictures = []
    with (
        nullcontext() if lora is None else lora_applied(base, lora, weight),
        nullcontext() if factors is None or space is None else space.apply(factors),
    ):
        for part in parts:
            drawn = pipeline(
                **base.pipeline_inputs(prompts[part], guidance, negative, clip_skip),
                num_inference_steps=num_steps,
                height=height,
                width=width,
                generator=[torch.Generator().manual_seed(one) for one in seeds[part]],
                callback_on_step_end=count,
                output_type="np",
            ).images
            _check_finite(base, drawn)
            pictures += pipeline.image_processor.numpy_to_pil(drawn)
    return pictures


def _with_seeds(prompts: str | Sequence[str], seed: int | Sequence[int]) -> tuple[list[str], list[int]]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("there is no prompt; pass at least one")
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"there are {len(seeds)} seeds for {len(prompts)} prompts; pass one for each, or one for all")
    return prompts, seeds


def _step_counter(progress: Progress | None, num_parts: int) -> Callable[..., dict[str, Any]]:
    """A callback for a pipeline's steps, which reports them over all its calls."""
    done = 0

    def count(pipeline: "DiffusionPipeline", step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, num_parts * pipeline.num_timesteps)  # some schedulers take a step more than asked for
        return tensors

    return count


def _check_finite(base: BaseModel, drawn: np.ndarray) -> None:
    """Raise ValueError if there is NaN or infinity, which a picture would show as black."""
    if np.isfinite(drawn).all():
        return
    reason = "the base is damaged, or the LoRA is too strong: draw without it to see which"
    if base.dtype == torch.float16:
        reason = "half precision cannot hold its numbers: pass --precision fp32"
    raise ValueError(f"what {base.name} draws is not finite; {reason}")


def own_guidance(base: BaseModel) -> float:
    """The guidance scale that a base is drawn with unless somebody asks for another."""
    bundled = find_bundle(base.name).recipe.guidance
    return base.guidance if bundled is None else bundled


def own_size(base: BaseModel) -> tuple[int, int]:
    """Width and height in pixels of what a base draws."""
    return base.size_px, base.size_px


def check_size(pipeline: "DiffusionPipeline", size: tuple[int, int]) -> tuple[int, int]:
    """Raise ValueError unless pictures of ``size``, width and height in pixels, can be drawn."""
    multiple = max(8, pipeline.image_processor.config.vae_scale_factor)  # diffusers asks for 8 of everybody
    if any(side < multiple or side % multiple for side in size):
        raise ValueError(f"the size is {size[0]}x{size[1]}; choose multiples of {multiple}, at least {multiple}")
    return size


def to_image(pixels: Tensor) -> Image.Image:
    """A picture of ``pixels`` ``(3, h, w)``; what is outside of [-1, 1] is cut off."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def save_picture(picture: Image.Image, path: str | Path, infotext: str = "") -> None:
    """Write a PNG, whole or not at all, with what it was drawn with in it, if that is known."""
    told = PngInfo()
    if infotext:
        told.add_itxt(PNG_KEY, infotext)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=told)


@contextmanager
def lora_applied(base: BaseModel, lora: str | Path, weight: float = 1.0) -> Iterator[None]:
    """Put a LoRA file of any author on the base for a block, by diffusers' own reader.

    Raises:
        ValueError: the file is damaged, no LoRA, holds NaN, or is made for another base.
    """
    description = check_lora(lora)
    ours = get_family(base.family).a1111_version
    if description.base != ours and description.base in {family.a1111_version for family in FAMILIES.values()}:
        raise ValueError(f"{lora} is made for {description.base} and {base.name} is {ours}")
    pipeline = base.pipeline()
    try:
        with silent_diffusers():
            path = Path(description.path)
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="lora")
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


def check_lora(lora: str | Path) -> FileDescription:
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
