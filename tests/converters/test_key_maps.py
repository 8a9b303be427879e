import itertools

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_kohya, convert_state_dict_to_peft, convert_unet_state_dict_to_peft

from converters.key_maps import from_kohya_name, from_path_name, to_kohya_name, to_old_diffusers_name
from converters.shapes import has_layer
from lidb_peft.families import FAMILIES
from lidb_peft.naming import layer_name, natural_key

CLIP_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.fixture(scope="module")
def sdxl_unet_layers(real_layers):
    return [layer for layer in real_layers("sdxl") if layer.startswith("unet.")]


def written_out(prefix, blocks, projections):
    return {f"{prefix}{block}_{projection}" for block, projection in itertools.product(blocks, projections)}


def clip_names(prefix, num_layers):
    return written_out(
        prefix, [f"text_model_encoder_layers_{i}_self_attn" for i in range(num_layers)], CLIP_PROJECTIONS
    )


ATTENTIONS = ("attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0", "attn2_to_q", "attn2_to_k", "attn2_to_v",
              "attn2_to_out_0")  # fmt: skip


@pytest.mark.parametrize(("family", "num_clip_layers"), [("sd1", 12), ("sd2", 23)])
def test_stable_diffusion_1_and_2_have_the_names_that_kohya_writes(real_layers, family, num_clip_layers):
    layers = list(real_layers(family))
    blocks = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)] + ["mid_block_attentions_0"]
    blocks += [f"up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)]
    expected = written_out("lora_unet_", [f"{block}_transformer_blocks_0" for block in blocks], ATTENTIONS)
    expected |= clip_names("lora_te_", num_clip_layers)
    assert len(expected) == 128 + 4 * num_clip_layers
    assert {to_kohya_name(layer, family) for layer in layers} == expected
    assert [from_kohya_name(to_kohya_name(layer, family)) for layer in layers] == layers


def test_sdxl_has_the_736_names_that_kohya_writes(real_layers):
    layers = list(real_layers("sdxl"))
    depths = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10}
    depths |= {"middle_block_1": 10, "output_blocks_0_1": 10, "output_blocks_1_1": 10, "output_blocks_2_1": 10}
    depths |= {"output_blocks_3_1": 2, "output_blocks_4_1": 2, "output_blocks_5_1": 2}
    blocks = [f"{block}_transformer_blocks_{i}" for block, depth in depths.items() for i in range(depth)]
    expected = written_out("lora_unet_", blocks, ATTENTIONS)
    expected |= clip_names("lora_te1_", 12) | clip_names("lora_te2_", 32)
    assert len(expected) == 560 + 48 + 128 == 736
    assert {to_kohya_name(layer, "sdxl") for layer in layers} == expected
    assert [from_kohya_name(to_kohya_name(layer, "sdxl")) for layer in layers] == layers


def test_diffusers_own_conversion_agrees_where_it_is_right(real_layers, sdxl_unet_layers):
    layers = list(real_layers("sd1"))
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
    config = FrozenDict(layers_per_block=2)  # all that diffusers asks of it
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
    ours, sgm = zip(*FAMILIES["sdxl"].denoiser.originals, strict=True)
    assert len(set(ours)) == len(set(sgm)) == len(ours)
    for name in (
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_input_blocks_4_0_emb_layers_1",
        "lora_unet_input_blocks_4_1_proj_in",
        "lora_unet_label_emb_0_0",
    ):
        assert to_kohya_name(from_kohya_name(name), "sdxl") == name
    assert from_kohya_name("lora_unet_output_blocks_5_2_conv") == "unet.up_blocks.1.upsamplers.0.conv"


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_reads_our_old_names_as_the_layers_they_came_from(real_layers, family):
    for layer in real_layers(family):
        component, _, path = layer.partition(".")
        name = to_old_diffusers_name(layer)
        convert = convert_unet_state_dict_to_peft if component == "unet" else convert_state_dict_to_peft
        state = {f"{name.removeprefix(component + '.')}_lora.{side}.weight": None for side in ("down", "up")}
        if component != "unet":  # diffusers tells the format by this key
            state["x.to_out_lora.down.weight"] = None
        assert {f"{path}.lora_A.weight", f"{path}.lora_B.weight"} <= convert(state).keys()
        assert from_path_name(name, component) == from_path_name(layer, component) == layer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_have_the_layers_of_the_real_models_in_natural_order(real_layers, family):
    assert FAMILIES[family].shapes == real_layers(family)
    for component in FAMILIES[family].components:
        assert list(component.shapes) == sorted(component.shapes, key=natural_key)


