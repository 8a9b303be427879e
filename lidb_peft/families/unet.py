"""The UNets of Stable Diffusion: their modules by diffusers' names, and by the original authors' names (sgm)."""

from typing import Any

from . import clip
from .family import Component, Shapes

TARGETS = frozenset({"to_q", "to_k", "to_v", "to_out.0"})
_WORDS = """
    down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2 to_q
    to_k to_v to_out ff net proj proj_in proj_out norm norm1 norm2 norm3 conv conv1 conv2 conv_in conv_out
    conv_norm_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2 input_blocks
    middle_block output_blocks in_layers out_layers emb_layers skip_connection op out time_embed label_emb
"""
WORDS = frozenset(_WORDS.split())
_ATTENTION = (
    r"norm|proj_in|proj_out|transformer_blocks\.\d+\.(norm[123]|attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))"
)
_RESNET = "norm[12]|conv[12]|time_emb_proj|conv_shortcut"
_BLOCK = rf"attentions\.\d+\.({_ATTENTION})|resnets\.\d+\.({_RESNET})|(down|up)samplers\.0\.conv"
MODULES = rf"((down|up)_blocks\.\d+|mid_block)\.({_BLOCK})|conv_(in|out|norm_out)|(time|add)_embedding\.linear_[12]"
# LyCORIS's, if it is given no prefix.
OTHER_KOHYA_PREFIXES = ("lycoris_unet_", "lycoris_")
# ComfyUI's, and a checkpoint's.
PATH_PREFIXES = ("diffusion_model.", "model.diffusion_model.")
CONVOLUTIONS = {"conv": 3, "conv1": 3, "conv2": 3, "conv_in": 3, "conv_out": 3, "conv_shortcut": 1}
# Input and output projections of an attention block: linear layers in newer UNets, 1x1 convolutions in the first.
PROJECTIONS = frozenset({"proj_in", "proj_out"})
PATH = r"(^|\.)(down_blocks|mid_block|up_blocks|conv_in|conv_out)\."
BLOCK_NAMES = (
    (r"input_blocks\.(\d+)\.", "IN{:02}"),
    (r"middle_block\.", "M00"),
    (r"output_blocks\.(\d+)\.", "OUT{:02}"),
)
TRAINED = (".attentions.",)
_LAYERS_A_LEVEL = 2
# The rest of a whole Stable Diffusion checkpoint: the original authors' name of the VAE, and diffusers'.
VAE_PREFIXES = ("first_stage_model.", "vae.")
NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# (diffusers, sgm) inside a ResNet block.
_RESNET_PARTS = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


def attention_shapes(channels: tuple[int, ...], depths: tuple[int, ...], cross_width: int) -> Shapes:
    """Return the attention projections, in natural order of their names.

    Args:
        channels: width of the levels, outermost first.
        depths: transformer blocks per attention block on each level; 0 for levels without attention.
        cross_width: width of the prompt embeddings.
    """
    levels = list(enumerate(zip(channels, depths, strict=True)))
    down = [(f"down_blocks.{level}.attentions.{i}", width, depth)
            for level, (width, depth) in levels for i in range(_LAYERS_A_LEVEL)]  # fmt: skip
    up = [(f"up_blocks.{len(channels) - 1 - level}.attentions.{i}", width, depth)
          for level, (width, depth) in reversed(levels) for i in range(_LAYERS_A_LEVEL + 1)]  # fmt: skip
    # The middle block has the depth of the deepest level with attention.
    middle = ("mid_block.attentions.0", channels[-1], next(depth for depth in reversed(depths) if depth))
    shapes: dict[str, tuple[int, int]] = {}
    for path, width, depth in (*down, middle, *up):
        for block in range(depth):
            for attention, context in (("attn1", width), ("attn2", cross_width)):
                inputs = {"to_k": context, "to_out.0": width, "to_q": width, "to_v": context}
                prefix = f"{path}.transformer_blocks.{block}.{attention}"
                shapes |= {f"{prefix}.{name}": (read, width) for name, read in inputs.items()}
    return shapes


def denoiser(shapes: Shapes, cross_width: int, **own: Any) -> Component:
    """Return the component of a UNet; ``own`` holds what is specific to its family.

    Args:
        shapes: shapes of the published model, from `attention_shapes`.
        cross_width: width of the prompt embeddings, by which published models are identified.
    """
    return Component(
        name="unet", title="UNet", role="denoiser", classes=("UNet2DConditionModel",), targets=TARGETS, shapes=shapes,
        words=WORDS, path=PATH, block_names=BLOCK_NAMES, trained=TRAINED, modules=MODULES,
        kohya_prefixes=("lora_unet_", *OTHER_KOHYA_PREFIXES), path_prefixes=PATH_PREFIXES,
        checkpoint_prefixes=("model.diffusion_model.",), config={"cross_attention_dim": cross_width}, **own,
    )  # fmt: skip


def sgm_names(num_levels: int, attended: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    """Pairs (diffusers, sgm) of path prefixes that cover a UNet: 2 layers per level going down, 3 going up.

    ``attended`` are the levels with attention, the widest being 0.
    """
    resnets: list[tuple[str, str]] = [
        ("mid_block.resnets.0", "middle_block.0"),
        ("mid_block.resnets.1", "middle_block.2"),
    ]
    others = [
        ("mid_block.attentions.0", "middle_block.1"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ]
    for level in range(num_levels):
        is_last = level == num_levels - 1
        for layer in range(_LAYERS_A_LEVEL):
            sgm = f"input_blocks.{3 * level + layer + 1}"
            resnets.append((f"down_blocks.{level}.resnets.{layer}", f"{sgm}.0"))
            if level in attended:
                others.append((f"down_blocks.{level}.attentions.{layer}", f"{sgm}.1"))
        has_attention = num_levels - 1 - level in attended
        for layer in range(_LAYERS_A_LEVEL + 1):
            sgm = f"output_blocks.{3 * level + layer}"
            resnets.append((f"up_blocks.{level}.resnets.{layer}", f"{sgm}.0"))
            if has_attention:
                others.append((f"up_blocks.{level}.attentions.{layer}", f"{sgm}.1"))
        if not is_last:
            others.append((f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{3 * level + 3}.0.op"))
            upsampler = f"output_blocks.{3 * level + 2}.{1 + has_attention}.conv"
            others.append((f"up_blocks.{level}.upsamplers.0.conv", upsampler))
    parts = [(f"{ours}.{a}", f"{sgm}.{b}") for ours, sgm in resnets for a, b in _RESNET_PARTS]
    return (*others, *parts)


def block_lists(num_blocks: int, going_down: tuple[int, ...], going_up: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the blocks of the two lists of block weights: those with attentions, as given, and all."""
    chosen = ((going_down, going_up), (range(num_blocks), range(num_blocks)))
    return tuple((clip.BLOCK, *(f"IN{i:02}" for i in down), "M00", *(f"OUT{i:02}" for i in up)) for down, up in chosen)
