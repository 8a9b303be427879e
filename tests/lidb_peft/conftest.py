"""Tiny real models: a UNet with cross-attention blocks and a CLIP text encoder."""

import pytest
import torch

from testbed import miniature_path


def make_unet(seed: int = 0, **changes):
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**(settings | changes)).eval()


def make_text_encoder(seed: int = 0, kind: type | None = None, **changes):
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "bos_token_id": 48,
        "eos_token_id": 49,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (kind or CLIPTextModel)(CLIPTextConfig(**(settings | changes))).eval()


def make_pipeline(sdxl: bool = False):
    """A Stable Diffusion, or an SDXL with two text encoders, of random weights; it draws 8 x 8 pixels."""
    import diffusers
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(miniature_path() / "tokenizer", model_max_length=8)
    words = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": len(tokenizer) - 1}
    parts = {
        "vae": diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=8),
        "text_encoder": make_text_encoder(**words),
        "tokenizer": tokenizer,
        "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    }
    if not sdxl:
        options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(unet=make_unet(), **parts, **options)
    else:
        unet = make_unet(
            cross_attention_dim=24 + 32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 16,
        )
        second = make_text_encoder(
            1, CLIPTextModelWithProjection, hidden_size=32, num_attention_heads=4, projection_dim=16, **words
        )
        pipeline = diffusers.StableDiffusionXLPipeline(
            unet=unet, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False, **parts
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def new_pipeline():
    return make_pipeline


@pytest.fixture
def new_unet():
    return make_unet


@pytest.fixture
def new_text_encoder():
    return make_text_encoder


@pytest.fixture
def batch():
    """Latents, timesteps and prompt embeddings for two samples."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([3, 700]),
        torch.randn(2, 5, 24, generator=generator),
    )