UNET_K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
SGM_K = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
CLIP_Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
CLIP_G_Q = CLIP_Q.replace("encoder", "encoder_2", 1)
PROJECTION = "text_encoder_2.text_projection"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        # In whatever a trainer wraps the model.
        (f"module.{UNET_K}", UNET_K),
        (f"_orig_mod.{UNET_K}", UNET_K),
        (f"unet._orig_mod.{UNET_K.removeprefix('unet.')}", UNET_K),
        (f"unet.base_model.model.{UNET_K.removeprefix('unet.')}", UNET_K),
        (f"module.unet.base_model.model.{UNET_K.removeprefix('unet.')}", UNET_K),
        (f"base_model.model.{UNET_K}", UNET_K),
        (f"text_encoder.base_model.model.{CLIP_Q.removeprefix('text_encoder.')}", CLIP_Q),
        (f"base_model.model.{CLIP_Q.removeprefix('text_encoder.')}", CLIP_Q),
        # The first authors' names, as dotted paths, of any family: OneTrainer, ComfyUI.
        (f"unet.{SGM_K}", UNET_K),
        (f"diffusion_model.{SGM_K}", UNET_K),
        (f"model.diffusion_model.{SGM_K}", UNET_K),
        ("unet.input_blocks.1.1.proj_in", "unet.down_blocks.0.attentions.0.proj_in"),
        ("unet.output_blocks.2.1.conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("unet.output_blocks.2.1.proj_out", "unet.up_blocks.0.attentions.2.proj_out"),
        ("unet.output_blocks.2.2.conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("unet.input_blocks.4.0.in_layers.2", "unet.down_blocks.1.resnets.0.conv1"),
        ("diffusion_model.time_embed.0", "unet.time_embedding.linear_1"),
        ("diffusion_model.label_emb.0.2", "unet.add_embedding.linear_2"),
        ("diffusion_model.out.2", "unet.conv_out"),
        # ComfyUI's and OneTrainer's names of text encoders.
        (f"text_encoders.clip_l.transformer.{CLIP_Q.removeprefix('text_encoder.')}", CLIP_Q),
        (f"text_encoders.clip_l.{CLIP_Q.removeprefix('text_encoder.')}", CLIP_Q),
        (f"clip_l.{CLIP_Q.removeprefix('text_encoder.')}", CLIP_Q),
        (f"text_encoders.clip_h.transformer.{CLIP_Q.removeprefix('text_encoder.')}", CLIP_Q),
        (f"text_encoders.clip_g.transformer.{CLIP_Q.removeprefix('text_encoder.')}", CLIP_G_Q),
        (f"text_encoder_1.{CLIP_Q.removeprefix('text_encoder.')}", CLIP_Q),
        # transformers 5
        ("text_encoder_2.encoder.layers.0.self_attn.q_proj", CLIP_G_Q),
        # The projection stands beside text_model, whatever a tool has made of that.
        (PROJECTION, PROJECTION),
        ("text_encoder_2.text_model.text_projection", PROJECTION),
        ("text_encoders.clip_g.transformer.text_projection", PROJECTION),
        ("text_encoder_2.base_model.model.text_projection", PROJECTION),
    ],
)
def test_dotted_names_of_every_dialect_are_our_layers(name, layer):
    assert from_path_name(name) == layer


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("lora_te2_text_projection", PROJECTION),
        ("lora_te2_text_model_text_projection", PROJECTION),
        ("lora_te2_encoder_layers_0_self_attn_q_proj", CLIP_G_Q),
        ("lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", UNET_K),
        ("lycoris_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", UNET_K),
        # Stable Diffusion 1 by its first authors' names.
        ("lora_unet_input_blocks_1_1_proj_in", "unet.down_blocks.0.attentions.0.proj_in"),
        ("lora_unet_output_blocks_11_1_proj_in", "unet.up_blocks.3.attentions.2.proj_in"),
        ("lora_unet_output_blocks_2_1_conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_time_embed_0", "unet.time_embedding.linear_1"),
    ],
)
def test_flat_names_of_every_dialect_are_our_layers(name, layer):
    assert from_kohya_name(name) == layer


