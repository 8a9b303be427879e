"""FLUX.1's transformer from a file of its own, as its authors, kohya's and ComfyUI's users have it, or diffusers'."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hypernet.errors import differing_shapes
from lidb_peft.safe_read import iter_tensors

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

_PREFIX = "model.diffusion_model."
_DOUBLE = {  # inside double_blocks.N -> inside transformer_blocks.N
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
}
_SINGLE = {  # inside single_blocks.N -> inside single_transformer_blocks.N
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}
_STACKED = {  # layers that are one in the authors' file, by equal shares of its rows
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}


def load_transformer(path: Path, config_folder: Path, dtype: torch.dtype) -> "FluxTransformer2DModel":
    """Load a transformer whose config is ``config_folder``'s.

    Raises:
        ValueError: the file holds other weights than the config says.
    """
    from diffusers import FluxTransformer2DModel

    config = json.loads((config_folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    tensors = {ours: value.to(dtype) for name, tensor in iter_tensors(path) for ours, value in rename(name, tensor)}
    names = differing_shapes(tensors, transformer.state_dict())
    if names:
        raise ValueError(
            f"{len(names)} of its weights are not those of {config_folder / 'config.json'}, e.g. {names[0]}; pass "
            f"--components with the folder that the file belongs to"
        )
    transformer.load_state_dict(tensors, assign=True)
    return transformer


def rename(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """diffusers' names of a tensor of a file, and what they hold; its own names stay, other models' tensors go."""
    name = name.removeprefix(_PREFIX)
    head, _, rest = name.partition(".")
    if head in ("transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder", "time_text_embed",
                "norm_out", "proj_out"):  # fmt: skip
        yield name, tensor
        return
    if name.startswith("final_layer.adaLN_modulation.1."):
        shift, scale = tensor.chunk(2)  # which diffusers has the other way round
        yield f"norm_out.linear.{name.rpartition('.')[2]}", torch.cat([scale, shift])
        return
    if head not in ("double_blocks", "single_blocks"):
        layer, _, kind = name.rpartition(".")
        if layer in _OUTSIDE:
            yield f"{_OUTSIDE[layer]}.{kind}", tensor
        return
    number, _, path = rest.partition(".")
    block = ("single_" if head == "single_blocks" else "") + f"transformer_blocks.{number}"
    table = _SINGLE if head == "single_blocks" else _DOUBLE
    layer, _, kind = path.rpartition(".")
    if path in table:
        yield f"{block}.{table[path]}", tensor
    elif layer in table:
        yield f"{block}.{table[layer]}.{kind}", tensor
    elif layer in _STACKED:
        yield from (
            (f"{block}.{ours}.{kind}", part) for ours, part in zip(_STACKED[layer], tensor.chunk(3), strict=True)
        )
    elif layer == "linear1":  # q, k and v, and the feed-forward layer, four times as wide
        width = len(tensor) // 7
        parts = tensor.split([width, width, width, len(tensor) - 3 * width])
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        yield from ((f"{block}.{ours}.{kind}", part) for ours, part in zip(names, parts, strict=True))
