import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from converters import read_lora

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
        ({"lora_alpha": 10**400}, "a lora_alpha for .*to_q that is no number"),
        ({"alpha_pattern": {"to_q(": 3}}, "an unreadable alpha_pattern"),
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
        ({f"{KOHYA_Q}.hada_w1_a": DOWN}, "is LoHa, not LoRA"),
        ({f"{KOHYA_Q}.lokr_w1": DOWN}, "is LoKr, not LoRA"),
        ({f"{KOHYA_Q}.diff": DOWN}, "is full difference, not LoRA"),
        ({f"{KOHYA_Q}.lora_mid.weight": DOWN}, r"1? ?keys that are no LoRA .*lora_mid"),
        ({f"{Q}.lora_B.bias": DOWN}, r"1 keys that are no LoRA .*lora_B\.bias"),
        ({"text_encoder.text_model.embeddings.token_embedding.lora_embedding_A": DOWN}, "lora_embedding_A"),
        ({f"{KOHYA_Q}.dora_scale": torch.ones(1, 8)}, r"DoRA magnitudes of shape \(1, 8\); only those of the outputs"),
        ({f"{KOHYA_Q}.lora_down.weight": DOWN.to(torch.float8_e4m3fn)}, "a tensor of torch.float8_e4m3fn"),
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
