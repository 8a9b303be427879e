import json
import struct
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lidb_peft import LiDBConfig
from lidb_peft.record import base_fingerprint, same_base
from lidb_peft.space import LiDBSpace
from lidb_peft.theta import load_theta, save_theta

CONFIG = LiDBConfig(down_dim=12, up_dim=10, scale=0.5, seed=3)


@pytest.fixture
def models(new_unet, new_text_encoder):
    return {"unet": new_unet(), "text_encoder": new_text_encoder()}


@pytest.fixture
def space(models):
    return LiDBSpace(models, CONFIG)


@pytest.fixture
def theta(space):
    noise = torch.randn(space.num_layers, space.row_size, generator=torch.Generator().manual_seed(0))
    return space.theta_0 + 0.1 * noise


@pytest.fixture
def path(tmp_path):
    return tmp_path / "me.safetensors"


def rewrite(path, tensors=None, **metadata):
    """Write the file again with some metadata changed."""
    with safe_open(path, framework="pt") as file:
        found = file.metadata()
    found |= {f"lidb.{key}": value for key, value in metadata.items()}
    save_file(load_file(path) if tensors is None else tensors, path, metadata=found)


def test_a_theta_comes_back_exactly(space, theta, path):
    save_theta(path, theta, space, base_model_name="someone/model", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_theta(path, space)
    assert torch.equal(loaded.theta, theta)
    assert loaded.config == CONFIG
    assert loaded.base_model_name == "someone/model"
    assert torch.equal(load_theta(path).theta, theta)


def test_float16_is_the_default_and_rounds_to_nearest(space, theta, path):
    save_theta(path, theta, space)
    loaded = load_theta(path, space).theta
    assert loaded.dtype == torch.float32
    assert (loaded - theta).abs().max() <= theta.abs().max() * 2**-11


def test_it_is_one_tensor_under_60_kb_for_stable_diffusion_15(path):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072))
    space = LiDBSpace({"unet": unet, "text_encoder": encoder}, LiDBConfig())
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    save_theta(path, space.theta_0, space, base_model_name=name, base_fingerprint="x" * 400)
    assert path.stat().st_size < 60_000
    assert {key: tuple(value.shape) for key, value in load_file(path).items()} == {"theta": (176, 150)}
    load_theta(path, space)


def test_another_checkpoint_of_the_architecture_is_a_warning(space, theta, path, new_unet, new_text_encoder):
    save_theta(path, theta, space, base_model_name="the original")
    other = LiDBSpace({"unet": new_unet(seed=1), "text_encoder": new_text_encoder()}, CONFIG)
    with pytest.warns(UserWarning, match="was made on the original, whose weights differ"):
        load_theta(path, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_checkpoint_in_half_precision_is_recognised(models, dtype):
    full = base_fingerprint(models)
    half = base_fingerprint({name: model.to(dtype) for name, model in models.items()})
    assert same_base(full, half)
    assert not same_base(full, "not json")
    whole = json.dumps({name: [1] * len(values) for name, values in json.loads(full).items()})  # no floats in it
    assert not same_base(full, whole)
    for text in ("[]", "{}", '{"unet": 3, "text_encoder": 4}', '{"unet": "x"}', '{"unet": [{}]}'):
        assert not same_base(full, text)


def test_an_adapter_does_not_change_the_fingerprint(models):
    before = base_fingerprint(models)
    models["unet"].add_adapter(LiDBConfig(down_dim=8, up_dim=4))
    assert base_fingerprint(models) == before
    assert base_fingerprint({"unet": models["unet"].to("meta")}) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, r"was made with seed 3 \(here 4\)"),
        ({"down_dim": 11, "up_dim": 11}, r"down_dim 12 \(here 11\), up_dim 10 \(here 11\)"),
        ({"scale": 1.0}, r"scale 0.5 \(here 1.0\)"),
        ({"target_modules": ["to_q", "q_proj"]}, "belongs to another list of 40 layers"),
    ],
)
def test_other_settings_and_layers_are_refused(models, space, theta, path, changes, message):
    save_theta(path, theta, space)
    settings = {"down_dim": 12, "up_dim": 10, "scale": 0.5, "seed": 3} | changes
    with pytest.raises(ValueError, match=message):
        load_theta(path, LiDBSpace(models, LiDBConfig(**settings)))


def test_layers_of_another_width_are_refused(space, theta, path, new_unet, new_text_encoder):
    save_theta(path, theta, space)
    wider = {"unet": new_unet(block_out_channels=(32, 96)), "text_encoder": new_text_encoder()}
    with pytest.raises(ValueError, match="belongs to another list of 40 layers"):
        load_theta(path, LiDBSpace(wider, CONFIG))


