"""CLIP's text encoders, OpenAI's and OpenCLIP's, which several families share."""

from typing import Any

from .family import Component, Shapes, Stacked

TARGETS = frozenset({"q_proj", "k_proj", "v_proj", "out_proj"})
_WORDS = """
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2
    embeddings token_embedding position_embedding final_layer_norm text_projection
"""
WORDS = frozenset(_WORDS.split())
PATH = r"(^|\.)encoder\.layers\.\d+\.|(^|\.)text_model\."
LEVEL = "text_model."
TRAINED = ("encoder.layers.",)
_LAYER = r"self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12]"
MODULES = rf"text_model\.(encoder\.layers\.\d+\.({_LAYER})|final_layer_norm|embeddings\.(token|position)_embedding)"
PROJECTION = "text_projection"
BLOCK = "BASE"
"""What block weights call the text encoders of Stable Diffusion, all of them."""
# (ours, OpenCLIP's) inside a transformer layer; the first three are one weight.
OPENCLIP = tuple(
    Stacked(tuple(f"encoder.layers.{{}}.{path}" for path in ours), f"transformer.resblocks.{{}}.{original}")
    for ours, original in (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn.in_proj_weight"),
        (("self_attn.out_proj",), "attn.out_proj.weight"),
        (("mlp.fc1",), "mlp.c_fc.weight"),
        (("mlp.fc2",), "mlp.c_proj.weight"),
    )
)


# (OpenCLIP's, ours) in the names of an encoder's tensors, except stacked ones; every occurrence is replaced.
OPENCLIP_NAMES = (
    ("token_embedding.", "embeddings.token_embedding."),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final.", "final_layer_norm."),
    ("text_projection", "text_projection.weight"),
    ("transformer.resblocks.", "encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
)
# How OpenAI's encoder and OpenCLIP's differ otherwise.
OPENAI = {"activation": "quick_gelu", "pad_token": "<|endoftext|>"}
OPENCLIP_SETTINGS: dict[str, Any] = {"activation": "gelu", "pad_token": "!"}


def path_prefixes(name: str) -> tuple[str, ...]:
    """Return the prefixes of layers of the encoder ``name`` in files of ComfyUI and OneTrainer."""
    return tuple(f"{start}{name}.{end}" for start in ("text_encoders.", "") for end in ("transformer.", ""))


def attention_shapes(num_layers: int, width: int) -> Shapes:
    """Return the attention projections of an encoder."""
    names = [
        f"text_model.encoder.layers.{i}.self_attn.{name}"
        for i in range(num_layers)
        for name in ("k_proj", "out_proj", "q_proj", "v_proj")
    ]
    return dict.fromkeys(names, (width, width))


def text_encoder(num_layers: int, width: int, **own: Any) -> Component:
    """Return the component of an encoder; ``own`` holds what is specific to its family, and may replace what is shared.

    Args:
        num_layers, width: of the published model.
    """
    shared = {"name": "text_encoder", "classes": ("CLIPTextModel",), "modules": MODULES, "block_names": (("", BLOCK),)}
    shared |= OPENAI
    return Component(
        role="text encoder", targets=TARGETS, shapes=attention_shapes(num_layers, width), words=WORDS, path=PATH,
        level=LEVEL, trained=TRAINED, **shared | own,
    )  # fmt: skip
