import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch.nn.functional import conv2d

from converters import describe, read_lora
from converters.batch import plan_batch
from converters.formats.module import read_module

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CLIP_Q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
KOHYA_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = torch.randn(4, 8), torch.randn(6, 4)


def state_of(*names, down=".lora_A.weight", up=".lora_B.weight"):
    return {name + down: DOWN.clone() for name in names} | {name + up: UP.clone() for name in names}


@pytest.mark.parametrize(
    "state",
    [
        state_of(Q, CLIP_Q),
        state_of(Q, CLIP_Q, down=".lora.down.weight", up=".lora.up.weight"),
        state_of(Q, down=".lora.down.weight", up=".lora.up.weight")
        | state_of(CLIP_Q, down=".lora_linear_layer.down.weight", up=".lora_linear_layer.up.weight"),
        state_of(Q.replace("to_q", "processor.to_q_lora"), CLIP_Q.replace("q_proj", "to_q_lora"), down=".down.weight",
                 up=".up.weight"),
        state_of(Q.removeprefix("unet."), CLIP_Q.removeprefix("text_encoder.")),
        state_of(Q, CLIP_Q.replace("text_model.", "")),
    ],
    ids=["0.27", "0.19", "0.20", "0.17", "one model", "transformers 5"],
)  # fmt: skip
def test_every_spelling_of_diffusers_is_the_same_lora(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    layers = read_lora(tmp_path / "a.safetensors").layers
    assert layers.keys() == {Q, CLIP_Q}
    for layer in layers.values():
        assert torch.equal(layer.lora_A, DOWN)
        assert torch.equal(layer.lora_B, UP)
        assert layer.scale == 1


def loha(name, inputs=8, rank=3):
    shapes = {"w1_a": (6, rank), "w1_b": (rank, inputs), "w2_a": (6, rank), "w2_b": (rank, inputs)}
    return {f"{name}.hada_{part}": torch.randn(shape) for part, shape in shapes.items()}


def lokr(name):
    return {f"{name}.lokr_w1": torch.randn(2, 4), f"{name}.lokr_w2": torch.randn(3, 2)}


def write_peft(folder, state=None, **config):
    folder.mkdir(exist_ok=True)
    entries = LoraConfig(**{"r": 4, "lora_alpha": 2} | config).to_dict()
    (folder / "adapter_config.json").write_text(json.dumps(entries, default=list))
    names = ["base_model.model." + Q.removeprefix("unet.")]
    save_file(state or state_of(*names), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 0.5),
        ({"use_rslora": True}, 1.0),
        ({"alpha_pattern": {"to_q": 3}}, 0.75),
        ({"r": 16, "rank_pattern": {"attn1.to_q": 4}}, 0.5),
        ({"r": 4, "alpha_pattern": {"attn2.to_q": 9}}, 0.5),
    ],
)
def test_pefts_scale_is_that_of_its_config(tmp_path, config, scale):
    assert read_lora(write_peft(tmp_path / "a", **config)).layers[Q].scale == scale
    assert read_lora(tmp_path / "a/adapter_model.safetensors").layers[Q].scale == scale


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8}, "says rank 8 for .*to_q, whose tensors have rank 4"),
        ({"lora_alpha": 10**400}, "a lora_alpha for .*to_q that is not a number"),
        ({"alpha_pattern": {"to_q(": 3}}, "alpha_pattern names layers by the regular expr"),
        ({"bias": "all"}, "with bias 'all', which cannot be carried"),
        ({"init_lora_weights": "pissa"}, "with init_lora_weights 'pissa'"),
        ({"modules_to_save": ["conv_in"], "fan_in_fan_out": True}, "fan_in_fan_out True, modules_to_save"),
    ],
)
def test_what_else_a_peft_config_says_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        read_lora(write_peft(tmp_path / "a", **config))


