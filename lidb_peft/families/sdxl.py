"""Stable Diffusion XL: a UNet of three levels that reads two text encoders."""

from . import clip, unet
from .family import Family, Mark, Version
from .sd1 import CROSS_KEY

SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    a1111_version="SDXL",
    components=(
        unet.denoiser(
            shapes=unet.attention_shapes((320, 640, 1280), (0, 2, 10), 2048),
            cross_width=2048,
            originals=unet.sgm_names(3, attended=(1, 2)),
            kohya_uses_originals=True,
            kohya_attribute="input_blocks",
            convolutions=unet.CONVOLUTIONS,
        ),
        clip.text_encoder(
            num_layers=12,
            width=768,
            title="first text encoder",
            kohya_prefixes=("lora_te1_", "lora_te_"),
            path_prefixes=(*clip.path_prefixes("clip_l"), "text_encoder_1."),
            checkpoint_prefixes=("conditioner.embedders.0.transformer.",),
        ),
        clip.text_encoder(
            num_layers=32,
            width=1280,
            name="text_encoder_2",
            title="second text encoder",
            classes=("CLIPTextModelWithProjection",),
            modules=f"{clip.MODULES}|{clip.PROJECTION}",
            kohya_prefixes=("lora_te2_",),
            path_prefixes=clip.path_prefixes("clip_g"),
            stacked=clip.OPENCLIP,
            transposed=((clip.PROJECTION, clip.PROJECTION),),
            checkpoint_prefixes=("conditioner.embedders.1.model.",),
            **clip.OPENCLIP_SETTINGS,
        ),
    ),
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    pipeline_options={"add_watermarker": False},
    latent_channels=4,
    vae_scale_factor=8,
    versions=(
        Version("epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", 1024),
        Version("v_prediction", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", 1024),
    ),
    implementation="https://github.com/Stability-AI/generative-models",
    metadata={"ss_v2": "False"},
    marks=(
        Mark(CROSS_KEY, "unet", 2048),
        Mark(r"encoder[._]layers[._]\d|text_projection", "text_encoder_2"),
        Mark("^lora_unet_(input_blocks|middle_block|output_blocks)_"),
        # Its first text encoder is as wide as SD1's only one.
        Mark("^lora_te1_", is_certain=False),
    ),
    stated_by={"ss_base_model_version": "sdxl_", "modelspec.architecture": "stable-diffusion-xl"},
    is_hidden_unless_stated=True,
    checkpoint_markers={"input_blocks.4.1.proj_in.weight": 2, "label_emb.0.0.weight": 2},
    vae_prefixes=unet.VAE_PREFIXES,
    scaling_factor=0.13025,
    scheduler=(
        "EulerDiscreteScheduler",
        {**unet.NOISE_SCHEDULE, "steps_offset": 1, "timestep_spacing": "leading"},
    ),
    kohya_blocks=(9, 3),
    block_lists=unet.block_lists(9, going_down=(4, 5, 7, 8), going_up=tuple(range(6))),
)
