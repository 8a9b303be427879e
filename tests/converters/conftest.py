"""Readers and factors for the converters' tests; the reader shares no code with the one under test."""

import json
import struct

import numpy as np
import pytest
import torch


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
