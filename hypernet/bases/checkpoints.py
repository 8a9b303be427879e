"""A base model in one file, told by the names and shapes in its header, before anything is loaded."""

from collections.abc import Collection
from pathlib import Path

from lidb_peft.families import FAMILIES, TITLES, Family
from lidb_peft.safe_read import read_header

_REFINER = "conditioner.embedders.0.model."
_SAYS_V_PREDICTION = "v_pred"  # an empty tensor by which SDXL models tell ComfyUI and Automatic1111
# A part of a tensor's name -> what a file with it seems to be; none of them can be loaded here.
_OTHERS = (
    ("joint_blocks.", "Stable Diffusion 3"),
    ("distilled_guidance_layer.", "Chroma"),
    ("double_stream_modulation", "FLUX.2"),
    ("cap_embedder.", "Lumina or Z-Image"),
    ("adaln_single.", "PixArt"),
    ("double_layers.", "AuraFlow"),
    ("txt_norm.", "Qwen-Image"),
    ("patch_embedding.", "Wan"),
    ("down_blocks.", "a UNet in diffusers' layout, without its folder"),
    ("decoder.up", "a VAE"),
    ("text_model.encoder.", "a CLIP text encoder"),
    ("encoder.block.", "a T5 text encoder"),
)


def check_checkpoint(path: Path) -> Family:
    """Check a single-file checkpoint by the names and shapes in its header; return a family that is loaded alike.

    Raises:
        ValueError: a pickle, a damaged file, a LoRA, a refiner or inpainting model, of no known family, or not whole.
    """
    if path.suffix.lower() != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; convert the checkpoint to safetensors first "
            f"(.ckpt, .pt and .bin files are pickles, which can run code, and are never read)"
        )
    tensors = read_header(path).tensors
    if any("lora_" in name or ".lora." in name for name in tensors):
        raise ValueError(f"{path} is a LoRA, not a base model; pass the checkpoint that it belongs to as --base")
    fitting = [family for family in FAMILIES.values() if marker(family, tensors) is not None]
    if not fitting:
        raise ValueError(_unknown(path, tensors))
    if any(name.startswith(_REFINER) for name in tensors):
        raise ValueError(f"{path} is an SDXL refiner, which has one text encoder only; pass an SDXL base")
    if _SAYS_V_PREDICTION in tensors:
        raise ValueError(f"{path} predicts v, which diffusers does not see in a single file; pass the model as a "
                         f"diffusers folder")  # fmt: skip
    family = max(fitting, key=lambda family: sum(has_part(tensors, prefix) for prefix in family.checkpoint_parts))
    for prefix, part in family.checkpoint_parts.items():
        if not has_part(tensors, prefix):
            raise ValueError(f"{path} has no {part}; pass a checkpoint with UNet, VAE and all text encoders")
    return family


def marker(family: Family, tensors: Collection[str]) -> str | None:
    """The tensor among ``tensors`` by which a checkpoint of that family is told; None if there is none."""
    names = [prefix + family.checkpoint_marker for prefix in ("", *family.denoiser.checkpoint_prefixes)]
    if not family.checkpoint_parts:  # a denoiser alone, which may be in diffusers' layout
        names.append(f"{next(iter(family.denoiser.shapes))}.weight")
    return next((name for name in names if name in tensors), None)


def has_part(tensors: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _unknown(path: Path, tensors: Collection[str]) -> str:
    holds = f"it holds {', '.join(sorted(tensors)[:2]) or 'no tensors'}"
    seems = next((f"it seems to be {title}" for part, title in _OTHERS if any(part in name for name in tensors)), holds)
    return f"{path} is not a Stable Diffusion checkpoint: {seems}; pass a whole model of {TITLES}"


def check_channels(source: str, channels: int, latent_channels: int) -> None:
    """Raise ValueError if the UNet takes more than the noisy latents."""
    if channels != latent_channels:
        raise ValueError(
            f"{source} has a UNet with {channels} input channels (an inpainting or depth model?); "
            f"pass the plain text-to-image model"
        )
