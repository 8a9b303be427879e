"""Names of LoRA layers: ours (classic, dotted) <-> kohya's and diffusers', both directions from the same tables.

A layer name is a component and a diffusers module path, ``unet.down_blocks.0...attn1.to_q``. kohya writes
``prefix_`` and the path with every dot an underscore, so reading one back needs the words that hold an underscore
themselves; SDXL's UNet moreover goes by the sgm names (``input_blocks_4_1_...``). diffusers' and PEFT's names are paths
like ours, except that diffusers before 0.20 named an attention's projections its own way.
"""

import re

from lidb_peft.naming import clean_module_name, layer_name

# Component -> kohya prefix. SD1/SD2 files with lora_te1_ lose their text encoder in kohya without a word.
_PREFIXES = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
FAMILIES = tuple(_PREFIXES)
# Both lora_te_ and lora_te1_ are read as text_encoder.
_BY_PREFIX = {prefix: component for prefixes in _PREFIXES.values() for component, prefix in prefixes.items()}
COMPONENTS = tuple(_PREFIXES["sdxl"])

# Every word of a module path; numbers are words too.
_UNET_WORDS = """
    down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers transformer_blocks
    attn1 attn2 to_q to_k to_v to_out ff net proj proj_in proj_out norm norm1 norm2 norm3
    conv conv1 conv2 conv_in conv_out conv_norm_out conv_shortcut time_emb_proj
    time_embedding add_embedding linear_1 linear_2
"""
_SGM_WORDS = """
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op out time_embed label_emb
"""
_CLIP_WORDS = """
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2
    embeddings token_embedding position_embedding final_layer_norm text_projection
"""
_WORDS = frozenset((_UNET_WORDS + _SGM_WORDS + _CLIP_WORDS).split())
_LONGEST_WORD = max(word.count("_") + 1 for word in _WORDS)

# (diffusers, sgm) inside a ResNet block.
_RESNET_PARTS = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


