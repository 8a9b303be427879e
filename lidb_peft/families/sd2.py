"""Stable Diffusion 2.x: the UNet of 1.x with OpenCLIP's text encoder."""

from dataclasses import replace

from . import clip, unet
from .family import Mark, Version
from .sd1 import CROSS_KEY, SD1

_UNET, _TEXT_ENCODER = SD1.components

SD2 = replace(
    SD1,
    name="sd2",
    title="Stable Diffusion 2",
    a1111_version="SD2",
    components=(
        replace(
            _UNET,
            shapes=unet.attention_shapes((320, 640, 1280, 1280), (1, 1, 1, 0), 1024),
            convolutions=unet.CONVOLUTIONS,
            kohya_convolutions=unet.PROJECTIONS,
            config={"cross_attention_dim": 1024},
            num_heads=0,
        ),
        replace(
            _TEXT_ENCODER,
            shapes=clip.attention_shapes(23, 1024),
            path_prefixes=clip.path_prefixes("clip_h"),
            stacked=clip.OPENCLIP,
            checkpoint_prefixes=("cond_stage_model.model.",),
            **clip.OPENCLIP_SETTINGS,
        ),
    ),
    versions=(
        Version("epsilon", "sd_v2", "stable-diffusion-v2-512", 512),
        Version("v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v", 768),
    ),
    metadata={"ss_v2": "True"},
    marks=(
        Mark(CROSS_KEY, "unet", 1024),
        Mark("q_proj", "text_encoder", 1024, is_certain=False),
    ),
    stated_by={"ss_base_model_version": "sd_v2", "ss_v2": "True", "modelspec.architecture": "stable-diffusion-v2"},
    checkpoint_markers={"input_blocks.1.1.proj_in.weight": 2, "input_blocks.11.0.in_layers.2.weight": 4},
    scheduler=(
        "DDIMScheduler",
        {**unet.NOISE_SCHEDULE, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    ),
)
