"""Narrow Stable Diffusions of random weights, whose shapes alone are not the published ones: CLIP's tokenizer is."""

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hypernet.base_models.clip_tokenizer import clip_tokenizer

ATTENDED, PLAIN = "CrossAttn{}Block2D".format, "{}Block2D".format
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def text_config(width: int, **settings) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408, bos_token_id=49406, eos_token_id=49407, max_position_embeddings=77, hidden_size=width,
        intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=width // 64, **settings,
    )  # fmt: skip


def vae(**settings) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), down_block_types=(PLAIN("DownEncoder"),) * 4,
        up_block_types=(PLAIN("UpDecoder"),) * 4, layers_per_block=2, **settings,
    )  # fmt: skip


def seeded(make):
    """What ``make`` makes of random numbers, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def narrow_sd1() -> diffusers.StableDiffusionPipeline:
    return seeded(
        lambda: diffusers.StableDiffusionPipeline(
            unet=diffusers.UNet2DConditionModel(
                sample_size=8, block_out_channels=(32, 32, 64, 64), attention_head_dim=8, cross_attention_dim=64
            ),
            text_encoder=CLIPTextModel(text_config(64)), tokenizer=clip_tokenizer(), vae=vae(scaling_factor=0.18215),
            scheduler=diffusers.PNDMScheduler(
                **SCHEDULE, steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
    )  # fmt: skip


def narrow_sd2() -> diffusers.StableDiffusionPipeline:
    return seeded(
        lambda: diffusers.StableDiffusionPipeline(
            unet=diffusers.UNet2DConditionModel(
                sample_size=8, block_out_channels=(64, 64, 128, 128), attention_head_dim=(1, 1, 2, 2),
                cross_attention_dim=64, use_linear_projection=True,
            ),
            text_encoder=CLIPTextModel(text_config(64, hidden_act="gelu")), tokenizer=clip_tokenizer("!"),
            vae=vae(scaling_factor=0.18215),
            scheduler=diffusers.DDIMScheduler(
                **SCHEDULE, steps_offset=1, set_alpha_to_one=False, clip_sample=False, prediction_type="v_prediction"
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
    )  # fmt: skip


def narrow_sdxl() -> diffusers.StableDiffusionXLPipeline:
    return seeded(
        lambda: diffusers.StableDiffusionXLPipeline(
            unet=diffusers.UNet2DConditionModel(
                sample_size=8, block_out_channels=(64, 64, 128), attention_head_dim=(1, 1, 2),
                down_block_types=(PLAIN("Down"), ATTENDED("Down"), ATTENDED("Down")),
                up_block_types=(ATTENDED("Up"), ATTENDED("Up"), PLAIN("Up")),
                transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, cross_attention_dim=64 + 128,
                addition_embed_type="text_time", addition_time_embed_dim=16,
                projection_class_embeddings_input_dim=6 * 16 + 96,
            ),
            text_encoder=CLIPTextModel(text_config(64)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(128, projection_dim=96, hidden_act="gelu")),
            tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer("!"), vae=vae(scaling_factor=0.13025),
            scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading"),
            add_watermarker=False,
        )
    )  # fmt: skip


NARROW = {"sd1": narrow_sd1, "sd2": narrow_sd2, "sdxl": narrow_sdxl}