def _sgm_table(num_levels: int, attended: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    """Pairs (diffusers, sgm) of path prefixes that cover a UNet: 2 layers a level going down, 3 going up.

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
        for layer in range(2):
            sgm = f"input_blocks.{3 * level + layer + 1}"
            resnets.append((f"down_blocks.{level}.resnets.{layer}", f"{sgm}.0"))
            if level in attended:
                others.append((f"down_blocks.{level}.attentions.{layer}", f"{sgm}.1"))
        has_attention = num_levels - 1 - level in attended
        for layer in range(3):
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


SDXL_UNET = _sgm_table(3, attended=(1, 2))
SD1_UNET = _sgm_table(4, attended=(0, 1, 2))  # SD2's too

# Prefix in a single-file checkpoint -> our component, and how its paths go on; SDXL's has two text encoders.
_CHECKPOINT_PARTS = (
    ("model.diffusion_model.", "unet", "sgm"),
    ("cond_stage_model.transformer.", "text_encoder", "clip"),
    ("cond_stage_model.model.", "text_encoder", "openclip"),
    ("conditioner.embedders.0.transformer.", "text_encoder", "clip"),
    ("conditioner.embedders.1.model.", "text_encoder_2", "openclip"),
)
# (ours, OpenCLIP's) inside a transformer layer; the first three are one weight, stacked.
_OPENCLIP_PARTS = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn.in_proj_weight"),
    (("self_attn.out_proj",), "attn.out_proj.weight"),
    (("mlp.fc1",), "mlp.c_fc.weight"),
    (("mlp.fc2",), "mlp.c_proj.weight"),
)


# (ours, theirs) at the end of a path: the projections of diffusers' LoRA attention processors.
OLD_ATTENTION = (
    *((f".{ours}", f".processor.{theirs}") for ours, theirs in
      (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out"))),
    *((f".self_attn.{ours}", f".self_attn.{theirs}") for ours, theirs in
      (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out"))),
)  # fmt: skip


def to_kohya_name(layer: str, family: str) -> str:
    """Return kohya's name of one of our layers, without ``.lora_down.weight``; ``family`` is one of ``FAMILIES``.

    Raises:
        ValueError: the family is unknown, or has no such component or module.
    """
    if family not in _PREFIXES:
        raise ValueError(f"model family is {family!r}; choose one of {', '.join(FAMILIES)}")
    component, _, path = layer.partition(".")
    prefix = _PREFIXES[family].get(component)
    if prefix is None:
        raise ValueError(
            f"layer {layer} belongs to {component!r}, which {family} does not have; choose the right family"
        )
    if component != "unet" and not path.startswith(("text_model.", "text_projection")):
        raise ValueError(f"layer {layer} lacks 'text_model.'; without it kohya, A1111 and ComfyUI skip the layer")
    if component == "unet" and family == "sdxl":
        path = _replace_prefix(path, SDXL_UNET, source=0)
    name = prefix + path.replace(".", "_")
    if not path or _split_words(name.removeprefix(prefix)) != path:
        raise ValueError(f"layer {layer} is no module of a {family} model")
    return name


def from_kohya_name(name: str) -> str:
    """Return our layer name of a kohya name, in any family's spelling (SDXL's sgm or diffusers names).

    Raises:
        ValueError: the name is none of a Stable Diffusion 1, 2 or XL LoRA.
    """
    prefix = next((prefix for prefix in _BY_PREFIX if name.startswith(prefix)), None)
    path = None if prefix is None else _split_words(name.removeprefix(prefix))
    if path is None:
        raise ValueError(f"{name} is no layer of a Stable Diffusion 1, 2 or XL model")
    if path.startswith(("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")):
        path = _replace_prefix(path, SDXL_UNET, source=1)
    return f"{_BY_PREFIX[prefix]}.{path}"


def to_old_diffusers_name(layer: str) -> str:
    """Return the name before ``_lora.down.weight`` that diffusers < 0.20 gave one of our layers.

    Raises:
        ValueError: the layer is none of an attention's projections, which is all that those files hold.
    """
    for ours, theirs in OLD_ATTENTION:
        if layer.endswith(ours):
            return layer.removesuffix(ours) + theirs
    raise ValueError(f"layer {layer} is no attention projection, which is all that diffusers' old LoRA files hold")


def from_path_name(name: str, component: str) -> str:
    """Return our layer name of a dotted one: diffusers', new or old, or PEFT's; ``component`` is whose model it is in.

    Raises:
        ValueError: the path is none of a Stable Diffusion 1, 2 or XL model.
    """
    path = clean_module_name(name).removeprefix(f"{component}.")
    path = next((path.removesuffix(theirs) + ours for ours, theirs in OLD_ATTENTION if path.endswith(theirs)), path)
    if not path or not all(word in _WORDS or word.isdecimal() for word in path.split(".")):
        raise ValueError(f"{name} is no layer of a Stable Diffusion 1, 2 or XL model")
    return layer_name(component, path)


def from_checkpoint_name(name: str) -> tuple[str, ...]:
    """Return the layers whose weight is the tensor ``name`` of a single-file checkpoint of any family.

    OpenCLIP stacks three along axis 0: q, k, v. Empty for what is no layer's weight that a LoRA could change.
    """
    found = next(((part, style, name.removeprefix(prefix)) for prefix, part, style in _CHECKPOINT_PARTS
                  if name.startswith(prefix)), None)  # fmt: skip
    if found is None:
        return ()
    component, style, path = found
    if style == "openclip":
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", path)
        parts = next((ours for ours, theirs in _OPENCLIP_PARTS if match and match[2] == theirs), ())
        return tuple(layer_name(component, f"encoder.layers.{match[1]}.{part}") for part in parts)
    if not path.endswith(".weight"):
        return ()
    path = path.removesuffix(".weight")
    if style == "clip":
        return (layer_name(component, path),)
    # The two tables differ in one name only, which no model has both ways.
    for ours, sgm in (*SD1_UNET, *SDXL_UNET):
        if path == sgm or path.startswith(sgm + "."):
            return (f"{component}.{ours}{path.removeprefix(sgm)}",)
    return ()


def is_sgm_name(name: str) -> bool:
    """Whether a kohya name is in the sgm spelling that SDXL's UNet has."""
    return name.removeprefix("lora_unet_").startswith(("input_blocks_", "middle_block_", "output_blocks_"))


def _replace_prefix(path: str, table: tuple[tuple[str, str], ...], source: int) -> str:
    for pair in table:
        if path == pair[source] or path.startswith(pair[source] + "."):
            return pair[1 - source] + path.removeprefix(pair[source])
    raise ValueError(f"{path} is no module of SDXL's UNet")


def _split_words(text: str) -> str | None:
    """Put the dots back: the longest known word first; None when some part is no known word."""
    pieces, words, at = text.split("_"), [], 0
    while at < len(pieces):
        for length in range(min(_LONGEST_WORD, len(pieces) - at), 0, -1):
            word = "_".join(pieces[at : at + length])
            if word in _WORDS or (word.isascii() and word.isdecimal()):
                words.append(word)
                at += length
                break
        else:
            return None
    return ".".join(words)
