"""Readers and factors for the converters' tests; the reader shares no code with the one under test."""

import importlib.util
import json
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SDXL_CONFIG = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}

# FLUX.1-dev's transformer/config.json, as black-forest-labs published it.
FLUX_CONFIG = {
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}


def _clip(kind, num_layers, width):
    return kind(
        CLIPTextConfig(hidden_size=width, intermediate_size=8, num_hidden_layers=num_layers, num_attention_heads=8)
    )


_MODELS = {
    "sd1": lambda: {
        "unet": UNet2DConditionModel(cross_attention_dim=768),
        "text_encoder": _clip(CLIPTextModel, 12, 768),
    },
    "sd2": lambda: {
        "unet": UNet2DConditionModel(cross_attention_dim=1024, use_linear_projection=True),
        "text_encoder": _clip(CLIPTextModel, 23, 1024),
    },
    "sdxl": lambda: {
        "unet": UNet2DConditionModel(**SDXL_CONFIG),
        "text_encoder": _clip(CLIPTextModel, 12, 768),
        "text_encoder_2": _clip(CLIPTextModelWithProjection, 32, 1280),
    },
    "flux1": lambda: {
        "transformer": FluxTransformer2DModel(**FLUX_CONFIG),
        "text_encoder": _clip(CLIPTextModel, 12, 768),
    },
}
_ENDS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    "text": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "tran": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
}


@lru_cache
def _real_models(family):
    """Component -> a model of the family at full size, on the meta device."""
    with torch.device("meta"):
        return _MODELS[family]()


def _attentions(models):
    """Component -> model, as classic layer name -> module; transformers' own naming is undone by hand."""
    found = {}
    for component, model in models.items():
        prefix = "text_model." if component.startswith("text") else ""
        for name, module in model.named_modules():
            if name.endswith(_ENDS[component[:4]]):
                found[f"{component}.{prefix}{name.removeprefix(prefix)}"] = module
    return found


def _real_layers(family):
    """Classic layer name -> (in, out) of the attention projections."""
    modules = _attentions(_real_models(family))
    return {name: (module.in_features, module.out_features) for name, module in modules.items()}


@pytest.fixture(scope="session")
def attentions():
    return _attentions


@pytest.fixture(scope="session")
def real_models():
    return _real_models


@pytest.fixture(scope="session")
def real_layers():
    return _real_layers


def _read_raw(path):
    """Return ({tensor name: float64 array}, metadata) of a safetensors file, by json, struct and numpy alone."""
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        data = blob[8 + length + start : 8 + length + end]
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            array = np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"]).astype(np.float64)
    return arrays, metadata


def _raw_deltas(path):
    """Return {kohya name: delta W} as kohya computes it, alpha / rank * up @ down, in float64."""
    arrays, _ = _read_raw(path)
    deltas = {}
    for name in (key.removesuffix(".lora_down.weight") for key in arrays if key.endswith(".lora_down.weight")):
        down, up = arrays[f"{name}.lora_down.weight"], arrays[f"{name}.lora_up.weight"]
        deltas[name] = arrays[f"{name}.alpha"] / len(down) * (up @ down)
    assert len(arrays) == 3 * len(deltas)
    return deltas


@pytest.fixture(scope="session")
def read_raw():
    return _read_raw


@pytest.fixture(scope="session")
def raw_deltas():
    return _raw_deltas


@pytest.fixture(scope="session")
def random_factors():
    """A function: {layer: (in, out)} -> LoRA factors whose two sides are of very different size."""

    def make(shapes, rank=3, seed=0, down_scale=0.2, up_scale=1e-3):
        generator = torch.Generator().manual_seed(seed)
        return {
            layer: (
                down_scale * torch.randn(rank, width_in, generator=generator),
                up_scale * torch.randn(width_out, rank, generator=generator),
            )
            for layer, (width_in, width_out) in shapes.items()
        }

    return make


@pytest.fixture(scope="session")
def sd1_shapes():
    """Layers of a Stable Diffusion 1 of tiny width: enough to cover self-, cross- and CLIP attention."""
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    clip = "text_encoder.text_model.encoder.layers.0.self_attn"
    return {
        f"{block}.attn1.to_q": (32, 32),
        f"{block}.attn2.to_k": (768, 32),
        f"{block}.attn2.to_out.0": (32, 32),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v": (64, 64),
        f"{clip}.q_proj": (768, 768),
        f"{clip}.out_proj": (768, 768),
    }


@pytest.fixture(scope="session")
def readers():
    """The module ``readers.py``; in importlib mode it is not on the path."""
    spec = importlib.util.spec_from_file_location("readers", Path(__file__).with_name("readers.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
