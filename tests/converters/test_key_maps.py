import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_kohya
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from converters.key_maps import FAMILIES, SDXL_UNET, from_kohya_name, to_kohya_name
from converters.metadata import MODEL_FAMILIES

UNET_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
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


def unet_layers(**config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    return [f"unet.{name}" for name, _ in unet.named_modules() if name.endswith(UNET_PROJECTIONS)]


def clip_layers(component, kind, num_layers):
    config = CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=num_layers, vocab_size=64)
    with torch.device("meta"):
        model = kind(config)
    names = [name for name, _ in model.named_modules() if name.endswith(CLIP_PROJECTIONS)]
    return [f"{component}.text_model.{name.removeprefix('text_model.')}" for name in names]


@pytest.fixture(scope="module")
def sdxl_unet_layers():
    return unet_layers(**SDXL_CONFIG)


def written_out(prefix, blocks, projections):
    return {f"{prefix}{block}_{projection}" for block, projection in itertools.product(blocks, projections)}


def clip_names(prefix, num_layers):
    return written_out(
        prefix, [f"text_model_encoder_layers_{i}_self_attn" for i in range(num_layers)], CLIP_PROJECTIONS
    )


ATTENTIONS = ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "attn2_to_q", "attn2_to_k", "attn2_to_v",
              "attn2_to_out_0")  # fmt: skip


@pytest.mark.parametrize(("family", "width", "num_clip_layers"), [("sd1", 768, 12), ("sd2", 1024, 23)])
def test_stable_diffusion_1_and_2_have_the_names_that_kohya_writes(family, width, num_clip_layers):
    layers = unet_layers(cross_attention_dim=width, attention_head_dim=8)
    layers += clip_layers("text_encoder", CLIPTextModel, num_clip_layers)
    blocks = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)] + ["mid_block_attentions_0"]
    blocks += [f"up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)]
    expected = written_out("lora_unet_", [f"{block}_transformer_blocks_0" for block in blocks], ATTENTIONS)
    expected |= clip_names("lora_te_", num_clip_layers)
    assert len(expected) == 128 + 4 * num_clip_layers
    assert {to_kohya_name(layer, family) for layer in layers} == expected
    assert [from_kohya_name(to_kohya_name(layer, family)) for layer in layers] == layers


def test_sdxl_has_the_736_names_that_kohya_writes(sdxl_unet_layers):
    layers = sdxl_unet_layers + clip_layers("text_encoder", CLIPTextModel, 12)
    layers += clip_layers("text_encoder_2", CLIPTextModelWithProjection, 32)
    depths = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10}
    depths |= {"middle_block_1": 10, "output_blocks_0_1": 10, "output_blocks_1_1": 10, "output_blocks_2_1": 10}
    depths |= {"output_blocks_3_1": 2, "output_blocks_4_1": 2, "output_blocks_5_1": 2}
    blocks = [f"{block}_transformer_blocks_{i}" for block, depth in depths.items() for i in range(depth)]
    expected = written_out("lora_unet_", blocks, ATTENTIONS)
    expected |= clip_names("lora_te1_", 12) | clip_names("lora_te2_", 32)
    assert len(expected) == 560 + 48 + 128 == 736
    assert {to_kohya_name(layer, "sdxl") for layer in layers} == expected
    assert [from_kohya_name(to_kohya_name(layer, "sdxl")) for layer in layers] == layers


def test_diffusers_own_conversion_agrees_where_it_is_right(sdxl_unet_layers):
    layers = unet_layers(cross_attention_dim=768, attention_head_dim=8)
    layers += clip_layers("text_encoder", CLIPTextModel, 12)
    peer = convert_state_dict_to_kohya({f"{layer}.lora_A.weight": torch.zeros(1) for layer in layers})
    names = {key.removesuffix(".lora_down.weight") for key in peer if key.endswith(".lora_down.weight")}
    assert {name.replace("lora_te1_", "lora_te_") for name in names} == {
        to_kohya_name(layer, "sd1") for layer in layers
    }
    # The spelling of SDXL that kohya does not write, but some tools do.
    peer = convert_state_dict_to_kohya({f"{layer}.lora_A.weight": torch.zeros(1) for layer in sdxl_unet_layers})
    names = [key.removesuffix(".lora_down.weight") for key in peer if key.endswith(".lora_down.weight")]
    assert [from_kohya_name(name) for name in names] == sdxl_unet_layers


def test_diffusers_reads_our_sdxl_names_as_the_layers_they_came_from(sdxl_unet_layers):
    state = {}
    for index, layer in enumerate(sdxl_unet_layers):
        name = to_kohya_name(layer, "sdxl")
        state[f"{name}.lora_down.weight"] = torch.full((1, 1), float(index))
        state[f"{name}.lora_up.weight"] = torch.full((1, 1), float(index))
        state[f"{name}.alpha"] = torch.tensor(1.0)
    with torch.device("meta"):
        config = UNet2DConditionModel(**SDXL_CONFIG).config
    read, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(state, unet_config=config)
    found = {int(value): key for key, value in read.items() if key.endswith("down.weight") or "lora_A" in key}
    assert len(found) == 560
    for index, layer in enumerate(sdxl_unet_layers):
        plain = (
            found[index]
            .replace(".processor", "")
            .replace("_lora.down", ".lora.down")
            .replace("to_out.lora", "to_out.0.lora")
        )
        assert plain.startswith(f"{layer}.lora")


def test_the_sdxl_table_maps_one_to_one_and_covers_convolutions():
    ours, sgm = zip(*SDXL_UNET, strict=True)
    assert len(set(ours)) == len(set(sgm)) == len(SDXL_UNET)
    for name in (
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_input_blocks_4_0_emb_layers_1",
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_label_emb_0_0",
    ):
        assert to_kohya_name(from_kohya_name(name), "sdxl") == name
    assert from_kohya_name("lora_unet_output_blocks_5_2_conv") == "unet.up_blocks.1.upsamplers.0.conv"


def test_feed_forward_and_mlp_names_read_back():
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    assert to_kohya_name(layer, "sd1") == "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
    assert from_kohya_name(to_kohya_name(layer, "sd1")) == layer
    layer = "text_encoder.text_model.encoder.layers.11.mlp.fc1"
    assert from_kohya_name(to_kohya_name(layer, "sd2")) == layer


@pytest.mark.parametrize(
    ("layer", "family", "message"),
    [
        ("unet.mid_block.attn1.to_q", "sd4", "choose one of sd1, sd2, sdxl"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", "sd1", "'text_encoder_2', which sd1 does not"),
        ("text_encoder.encoder.layers.0.self_attn.q_proj", "sd1", "lacks 'text_model.'"),
        ("unet.down_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q", "sdxl", "no module of SDXL's UNet"),
        ("unet.down-blocks.0", "sd1", "is no module"),
        ("unet", "sd1", "is no module"),
    ],
)
def test_a_layer_that_the_family_does_not_have_is_refused(layer, family, message):
    with pytest.raises(ValueError, match=message):
        to_kohya_name(layer, family)


@pytest.mark.parametrize(
    "name", ["lora_unet_double_blocks_0_img_attn_proj", "lora_te3_x", "unet.mid_block", "lora_unet_"]
)
def test_a_name_of_another_model_is_refused(name):
    with pytest.raises(ValueError, match="no layer of a Stable Diffusion 1, 2 or XL"):
        from_kohya_name(name)


def test_every_family_has_metadata():
    assert tuple(MODEL_FAMILIES) == FAMILIES