def test_another_basis_is_refused(space, theta, path):
    save_theta(path, theta, space)
    with safe_open(path, framework="pt") as file:
        records = json.loads(file.metadata()["lidb.bases"])
    label = next(iter(records))
    other_stream = {**records, label: ["0" * 16, *records[label][1:]]}
    rewrite(path, bases=json.dumps(other_stream))
    with pytest.raises(ValueError, match=f"was made with another {label} basis"):
        load_theta(path, space)
    other_values = {**records, label: [records[label][0], *(-value for value in records[label][1:])]}
    rewrite(path, bases=json.dumps(other_values))
    with pytest.raises(ValueError, match=f"records other values of the {label} basis"):
        load_theta(path, space)
    rewrite(path, bases=json.dumps({}))
    with pytest.raises(ValueError, match="has no record of the"):
        load_theta(path, space)


BAD_RECORDS = ["{", "[]", "3", '{"a": 3}', '{"a": ["a", "b"]}', '{"a": []}', '{"a": [["x"], {}]}', '{"a": [1, 2]}']


@pytest.mark.parametrize("bases", BAD_RECORDS)
def test_an_unreadable_record_is_refused_in_words(space, theta, path, bases):
    save_theta(path, theta, space)
    rewrite(path, bases=bases)
    with pytest.raises(ValueError, match=r"(no readable record of its bases|no record of the)"):
        load_theta(path, space)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "2"}, "has format version 2; this version of lidb-peft reads 1"),
        ({"num_layers": "39"}, r"shape \(40, 22\) but says \(39, 22\); it is damaged"),
        ({"num_layers": "many"}, "says num_layers is 'many', which is not a number"),
        ({"r": "0"}, "describes no LiDB this version knows: r is 0"),
        ({"basis": "secret"}, "describes no LiDB this version knows: basis is 'secret'"),
        ({"scale": "big"}, "says scale is 'big'"),
    ],
)
def test_lying_metadata_is_refused(space, theta, path, metadata, message):
    save_theta(path, theta, space)
    rewrite(path, **metadata)
    with pytest.raises(ValueError, match=message):
        load_theta(path, space)


def test_other_and_damaged_files_are_refused_in_words(space, theta, path, tmp_path):
    save_theta(path, theta, space)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    header["theta"]["data_offsets"][1] *= 1000
    lying = json.dumps(header).encode()
    header["theta"] |= {"shape": [2**63], "data_offsets": [0, 0]}  # more than torch counts to
    endless = json.dumps(header).encode()
    contents = {
        b"": "is empty",
        whole[:100]: "is truncated",
        whole[:-7]: "is truncated",
        b"\xff" * 200: "is not a safetensors file",
        struct.pack("<Q", len(lying)) + lying + b"0" * 64: "is corrupt: tensor 'theta' of F16",
        struct.pack("<Q", len(endless)) + endless: "is corrupt: tensor 'theta' has shape",
    }
    for content, message in contents.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_theta(path, space)
    save_file({"lora": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"is not a theta file: tensors \['lora'\]"):
        load_theta(path)
    save_file({"theta": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="missing metadata"):
        load_theta(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_theta(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_theta(tmp_path)


@pytest.mark.parametrize("field", ["targets", "bases"])
def test_a_record_nested_too_deeply_is_refused_in_words(space, theta, path, field):
    save_theta(path, theta, space)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {f"lidb.{field}": "[" * 200_000})
    with pytest.raises(ValueError, match=r"describes no LiDB|no readable record of its bases"):
        load_theta(path, space)


def test_broken_values_are_neither_written_nor_read(space, theta, path):
    broken = theta.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        save_theta(path, broken, space)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        save_theta(path, theta * 1e7, space)
    with pytest.raises(ValueError, match="save one identity"):
        save_theta(path, theta[None], space)
    assert not list(path.parent.iterdir())
    save_theta(path, theta, space)
    rewrite(path, tensors={"theta": broken})
    with pytest.raises(ValueError, match="holds values that are not finite"):
        load_theta(path)


def test_every_message_is_one_line(space, theta, path):
    save_theta(path, theta, space)
    rewrite(path, bases="{")
    with pytest.raises(ValueError, match="no readable record") as error:
        load_theta(path, space)
    assert "\n" not in str(error.value)


def test_the_same_theta_is_the_same_file(space, theta, path, tmp_path):
    save_theta(path, theta, space)
    save_theta(tmp_path / "again.safetensors", theta, space)
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
