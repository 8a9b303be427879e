"""Tiny real models: a UNet with cross-attention blocks and a CLIP text encoder."""

import pytest
import torch


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


def make_text_encoder(seed: int = 0, **changes):
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
        return CLIPTextModel(CLIPTextConfig(**(settings | changes))).eval()


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
