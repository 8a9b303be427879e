"""Stable Diffusion 1.x, and what has its architecture."""

from . import clip, unet
from .family import Family, Mark, Version

CROSS_KEY = r"attn2[._](processor[._])?to_k(_lora)?$"
"""A cross-attention layer, by any name; its input width distinguishes Stable Diffusion's families."""

SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1",
    a1111_version="SD1",
    components=(
        unet.denoiser(
            shapes=unet.attention_shapes((320, 640, 1280, 1280), (1, 1, 1, 0), 768),
            cross_width=768,
            originals=unet.sgm_names(4, attended=(0, 1, 2)),
            kohya_attribute="down_blocks",
            convolutions=unet.CONVOLUTIONS | dict.fromkeys(unet.PROJECTIONS, 1),
            num_heads=8,
        ),
        clip.text_encoder(
            num_layers=12,
            width=768,
            title="text encoder",
            path_prefixes=clip.path_prefixes("clip_l"),
            # kohya silently ignores the text encoder of files with lora_te1_.
            kohya_prefixes=("lora_te_", "lora_te1_"),
            checkpoint_prefixes=("cond_stage_model.transformer.",),
        ),
    ),
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    latent_channels=4,
    vae_scale_factor=8,
    versions=(
        Version("epsilon", "sd_v1", "stable-diffusion-v1", 512),
        Version("v_prediction", "sd_v1_v", "stable-diffusion-v1", 512),
    ),
    implementation="diffusers",
    metadata={"ss_v2": "False"},
    marks=(
        Mark(CROSS_KEY, "unet", 768),
        Mark("q_proj", "text_encoder", 768, is_certain=False),
    ),
    stated_by={"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1"},
    checkpoint_markers={"input_blocks.1.1.proj_in.weight": 4, "input_blocks.11.0.in_layers.2.weight": 4},
    vae_prefixes=unet.VAE_PREFIXES,
    scaling_factor=0.18215,
    scheduler=(
        "PNDMScheduler",
        {**unet.NOISE_SCHEDULE, "steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True},
    ),
    kohya_blocks=(12, 1),
    block_lists=unet.block_lists(12, going_down=(1, 2, 4, 5, 7, 8), going_up=tuple(range(3, 12))),
)
