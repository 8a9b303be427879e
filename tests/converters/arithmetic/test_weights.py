"""Weights by part and by block: the lists as kohya's svd_merge_lora.py and sd-webui-lora-block-weight have them."""

import pytest
import torch

from converters.arithmetic.algebra import merge
from converters.arithmetic.weights import LoraWeight, weigh
from converters.key_maps import block_name, read_kohya_name
from converters.layer import LoraLayer
from converters.lora import Lora

ATTENTION = "transformer_blocks_0_attn1_to_q"
# Names of kohya's files in sgm's spelling, which says the block: what A1111's extension searches for in a key.
SD1 = {
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": "BASE",
    f"lora_unet_down_blocks_0_attentions_0_{ATTENTION}": "IN01",
    "lora_unet_down_blocks_0_downsamplers_0_conv": "IN03",
    f"lora_unet_down_blocks_2_attentions_1_{ATTENTION}": "IN08",
    "lora_unet_down_blocks_3_resnets_1_conv1": "IN11",
    f"lora_unet_mid_block_attentions_0_{ATTENTION}": "M00",
    "lora_unet_up_blocks_0_resnets_0_conv1": "OUT00",
    f"lora_unet_up_blocks_1_attentions_0_{ATTENTION}": "OUT03",
    f"lora_unet_up_blocks_3_attentions_2_{ATTENTION}": "OUT11",
    "lora_unet_time_embedding_linear_1": "",
}
SDXL = {
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": "BASE",
    "lora_te2_text_model_encoder_layers_31_self_attn_q_proj": "BASE",
    f"lora_unet_input_blocks_4_1_{ATTENTION}": "IN04",
    f"lora_unet_input_blocks_8_1_{ATTENTION}": "IN08",
    f"lora_unet_middle_block_1_{ATTENTION}": "M00",
    f"lora_unet_output_blocks_5_1_{ATTENTION}": "OUT05",
    "lora_unet_output_blocks_8_0_in_layers_2": "OUT08",
}
FLUX = {
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": "CLIP",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "T5",
    "lora_unet_img_in": "IN",
    "lora_unet_double_blocks_18_img_attn_qkv": "D18",
    "lora_unet_single_blocks_7_linear1": "S07",
    "lora_unet_final_layer_linear": "OUT",
}
LIST_17 = [
    "BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00",
    "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11",
]  # fmt: skip
LIST_12 = ["BASE", "IN04", "IN05", "IN07", "IN08", "M00", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05"]
LISTS = {
    ("sd1", 17): LIST_17,
    ("sd2", 26): ["BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))],
    ("sdxl", 12): LIST_12,
    ("sdxl", 20): ["BASE", *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9))],
    ("flux1", 61): ["CLIP", "T5", "IN", *(f"D{i:02}" for i in range(19)), *(f"S{i:02}" for i in range(38)), "OUT"],
}
NAMES = {"sd1": SD1, "sd2": SD1, "sdxl": SDXL, "flux1": FLUX}


def ours(kohya_name, family):
    first = read_kohya_name(kohya_name).layers[0]
    return (
        first.replace("text_encoder.", "text_encoder_2.") if family == "sdxl" and "lora_te2_" in kohya_name else first
    )


@pytest.mark.parametrize("family", NAMES)
def test_a_layer_is_in_the_block_that_its_name_in_kohyas_files_says(family):
    for name, block in NAMES[family].items():
        assert block_name(ours(name, family), family) == block, name


@pytest.mark.parametrize(("family", "length"), LISTS)
def test_a_list_has_a_number_for_each_block_in_the_order_of_a1111s_extension(family, length):
    numbers = [0.01 * (index + 1) for index in range(length)]
    weight = LoraWeight.parse("0.5:lbw=" + ",".join(map(str, numbers)))
    factors = dict(zip(LISTS[family, length], numbers, strict=True))
    for name, block in NAMES[family].items():
        assert weight.of_layer(ours(name, family), family) == pytest.approx(0.5 * factors.get(block, 1.0)), name


def test_parts_replace_the_weight_of_the_whole_and_blocks_multiply():
    weight = LoraWeight.parse("0.8:te=0.5:unet=-1:IN=0.5:in04=0.25:MID=0")
    found = {block: weight.of_layer(ours(name, "sd1"), "sd1") for name, block in SD1.items() if block}
    assert found == {"BASE": 0.5, "IN01": -0.5, "IN03": -0.5, "IN08": -0.5, "IN11": -0.5, "M00": 0.0, "OUT00": -1.0,
                     "OUT03": -1.0, "OUT11": -1.0}  # fmt: skip
    assert weight.of_layer("unet.down_blocks.1.attentions.0.proj_in", "sd1") == -0.25
    second = LoraWeight.parse("te=0.5:text_encoder_2=2")
    assert second.of_layer("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "sdxl") == 2.0
    assert second.of_layer("text_encoder.text_model.encoder.layers.0.mlp.fc1", "sdxl") == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "'x' is not a weight; write a number"),
        ("1:2", "'2' is not a weight; write te="),
        ("1:lbw=1,a", "'a' is not a weight"),
        ("1:lbw=1,0", "lbw has 2 numbers; for Stable Diffusion 1 it has 17 or 26"),
        ("1:IN12=0", "'IN12' is neither a part nor a block of Stable Diffusion 1; choose from te, unet, BASE, IN00 to"),
        ("nan", "the weight nan; choose a finite number"),
        ("1:te=inf", "the weight inf"),
    ],
)
def test_what_is_no_weight_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        LoraWeight.parse(text).of_layer(ours(next(iter(SD1)), "sd1"), "sd1")


def lora(family="sd1", dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    layers = {
        ours(name, "sd1"): LoraLayer(
            torch.randn(2, 8, generator=generator).to(dtype), torch.randn(6, 2, generator=generator).to(dtype), 1.0
        )
        for name in SD1
        if "attn" in name
    }
    return Lora(layers, family)


def delta(layer):
    return layer.scale * layer.lora_B.double() @ layer.lora_A.double()


def test_merging_by_blocks_adds_each_layer_by_its_weight_and_leaves_those_of_0_out():
    first, second = lora(), lora()
    parts = [*weigh(first, LoraWeight.parse("1:te=0:IN01=0.5")), *weigh(second, LoraWeight.parse("0.25"))]
    merged, errors = merge(parts, dtype=torch.float32)
    assert not any(errors.values())
    factors = {"BASE": 0.0, "IN01": 0.5}
    for name, layer in first.layers.items():
        expected = delta(layer) * (factors.get(block_name(name, "sd1"), 1.0) + 0.25)
        assert torch.allclose(delta(merged.layers[name]), expected, atol=1e-6), name
    alone, _ = merge(weigh(first, LoraWeight.parse("1:te=0:IN01=0.5")))
    assert {name.partition(".")[0] for name in alone.layers} == {"unet"}
    kept = next(name for name in alone.layers if block_name(name, "sd1") == "OUT03")
    assert torch.equal(alone.layers[kept].lora_B, first.layers[kept].lora_B)  # bits and dtype
    assert alone.layers[kept].lora_B.dtype == torch.float16


def test_blocks_need_a_family_and_something_must_be_left():
    with pytest.raises(ValueError, match="pass --family sd1, sd2"):
        weigh(lora(family=""), LoraWeight.parse("1:IN01=0"))
    assert len(weigh(lora(family=""), LoraWeight.parse("1:IN01=0"), "sd2")) == 1
    with pytest.raises(ValueError, match="all of its layers have weight 0"):
        weigh(lora(), LoraWeight.parse("te=0:unet=0"))
