"""The attention projections of Stable Diffusion 1, 2 and XL: the layers that LiDB adapts, by name and width.

A theta file says which layers it belongs to by a hash, and a LiDB folder by their names: with this table neither needs
the base model to become a LoRA.
"""

from dataclasses import dataclass

from lidb_peft.naming import natural_key


@dataclass(frozen=True)
class Architecture:
    """What the layers follow from.

    Args:
        channels: width of the UNet's levels, outermost first.
        depths: transformer blocks of an attention on each level; 0 where there are no attentions.
        cross_width: width of the prompt embeddings.
        text_encoders: component -> (number of layers, width).
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    cross_width: int
    text_encoders: dict[str, tuple[int, int]]


ARCHITECTURES = {
    "sd1": Architecture((320, 640, 1280, 1280), (1, 1, 1, 0), 768, {"text_encoder": (12, 768)}),
    "sd2": Architecture((320, 640, 1280, 1280), (1, 1, 1, 0), 1024, {"text_encoder": (23, 1024)}),
    "sdxl": Architecture((320, 640, 1280), (0, 2, 10), 2048, {"text_encoder": (12, 768), "text_encoder_2": (32, 1280)}),
}
CROSS_WIDTHS = {architecture.cross_width: family for family, architecture in ARCHITECTURES.items()}
_LAYERS_A_LEVEL = 2


def attention_shapes(family: str) -> dict[str, tuple[int, int]]:
    """Return layer name -> ``(in_features, out_features)``, the UNet first, each component in natural order."""
    found = ARCHITECTURES[family]
    # The middle has the depth of the deepest level that has attentions.
    middle = next(depth for depth in reversed(found.depths) if depth)
    attentions = [("mid_block.attentions.0", found.channels[-1], middle)]
    last = len(found.channels) - 1
    for level, (width, depth) in enumerate(zip(found.channels, found.depths, strict=True)):
        attentions += [(f"down_blocks.{level}.attentions.{i}", width, depth) for i in range(_LAYERS_A_LEVEL)]
        attentions += [(f"up_blocks.{last - level}.attentions.{i}", width, depth) for i in range(_LAYERS_A_LEVEL + 1)]
    shapes = {}
    for path, width, depth in attentions:
        for block in range(depth):
            for attention, context in (("attn1", width), ("attn2", found.cross_width)):
                prefix = f"unet.{path}.transformer_blocks.{block}.{attention}"
                shapes |= {f"{prefix}.{name}": (width, width) for name in ("to_q", "to_out.0")}
                shapes |= {f"{prefix}.{name}": (context, width) for name in ("to_k", "to_v")}
    shapes = {name: shapes[name] for name in sorted(shapes, key=natural_key)}
    for component, (num_layers, width) in found.text_encoders.items():
        names = [
            f"{component}.text_model.encoder.layers.{i}.self_attn.{name}"
            for i in range(num_layers)
            for name in ("k_proj", "out_proj", "q_proj", "v_proj")
        ]
        shapes |= dict.fromkeys(names, (width, width))
    return shapes