@pytest.mark.parametrize(
    "name",
    [
        "unet.attn1.down_blocks.0",
        "unet.down_blocks.0.attentions.0.to_q",
        "unet.down_blocks.0.attentions.0.proj_in.x",
        "unet.unet.conv_in",
        "unet.mid_block",
        "diffusion_model.joint_blocks.0.x_block.attn.qkv",
        "text_encoder.text_projection",
        "x",
    ],
)
def test_known_words_that_are_no_module_are_refused(name):
    with pytest.raises(ValueError, match="is not a layer of a Stable Diffusion 1, 2 or XL"):
        from_path_name(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_and_convolution_of_a_real_model_is_known_and_goes_both_ways(real_models, family):
    if family not in ("sd1", "sd2", "sdxl"):
        pytest.skip("the fixture has no model of it")
    layers = [
        layer_name(component, path)
        for component, model in real_models(family).items()
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    assert len(layers) > 250
    for layer in layers:
        assert has_layer(layer, family), layer
        assert from_kohya_name(to_kohya_name(layer, family)) == from_path_name(layer) == layer


@pytest.mark.parametrize(
    ("layer", "families"),
    [
        ("unet.down_blocks.0.attentions.0.proj_in", ["sd1", "sd2"]),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", ["sd1", "sd2", "sdxl"]),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q", ["sdxl"]),
        ("unet.mid_block.attentions.0.transformer_blocks.9.norm1", ["sdxl"]),
        ("unet.mid_block.attentions.0.transformer_blocks.10.attn1.to_q", []),
        ("unet.up_blocks.0.attentions.0.proj_in", ["sdxl"]),
        ("unet.up_blocks.3.resnets.0.conv1", ["sd1", "sd2"]),
        ("text_encoder.text_model.encoder.layers.12.mlp.fc1", ["sd2"]),
        ("text_encoder_2.text_model.encoder.layers.31.mlp.fc1", ["sdxl"]),
        ("text_encoder_2.text_projection", ["sdxl"]),
    ],
)
def test_depth_and_blocks_tell_which_families_have_a_layer(layer, families):
    assert [family for family in ("sd1", "sd2", "sdxl") if has_layer(layer, family)] == families


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
        ("unet.down_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q", "sdxl", "is not a module of SDXL's UNet"),
        ("unet.down-blocks.0", "sd1", "is not a module"),
        ("unet", "sd1", "is not a module"),
    ],
)
def test_a_layer_that_the_family_does_not_have_is_refused(layer, family, message):
    with pytest.raises(ValueError, match=message):
        to_kohya_name(layer, family)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_joint_blocks_0_x_block_attn_proj",
        "lora_te3_x",
        "unet.mid_block",
        "lora_unet_",
    ],
)
def test_a_name_of_another_model_is_refused(name):
    with pytest.raises(ValueError, match="is not a layer of a Stable Diffusion 1, 2 or XL"):
        from_kohya_name(name)
