import pytest
import torch
from torch import nn

from lidb_peft import LiDBConfig
from lidb_peft.naming import find_layers, layer_name, natural_key


def test_names_are_the_classic_ones_whatever_surrounds_the_module():
    path = "encoder.layers.0.self_attn.q_proj"
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    for module_path in (path, f"text_model.{path}", f"base_model.model.{path}", f"text_model.{path}.base_layer"):
        assert layer_name("text_encoder", module_path) == name
    assert layer_name("unet", "_orig_mod.mid_block.attn.to_q") == "unet.mid_block.attn.to_q"


def test_names_are_sorted_as_people_count():
    names = ["a.layers.10.q", "a.layers.2.q", "a.up_blocks.0", "a.down_blocks.11", "a.down_blocks.9"]
    assert sorted(names, key=natural_key) == [names[4], names[3], names[1], names[0], names[2]]


def test_only_the_attention_projections_are_found(new_unet, new_text_encoder):
    unet = new_unet()
    names = set(find_layers("unet", unet, LiDBConfig()))
    expected = {f"unet.{n}" for n, m in unet.named_modules() if isinstance(m, nn.Linear) and ".attn" in n}
    assert names == expected
    layers = find_layers("text_encoder", new_text_encoder(), LiDBConfig())
    assert [name.rpartition(".")[2] for name in layers] == ["k_proj", "out_proj", "q_proj", "v_proj"] * 2
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in layers)


def test_target_modules_may_be_names_or_a_pattern(new_unet):
    unet = new_unet()
    assert len(find_layers("unet", unet, LiDBConfig(target_modules=r".*attn1\.to_q"))) == 4
    assert len(find_layers("unet", unet, LiDBConfig(target_modules=["attn2.to_v"]))) == 4


def test_wrong_targets_are_refused_in_words(new_unet):
    with pytest.raises(ValueError, match="no layer of unet matches target_modules"):
        find_layers("unet", new_unet(), LiDBConfig(target_modules=["nothing"]))
    with pytest.raises(ValueError, match="conv_in is a Conv2d; target_modules must name linear layers"):
        find_layers("unet", new_unet(), LiDBConfig(target_modules=["conv_in"]))
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        find_layers("unet", nn.Sequential(nn.Linear(2, 2)), LiDBConfig())


def test_layers_are_found_below_peft_adapters(new_unet):
    plain, adapted = new_unet(), new_unet()
    adapted.add_adapter(LiDBConfig(down_dim=8, up_dim=4))
    before, after = (find_layers("unet", model, LiDBConfig()) for model in (plain, adapted))
    assert list(before) == list(after)
    assert all(torch.equal(before[name].weight, after[name].weight) for name in before)


def test_names_of_a_file_are_told_in_printable_words():
    """A lone surrogate, which JSON may hold, can be printed nowhere."""
    with pytest.raises(ValueError, match="no layer of unet matches") as told:
        find_layers("unet", nn.Sequential(nn.Linear(2, 2)), LiDBConfig(target_modules="no\ud800such\x1b"))
    assert str(told.value).isprintable()
