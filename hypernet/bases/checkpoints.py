"""A base model in one file, told by the names and shapes in its header, before anything is loaded."""

from pathlib import Path

from lidb_peft.safe_read import read_header

_CHECKPOINT_UNET = "model.diffusion_model.input_blocks.0.0.weight"
_REFINER = "conditioner.embedders.0.model."
_SAYS_V_PREDICTION = "v_pred"  # an empty tensor by which SDXL models tell ComfyUI and Automatic1111
_CHECKPOINT_PARTS = {
    "StableDiffusionPipeline": {"first_stage_model.": "VAE", "cond_stage_model.": "text encoder"},
    "StableDiffusionXLPipeline": {
        "first_stage_model.": "VAE",
        "conditioner.embedders.0.transformer.": "first text encoder",
        "conditioner.embedders.1.model.": "second text encoder",
    },
}


def check_checkpoint(path: Path) -> str:
    """Check a single-file checkpoint by the names and shapes in its header; return the class of pipeline it makes.

    Raises:
        ValueError: a pickle, a damaged file, a LoRA, a refiner or inpainting model, or no whole Stable Diffusion.
    """
    if path.suffix.lower() != ".safetensors":
        raise ValueError(
            f"{path} is not a .safetensors file; convert the checkpoint to safetensors first "
            f"(.ckpt, .pt and .bin files are pickles, which can run code, and are never read)"
        )
    tensors = read_header(path).tensors
    if any("lora_" in name or ".lora." in name for name in tensors):
        raise ValueError(f"{path} is a LoRA, not a base model; pass the checkpoint that it belongs to as --base")
    if _CHECKPOINT_UNET not in tensors:
        raise ValueError(
            f"{path} is not a Stable Diffusion checkpoint: it holds {', '.join(sorted(tensors)[:2]) or 'no tensors'}; "
            f"pass a whole SD 1.x, 2.x or SDXL model"
        )
    if any(name.startswith(_REFINER) for name in tensors):
        raise ValueError(f"{path} is an SDXL refiner, which has one text encoder only; pass an SDXL base")
    if _SAYS_V_PREDICTION in tensors:
        raise ValueError(f"{path} predicts v, which diffusers does not see in a single file; pass the model as a "
                         f"diffusers folder")  # fmt: skip
    is_xl = any(name.startswith("conditioner.") for name in tensors)
    kind = "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
    for prefix, part in _CHECKPOINT_PARTS[kind].items():
        if not any(name.startswith(prefix) for name in tensors):
            raise ValueError(f"{path} has no {part}; pass a checkpoint with UNet, VAE and all text encoders")
    check_channels(str(path), tensors[_CHECKPOINT_UNET].shape[1], 4)
    return kind


def check_channels(source: str, channels: int, latent_channels: int) -> None:
    """Raise ValueError if the UNet takes more than the noisy latents."""
    if channels != latent_channels:
        raise ValueError(
            f"{source} has a UNet with {channels} input channels (an inpainting or depth model?); "
            f"pass the plain text-to-image model"
        )
