"""Stable Diffusion 1.5 at full size with random weights, which cost what its own do: to measure cards with."""

import copy
from typing import Any, cast

import torch

from hypernet.base_models.base import BaseModel
from hypernet.base_models.stable_diffusion import StableDiffusion

COUNTED_GB = {"step": 3.67, "step, checkpointed": 2.44}
"""Of Stable Diffusion 1.5 in bf16 with a LoRA of rank 4, the models included, as counted."""
_TOKENS = 77
_SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def random_sd15(like: BaseModel) -> StableDiffusion:
    """A UNet and text encoder of random weights, on the device and in the dtype of ``like``, with its other parts."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    text_config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=_TOKENS,
    )  # fmt: skip
    tokenizer = copy.deepcopy(cast(Any, like).tokenizer)
    tokenizer.model_max_length = _TOKENS
    with torch.random.fork_rng(), torch.device(like.device):  # the global generator is left as it is
        models = diffusers.UNet2DConditionModel(**_SD15_UNET), CLIPTextModel(text_config)
    unet, text_encoder = (model.requires_grad_(False).eval().to(like.dtype) for model in models)
    return StableDiffusion(
        name="random SD1.5", vae=like.vae, scheduler=like.scheduler, unet=unet, text_encoder=text_encoder,
        tokenizer=tokenizer,
    )  # fmt: skip
