"""What a hypernetwork's folder may not make a machine do."""

import json
import shutil

import pytest
import torch

from hypernet.network.hypernetwork import HyperNetwork, read_config


@pytest.fixture(scope="module")
def whole(make_hypernetwork, space, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets") / "net"
    make_hypernetwork(space).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    """A hypernetwork of which nothing may be contacted, built or unpickled."""
    shutil.copytree(whole, tmp_path / "net")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something was contacted"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    monkeypatch.setattr(HyperNetwork, "__init__", lambda *_, **__: pytest.fail("a network was built"))
    return tmp_path / "net"


def edit(folder, place, value):
    """Write one setting; ``place`` is its keys."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    file.write_text(json.dumps(config))


HOSTILE = [
    (("attn_implementation",), "owner/repo"), (("encoder", "attn_implementation"), "owner/repo"),
    (("encoder", "_attn_implementation"), "owner/repo"), (("encoder", "backbone"), "evil/x"),
    (("encoder", "use_timm_backbone"), True), (("quantization_config",), {"quant_method": "gptq"}),
    (("encoder", "quantization_config"), {"quant_method": "gptq"}), (("auto_map",), {"AutoModel": "evil--x.Y"}),
    (("surprise",), 1), (("encoder", "surprise"), 1), (("dtype",), "os"), (("encoder", "model_type"), "resnet"),
    (("encoder", "model_type"), ["vit"]), (("encoder",), "vit"), (("encoder",), None), (("encoder",), []),
    (("k",), 10**9), (("k",), 0), (("k",), -1), (("k",), 2.5), (("k",), "4"), (("k",), 4.0),
    (("hidden_size",), 16.0), (("image_size",), 32.0), (("encoder", "num_hidden_layers"), 1.0),
    (("k",), True), (("rounds",), 10**9), (("rounds",), "4"),
    (("hidden_size",), 10**9), (("hidden_size",), 0), (("hidden_size",), None), (("num_hidden_layers",), 10**7),
    (("num_hidden_layers",), 150), (("num_attention_heads",), 0), (("encoder", "num_hidden_layers"), 10**7),
    (("encoder", "num_hidden_layers"), 199), (("encoder", "hidden_size"), 2**14), (("encoder", "hidden_size"), "16"),
    (("encoder", "hidden_size"), 17), (("encoder", "intermediate_size"), 10**8), (("encoder", "hidden_act"), "evil"),
    (("encoder", "patch_size"), 0), (("encoder", "patch_size"), 1e300), (("encoder", "image_size"), 10**6),
    (("encoder", "image_size"), [32, 32]), (("encoder", "layer_norm_eps"), "small"), (("encoder", "qkv_bias"), "yes"),
    (("image_size",), 10**6), (("image_size",), -1), (("image_mean",), "abc"), (("image_std",), [0, 0, 0]),
    (("image_mean",), [1e400, 0, 0]), (("token",), "a\x1b]0;pwned\x07"), (("token",), 3), (("token",), "x" * 10**5),
    (("prompt",), "a [V]\nface"), (("prompt",), ["[V]"]), (("layers",), []), (("layers",), {}), (("layers", 0), "x"),
    (("layers", 0, 1), 10**9), (("layers", 0, 1), 1.5), (("layers", 0, 1), -4), (("layers", 0, 0), "a\x00"),
    (("layers", 0, 0), 7), (("record",), []), (("record", "r"), 1), (("record", "r"), "9" * 30),
    (("record", "down_dim"), "1000000000"), (("record", "down_dim"), "nan"), (("record", "seed"), "x"),
    (("record", "base_model_name"), "\x1b[2J"), (("record", "targets"), '{"target_modules": "(a+)+b"}'),
    (("record", "targets"), '{"target_modules": 3}'), (("record", "bases"), "\ud800"), (("learned_bases",), 1),
    (("train_encoder",), "no"), (("model_type",), "vit"), (("torch_dtype",), {}),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), HOSTILE, ids=lambda value: repr(value)[:40])
def test_a_hostile_setting_is_refused_in_one_sentence(folder, place, value):
    edit(folder, place, value)
    for read in (read_config, HyperNetwork.from_pretrained):
        with pytest.raises(ValueError) as told:  # noqa: PT011 - one sentence, whatever it is
            read(folder)
        assert str(told.value).isprintable()
        assert len(str(told.value)) < 1000


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../other.safetensors", "model.safetensors.pt", 3])
def test_no_index_leads_to_a_pickle_or_elsewhere(folder, name):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {"theta_0": name}}))
        with pytest.raises(ValueError, match=r"index\.json (leads to .*is not read|does not say)"):
            HyperNetwork.from_pretrained(folder)
        (folder / index).unlink()


def test_no_index_of_a_base_leads_to_a_pickle(tmp_path, monkeypatch):
    from hypernet.base_models.folders import check_folder
    from testbed import miniature_path

    shutil.copytree(miniature_path(), tmp_path / "base")
    index = tmp_path / "base" / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(ValueError, match=r"text_encoder.*index\.json leads to 'pytorch_model\.bin'"):
        check_folder(tmp_path / "base")


def test_the_earlier_name_of_k_is_read_and_written_as_todays(folder, tmp_path, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    config["rounds"] = config.pop("k") + 1
    (folder / "config.json").write_text(json.dumps(config))
    found = read_config(folder)
    assert (found.k, found.rounds) == (config["rounds"], config["rounds"])
    assert json.loads(found.to_json_string())["k"] == config["rounds"]
    assert "rounds" not in json.loads(found.to_json_string())


def test_settings_of_any_model_are_left_out_of_the_encoder(folder):
    edit(folder, ("encoder", "num_labels"), 10**9)
    edit(folder, ("encoder", "pruned_heads"), {"0": [1]})
    assert not hasattr(read_config(folder).encoder, "pruned_heads") or not read_config(folder).encoder.pruned_heads
