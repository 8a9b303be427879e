"""A base model in one file, told by the names and shapes in its header, before anything is loaded."""

from collections.abc import Mapping
from pathlib import Path

from lidb_peft.families import FAMILIES, TITLES, Family
from lidb_peft.safe_read import PICKLE_SUFFIXES, printable, read_header

Shapes = Mapping[str, tuple[int, ...]]

_WHOLE = f"pass a whole model of {TITLES}"
_WITH_BASE = "pass the base model that it goes with"
_PLAIN = "pass the plain text-to-image model"
# A part of a tensor's name -> what a file with it is, whatever else it holds, and what to do.
_NO_BASES = (
    (("lora_", ".lora.", "hada_w1", "lokr_w"), "a LoRA, not a base model; pass the checkpoint that it belongs to"),
    (("motion_modules.",), f"a motion module of AnimateDiff; {_WITH_BASE}"),
    (("ip_adapter.", "image_proj."), f"an IP-Adapter; {_WITH_BASE}"),
    (("time_stack.", "time_mixer."), f"a video model (Stable Video Diffusion); {_PLAIN}"),
    (("edm_mean", "edm_vpred."), f"a model of EDM's noise (Playground 2.5, CosXL), which is none of ours; {_WHOLE}"),
)  # fmt: skip
# Likewise, of a file that holds no denoiser of ours; none of them can be loaded here.
_OTHERS = (
    ("joint_blocks.", "Stable Diffusion 3"),
    ("distilled_guidance_layer.", "Chroma"),
    ("double_stream_modulation", "FLUX.2"),
    ("cap_embedder.", "Lumina or Z-Image"),
    ("patchify_proj.", "LTX-Video"),
    ("adaln_single.", "PixArt"),
    ("double_layers.", "AuraFlow"),
    ("txt_norm.", "Qwen-Image"),
    ("patch_embedding.", "Wan"),
    ("individual_token_refiner.", "HunyuanVideo"),
    ("clip_txt_mapper.", "Stable Cascade"),
    ("control_model.", "a ControlNet"),
    ("input_hint_block.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("body.0.in_conv.", "a T2I-Adapter"),
    ("adapter.body.", "a T2I-Adapter"),
    ("down_blocks.0.attentions.", "a UNet in diffusers' layout, without its folder"),
    ("down_blocks.1.attentions.", "a UNet in diffusers' layout, without its folder"),
    ("encoder.down_blocks.", "a VAE"),
    ("decoder.up", "a VAE"),
    ("encoder.block.", "a T5 text encoder"),
    ("vision_model.", "a CLIP with its image encoder"),
    ("text_model.encoder.", "a CLIP text encoder"),
    ("encoder.layers.", "a CLIP text encoder"),
    (".resblocks.", "a CLIP text encoder"),
    ("emb_params", "an embedding (textual inversion)"),
    ("string_to_param", "an embedding (textual inversion)"),
    ("body.0.rdb1.", "an upscaler"),
    ("upsampler.0.", "an upscaler"),
    ("input_blocks.", "a UNet of another build than theirs"),
)  # fmt: skip
_EMBEDDING_WIDTHS = (768, 1024, 1280)
# Of a UNet: its first layer, what SDXL is told beside the prompt, and what SDXL does not have.
_FIRST = "input_blocks.0.0.weight"
_IS_TOLD_MORE = "label_emb.0.0.weight"
_FOURTH_LEVEL = "input_blocks.11.0.in_layers.2.weight"
_OUTER_ATTENTION = "input_blocks.1.1.proj_in.weight"


def check_checkpoint(path: Path) -> Family:
    """Check a single-file checkpoint by the names and shapes in its header; return its family.

    Raises:
        ValueError: a pickle, a damaged file, no base model, a refiner or inpainting model, or of no known family.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ValueError(
            f"{path} is not a .safetensors file; convert the checkpoint to safetensors first "
            f"(.ckpt, .pt and .bin files are pickles, which can run code, and are never read)"
        )
    shapes = {name: info.shape for name, info in read_header(path).tensors.items()}
    for signs, what in _NO_BASES:
        if any(sign in name for name in shapes for sign in signs):
            raise ValueError(f"{path} is {what}")
    for family in FAMILIES.values():
        prefix = denoiser_prefix(family, shapes)
        if prefix is not None:
            if family.vae_prefixes:
                _check_unet(path, family, {name.removeprefix(prefix): shape for name, shape in shapes.items()})
            return family
    raise ValueError(f"{path} is not a Stable Diffusion checkpoint: {_seems(shapes)}; {_WHOLE}")


def denoiser_prefix(family: Family, shapes: Shapes) -> str | None:
    """How the denoiser's tensors begin in a checkpoint of that family; None if it is of another one."""
    markers = dict(family.checkpoint_markers)
    for prefix in (*family.denoiser.checkpoint_prefixes, ""):
        if all(len(shapes.get(prefix + name, ())) == dims for name, dims in markers.items()):
            return prefix
    # A denoiser alone may be in diffusers' layout.
    is_alone = not family.vae_prefixes and f"{next(iter(family.denoiser.shapes))}.weight" in shapes
    return "" if is_alone else None


def _check_unet(path: Path, family: Family, shapes: Shapes) -> None:
    """Raise ValueError if a UNet is told more of a picture than a plain text-to-image model is."""
    if _IS_TOLD_MORE in shapes and _FOURTH_LEVEL in shapes:
        if _OUTER_ATTENTION in shapes:
            raise ValueError(f"{path} is an unCLIP model, which draws from pictures; {_PLAIN}")
        raise ValueError(f"{path} is an SDXL refiner, which has one text encoder only; pass an SDXL base")
    if len(shapes.get(_FIRST, ())) == 4:
        check_channels(str(path), shapes[_FIRST][1], family.latent_channels)


def _seems(shapes: Shapes) -> str:
    """What a file that is no base model seems to be, or the first of what it holds."""
    for part, title in _OTHERS:
        if any(part in name for name in shapes):
            return f"it seems to be {title}"
    if shapes and all(len(shape) == 2 and shape[1] in _EMBEDDING_WIDTHS for shape in shapes.values()):
        return "it seems to be an embedding (textual inversion)"
    return f"it holds {', '.join(printable(name) for name in sorted(shapes)[:2]) or 'no tensors'}"


def check_channels(source: str, channels: int, latent_channels: int) -> None:
    """Raise ValueError if the UNet takes more than the noisy latents."""
    if channels != latent_channels:
        raise ValueError(
            f"{source} has a UNet with {channels} input channels (an inpainting or depth model?); "
            f"pass the plain text-to-image model"
        )
