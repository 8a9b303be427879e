"""Write a base's weights as a single-file checkpoint, as Automatic1111 and kohya users have them.

Names from CompVis' latent diffusion (``openaimodel.py``, ``ldm/modules/diffusionmodules/model.py``), SDXL's from
Stability's generative-models and OpenCLIP.
"""

import re

import torch
from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


_OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm": "ln_",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet_name(name: str, is_xl: bool) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(ours + "."):
            return name.replace(ours, theirs)
    mid = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name)
    if mid:
        place = 1 if mid[1] == "attentions" else 2 * int(mid[2])
        return f"middle_block.{place}.{_inside(mid[1], mid[3])}"
    side, block, kind, index, rest = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+?)\.(\d)\.(.+)", name).groups()
    block, index = int(block), int(index)
    stage = "input_blocks" if side == "down" else "output_blocks"
    number = 3 * block + index + (side == "down")
    if kind == "downsamplers":
        return f"{stage}.{3 * block + 3}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        has_attention = is_xl or block > 0
        return f"{stage}.{3 * block + 2}.{1 + has_attention}.{rest}"
    return f"{stage}.{number}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _inside(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, _, end = rest.partition(".")
    return f"{_RESNET[layer]}.{end}"


def vae_name(name: str, num_blocks: int) -> str:
    def up_block(found):
        return f"decoder.up.{num_blocks - 1 - int(found[1])}."

    name = re.sub(r"encoder\.down_blocks\.(\d)\.", r"encoder.down.\1.", name)
    name = re.sub(r"decoder\.up_blocks\.(\d)\.", up_block, name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for ours, theirs in _VAE_ATTENTION.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    name = name.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    return name.replace("conv_norm_out", "norm_out")


def _is_vae_attention(name: str, value: torch.Tensor) -> bool:
    """Whose layers are 1x1 convolutions in the first authors' model."""
    return name.startswith(("encoder.mid_block.attentions.", "decoder.mid_block.attentions.")) and value.dim() == 2


def clip_name(name: str) -> str:
    return "transformer.text_model." + name.removeprefix("text_model.")


def openclip_tensors(state: dict) -> dict:
    """OpenCLIP stacks q, k and v, and has its projection the other way round."""
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    found = {}
    if "text_projection.weight" in state:  # which is not used by SD2
        found["text_projection"] = state.pop("text_projection.weight").T
    for name in [name for name in state if ".self_attn.q_proj." in name]:
        layer, kind = name.split(".self_attn.q_proj.")
        stacked = torch.cat([state.pop(f"{layer}.self_attn.{part}_proj.{kind}") for part in "qkv"])
        found[f"{layer}.attn.in_proj_{kind}"] = stacked
    renamed = {}
    for name, value in (found | state).items():
        for ours, theirs in _OPENCLIP.items():
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


def checkpoint_tensors(base) -> dict:
    """Every tensor of a base, by its name in a checkpoint."""
    num_blocks, is_xl = len(base.vae.config.block_out_channels), base.text_encoder_2 is not None
    clip = "conditioner.embedders.0." if is_xl else "cond_stage_model."
    parts = [
        ("model.diffusion_model.", base.unet, lambda name: unet_name(name, is_xl)),
        ("first_stage_model.", base.vae, lambda name: vae_name(name, num_blocks)),
        (clip, base.text_encoder, clip_name),
    ]
    tensors = {
        prefix + rename(name): value[:, :, None, None] if _is_vae_attention(name, value) else value
        for prefix, model, rename in parts
        for name, value in model.state_dict().items()
    }
    if is_xl:
        second = openclip_tensors(base.text_encoder_2.state_dict())
        tensors |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def write_checkpoint(base, path) -> None:
    save_file(checkpoint_tensors(base), path)