def test_a_peft_adapter_of_another_kind_or_without_config_is_refused(tmp_path):
    folder = write_peft(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LOHA"}))
    with pytest.raises(ValueError, match="is LOHA, not LoRA"):
        read_lora(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickled file"):
        read_lora(folder)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"but no adapter_config\.json beside it, which says its alpha"):
        read_lora(folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"a folder without adapter_config\.json"):
        read_lora(folder)


def test_diffusers_metadata_says_alpha(tmp_path):
    config = {"unet.r": 4, "unet.lora_alpha": 1, "unet.alpha_pattern": {}, "text_encoder.lora_alpha": 8}
    save_file(state_of(Q, CLIP_Q), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    layers = read_lora(tmp_path / "a.safetensors").layers
    assert (layers[Q].alpha, layers[CLIP_Q].alpha) == (1, 8)
    save_file(state_of(Q), tmp_path / "a.safetensors", {"lora_adapter_metadata": "[1"})
    with pytest.raises(ValueError, match="unreadable lora_adapter_metadata"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({f"{KOHYA_Q}.hada_w1_a": DOWN}, "has no hada_w1_b; the file is incomplete"),
        ({f"{KOHYA_Q}.lokr_w1": DOWN}, "has no lokr_w2_a; the file is incomplete"),
        (loha(KOHYA_Q), "is LoHa, not LoRA, in 1 layer; hdb convert --rank .*hdb merge --into"),
        (lokr(KOHYA_Q), "is LoKr, not LoRA"),
        (loha(KOHYA_Q) | {f"{KOHYA_Q}.dora_scale": torch.ones(6, 1)}, "LoHa with DoRA's magnitudes"),
        ({f"{KOHYA_Q}.oft_blocks": DOWN}, "is OFT, which needs the base model's weights"),
        ({f"{KOHYA_Q}.{part}.weight": DOWN for part in ("a1", "a2", "b1", "b2")}, "is GLoRA"),
        ({f"{KOHYA_Q}.diff": DOWN}, "is full difference, not LoRA"),
        ({f"{KOHYA_Q}.lora_mid.weight": DOWN}, r"a lora_mid of shape \(4, 8\), which does not fit"),
        ({f"{Q}.lora_B.bias": DOWN}, r"1 keys that are no LoRA .*lora_B\.bias"),
        ({"text_encoder.text_model.embeddings.token_embedding.lora_embedding_A": DOWN}, "lora_embedding_A"),
        ({f"{KOHYA_Q}.dora_scale": torch.ones(1, 7)}, r"DoRA magnitudes of shape \(1, 7\), neither of its outputs nor"),
        ({f"{KOHYA_Q}.lora_down.weight": DOWN.to(torch.int8)}, "a tensor of torch.int8"),
        ({f"{KOHYA_Q}.lora_up.weight": torch.full((6, 4), torch.inf)}, "hdb convert --drop-nan leaves such layers out"),
        (
            {f"{Q}.lora_A.{name}.weight": DOWN for name in ("me", "you")} | {f"{Q}.lora_B.me.weight": UP},
            "holds several adapters, me, you; save one of them alone",
        ),
        (state_of(Q), "holds layer .*to_q twice"),
    ],
)
def test_what_a_lora_cannot_hold_is_refused_by_name(tmp_path, extra, message):
    state = state_of(KOHYA_Q, down=".lora_down.weight", up=".lora_up.weight") | extra
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("names", "width", "metadata", "family"),
    [
        ([KOHYA_Q.replace("attn1_to_q", "attn2_to_k")], 768, {}, "sd1"),
        ([KOHYA_Q.replace("attn1_to_q", "attn2_to_k")], 1024, {"ss_base_model_version": "sd_v1"}, "sd2"),
        ([KOHYA_Q.replace("attn1_to_q", "attn2_to_k")], 2048, {}, "sdxl"),
        ([KOHYA_Q], 320, {}, ""),
        ([KOHYA_Q], 320, {"ss_v2": "True"}, "sd2"),
        (["lora_unet_middle_block_1_proj_in"], 320, {}, "sdxl"),
        # A mistake that is made: kohya drops lora_te1_ of Stable Diffusion 1 without a word.
        (
            [KOHYA_Q.replace("attn1_to_q", "attn2_to_k"), "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"],
            768,
            {},
            "sd1",
        ),
        (["lora_te_text_model_encoder_layers_0_self_attn_q_proj"], 768, {}, "sd1"),
        (["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"], 768, {}, "sdxl"),
        # Its first text encoder is as wide as Stable Diffusion 1's.
        ([CLIP_Q], 768, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        (["lora_te2_text_model_encoder_layers_0_self_attn_q_proj"], 1280, {}, "sdxl"),
    ],
)
def test_the_family_is_told_by_widths_names_and_metadata(tmp_path, names, width, metadata, family):
    state = {}
    for name in names:
        state |= {f"{name}.lora_down.weight": torch.ones(1, width), f"{name}.lora_up.weight": torch.ones(8, 1)}
    save_file(state, tmp_path / "a.safetensors", metadata)
    assert read_lora(tmp_path / "a.safetensors").family == family


def test_live_state_dicts_of_peft_are_read_whatever_the_adapter_is_called(tmp_path):
    state = {f"{Q}.lora_A.my_face.weight": DOWN, f"{Q}.lora_B.my_face.weight": UP}
    save_file(state, tmp_path / "a.safetensors")
    layer = read_lora(tmp_path / "a.safetensors").layers[Q]
    assert torch.equal(layer.lora_A, DOWN)
    assert layer.scale == 1


def test_pefts_tensors_without_config_are_read_with_the_alpha_that_is_in_them_or_said(tmp_path):
    name = "base_model.model." + Q.removeprefix("unet.")
    save_file(state_of(name), tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors", alpha=8).layers[Q].scale == 2
    save_file(state_of(name) | {f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    assert read_lora(tmp_path / "a.safetensors").layers[Q].scale == 0.25


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tucker_core_is_multiplied_in_exactly(tmp_path, kernel, dtype):
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, core, up = torch.randn(4, 8, 1, 1), torch.randn(5, 4, *kernel), torch.randn(6, 5, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": core, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    save_file({f"{conv}.{part}": tensor.to(dtype) for part, tensor in parts.items()}, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    (layer,) = lora.layers.values()
    down, core, up = (tensor.to(dtype).double() for tensor in (down, core, up))
    # What the three convolutions do one after the other, divided by the rank of the first.
    image = torch.randn(1, 8, 7, 7, dtype=torch.float64)
    expected = 2 / 4 * conv2d(conv2d(conv2d(image, down), core), up)
    found = layer.scale * conv2d(conv2d(image, layer.lora_A.double()), layer.lora_B.double())
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-5)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert lora.notes == (
        "the Tucker cores (lora_mid) of 1 layer are multiplied into lora_down, in float32:"
        " unet.down_blocks.0.resnets.0.conv1",
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_float8_is_read_as_the_same_numbers(tmp_path, dtype):
    # Every number that the dtype has and that is none of NaN and infinity.
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype)
    numbers = torch.cat([part[part.float().isfinite()][:120] for part in numbers.chunk(2)]).reshape(2, -1)
    state = {f"{KOHYA_Q}.lora_down.weight": numbers, f"{KOHYA_Q}.lora_up.weight": torch.ones(6, 2).to(dtype)}
    save_file(state, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.layers[Q].lora_A.dtype == torch.float16
    assert torch.equal(lora.layers[Q].lora_A.double(), numbers.double())
    assert "1 layer of float8 read as float16" in lora.notes[0]


def test_layers_of_rank_0_and_if_asked_of_nan_are_left_out_and_named(tmp_path):
    other = KOHYA_Q.replace("to_q", "to_k")
    third = KOHYA_Q.replace("to_q", "to_v")
    ends = {"down": ".lora_down.weight", "up": ".lora_up.weight"}
    state = state_of(KOHYA_Q, **ends) | state_of(third, **ends)
    state |= {f"{other}.lora_down.weight": torch.ones(0, 8), f"{other}.lora_up.weight": torch.ones(6, 0)}
    state |= {f"{other}.alpha": torch.tensor(4.0), f"{third}.lora_up.weight": torch.full((6, 4), torch.nan)}
    save_file(state, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors", drop_nan=True)
    assert lora.layers.keys() == {Q}
    assert set(lora.notes) == {
        f"1 layer of rank 0, which change nothing, left out: {Q.replace('to_q', 'to_k')}",
        f"1 layer with NaN or infinity left out: {Q.replace('to_q', 'to_v')}",
    }


def test_factors_of_two_and_four_dimensions_are_one_convolution(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    for down, up in ((DOWN[:, :, None, None], UP), (DOWN, UP[:, :, None, None])):
        state = {f"{name}.lora_down.weight": down.clone(), f"{name}.lora_up.weight": up.clone()}
        save_file(state, tmp_path / "a.safetensors")
        (layer,) = read_lora(tmp_path / "a.safetensors").layers.values()
        assert torch.equal(layer.lora_A.flatten(1), DOWN)
        assert torch.equal(layer.lora_B, UP[:, :, None, None])


@pytest.mark.parametrize("name", ["bundle_emb.ohwx.string_to_param.*", "bundle_emb.<me>.clip_g"])
def test_embeddings_that_come_with_a_lora_are_kept_apart(tmp_path, name):
    embedding = torch.randn(2, 8)
    state = state_of(KOHYA_Q, down=".lora_down.weight", up=".lora_up.weight") | {name: embedding}
    save_file(state, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.layers.keys() == {Q}
    assert torch.equal(lora.embeddings[name], embedding)


# ---- files of several pieces ----


def in_pieces(folder, tensors, count=2):
    """Divide tensors as the hub's libraries do, a layer's over two pieces; with the list of what is where."""
    folder.mkdir()
    names, where = sorted(tensors), {}
    for number in range(count):
        own = {name: tensors[name] for name in names[number::count]}
        file = f"pytorch_lora_weights-{number + 1:05}-of-{count:05}.safetensors"
        save_file(own, folder / file)
        where |= dict.fromkeys(own, file)
    (folder / "pytorch_lora_weights.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_a_lora_in_pieces_is_read_whole_and_no_piece_is_taken_for_it(tmp_path):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    tensors = {f"{name}.{to}.lora_{side}.weight": torch.randn(shape)
               for to in ("to_k", "to_v") for side, shape in (("A", (2, 768)), ("B", (8, 2)))}  # fmt: skip
    in_pieces(tmp_path / "in", tensors)
    for path in (tmp_path / "in", tmp_path / "in/pytorch_lora_weights.safetensors.index.json"):
        layers = read_lora(path).layers
        assert layers.keys() == {f"{name}.to_k", f"{name}.to_v"}
        for layer, found in layers.items():
            assert torch.equal(found.lora_A, tensors[f"{layer}.lora_A.weight"])
            assert torch.equal(found.lora_B, tensors[f"{layer}.lora_B.weight"])
    found = describe(tmp_path / "in")
    assert (found.base, found.layers, len(found.hashes)) == ("SD1", {"unet": 2}, 2)
    assert plan_batch([tmp_path / "in"], tmp_path / "out", "kohya") == [(tmp_path / "in", tmp_path / "out")]
    first, second = sorted((tmp_path / "in").glob("*.safetensors"))
    with pytest.raises(ValueError, match="piece 1 of 2 of a LoRA; name the folder"):
        read_lora(first)
    second.unlink()
    with pytest.raises(ValueError, match="lacks piece 2 of the 2 of pytorch_lora_weights; download it too"):
        read_lora(tmp_path / "in")
    (tmp_path / "in/other.safetensors").write_bytes(first.read_bytes())
    assert len(plan_batch([tmp_path / "in"], tmp_path / "out", "kohya")) == 2  # no longer one LoRA: each by itself


def test_what_is_left_out_tells_the_family_all_the_same(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    down, up = "lora_down.weight", "lora_up.weight"
    tensors = {f"{name}_attn1_to_q.{down}": torch.ones(2, 320), f"{name}_attn1_to_q.{up}": torch.ones(320, 2)}
    tensors |= {f"{name}_attn2_to_k.{down}": torch.ones(2, 768) / 0, f"{name}_attn2_to_k.{up}": torch.ones(320, 2)}
    save_file(tensors, tmp_path / "nan.safetensors")
    lora = read_lora(tmp_path / "nan.safetensors", drop_nan=True)
    assert (lora.family, len(lora.layers)) == ("sd1", 1)
    tensors[f"{name}_attn2_to_k.lora_down.weight"] = torch.ones(0, 768)
    tensors[f"{name}_attn2_to_k.lora_up.weight"] = torch.ones(320, 0)
    save_file(tensors, tmp_path / "rank0.safetensors")
    assert read_lora(tmp_path / "rank0.safetensors").family == "sd1"


@pytest.mark.parametrize("shape_a", [(), (3,), (3, 8), (0, 8), (3, 8, 3, 3), (3, 8, 1)])
@pytest.mark.parametrize("shape_b", [(), (3,), (8, 3), (8, 0), (8, 3, 3, 3), (8, 3, 1)])
@pytest.mark.parametrize("shape_core", [(), (3, 3), (0, 3), (3, 0), (3, 3, 3, 3), (3, 3, 3)])
def test_a_tucker_core_fits_or_is_refused(shape_a, shape_b, shape_core):
    parts = {"lora_A": torch.ones(shape_a), "lora_B": torch.ones(shape_b), "mid": torch.ones(shape_core)}
    if (shape_a, shape_b) == ((3, 8), (8, 3)) and shape_core in ((3, 3), (3, 3, 3, 3)):
        assert read_module(parts, True, None).is_tucker
    elif (shape_a, shape_b) == ((0, 8), (8, 0)):
        assert read_module(parts, True, None).layer is None
    else:
        with pytest.raises(ValueError, match=r"a lora_mid of shape .*, which does not fit"):
            read_module(parts, True, None)
