"""Write the bundled miniature's weights as a single-file checkpoint, as Automatic1111 and kohya users have them.

Names from CompVis' latent diffusion (``openaimodel.py``, ``ldm/modules/diffusionmodules/model.py``).
"""

import re

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
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name: str) -> str:
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
        return f"{stage}.{3 * block + 2}.{1 if block == 0 else 2}.{rest}"  # the first up block has no attention
    return f"{stage}.{number}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


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
    name = name.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    return name.replace("conv_norm_out", "norm_out")


def clip_name(name: str) -> str:
    return "transformer.text_model." + name.removeprefix("text_model.")


def checkpoint_tensors(base) -> dict:
    """Every tensor of a base, by its name in a checkpoint."""
    num_blocks = len(base.vae.config.block_out_channels)
    parts = [
        ("model.diffusion_model.", base.unet, unet_name),
        ("first_stage_model.", base.vae, lambda name: vae_name(name, num_blocks)),
        ("cond_stage_model.", base.text_encoder, clip_name),
    ]
    return {
        prefix + rename(name): value.contiguous()
        for prefix, model, rename in parts
        for name, value in model.state_dict().items()
    }


def write_checkpoint(base, path) -> None:
    save_file(checkpoint_tensors(base), path)
