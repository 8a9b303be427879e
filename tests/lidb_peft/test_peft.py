"""LiDB behaves in PEFT as PEFT's own methods do."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import convert_to_lora
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from lidb_peft import LiDBConfig, LiDBLinear
from lidb_peft.bases import BasisKey, get_basis


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 6)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MLP()


@pytest.fixture
def x():
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


def small(**changes):
    return LiDBConfig(**({"down_dim": 8, "up_dim": 4, "target_modules": ["first", "second"]} | changes))


def shake(model, adapter="default", seed=0):
    """Give an adapter values that change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f".{adapter}") and "lidb_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_a_unet_needs_no_further_argument_and_starts_as_the_identity(new_unet, batch):
    unet = new_unet()
    latents, timesteps, prompts = batch
    with torch.no_grad():
        before = unet(latents, timesteps, prompts).sample
        model = get_peft_model(unet, LiDBConfig())
        assert torch.equal(model(latents, timesteps, prompts).sample, before)
    layers = [module for module in model.modules() if isinstance(module, LiDBLinear)]
    assert len(layers) == 32
    assert all(layer.lidb_down["default"].norm() > 0.99 for layer in layers)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lidb_" in name}


def test_both_halves_learn(mlp, x):
    model = get_peft_model(mlp, small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # up moves first; then down has a gradient too
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("which", ["unet", "text_encoder"])
def test_from_pretrained_brings_an_adapter_back_bit_exactly(which, new_unet, new_text_encoder, batch, tmp_path):
    new = new_unet if which == "unet" else new_text_encoder
    inputs = batch if which == "unet" else (torch.arange(16).view(2, 8),)
    model = shake(get_peft_model(new(), LiDBConfig(r=2, scale=0.7)))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        loaded = PeftModel.from_pretrained(new(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs)[0], model(*inputs)[0])
        assert not torch.allclose(loaded(*inputs)[0], new()(*inputs)[0], atol=1e-3)
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_low_cpu_mem_usage_loads_the_same(mlp, x, tmp_path):
    model = shake(get_peft_model(copy.deepcopy(mlp), small()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp, tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(loaded(x), model(x))


def test_the_other_naming_of_clips_modules_loads_too(new_text_encoder, tmp_path):
    """Weights and biases, under PEFT's names and with the prefix that transformers 4.x gives to every key."""
    ids = torch.arange(16).view(2, 8)
    config = LiDBConfig(down_dim=8, up_dim=4, bias="all")
    model = shake(get_peft_model(new_text_encoder(), config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lidb_" not in name:
                parameter.add_(0.5)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    prefix = "base_model.model."
    tensors = load_file(file)
    has_level = any(key.startswith(f"{prefix}text_model.") for key in tensors)
    old, new = (f"{prefix}text_model.", prefix) if has_level else (prefix, f"{prefix}text_model.")
    renamed = {key.replace(old, new, 1): value for key, value in tensors.items()}
    for state in (renamed, {prefix + key.removeprefix(prefix): value for key, value in renamed.items()}):
        save_file(state, file)
        loaded = PeftModel.from_pretrained(new_text_encoder(), tmp_path)
        assert torch.equal(loaded(ids)[0], model(ids)[0])


def test_forward_equals_the_dense_product(mlp, x):
    model = shake(get_peft_model(copy.deepcopy(mlp), small(r=3, scale=0.3)))
    dense = copy.deepcopy(mlp).double()
    for name in ("first", "second"):
        layer, base = model.get_submodule(f"base_model.model.{name}"), dense.get_submodule(name)
        down, up = (weights["default"].detach().double() for weights in (layer.lidb_down, layer.lidb_up))
        a, b = min(8, base.in_features), min(4, base.out_features)
        down_aux = get_basis(BasisKey("down", base.in_features, a, 0), torch.device("cpu")).double()
        up_aux = get_basis(BasisKey("up", base.out_features, b, 0), torch.device("cpu")).double()
        delta = 0.3 * up_aux @ up @ down @ down_aux
        assert torch.allclose(layer.get_delta_weight("default").double(), delta, atol=1e-5)
        base.weight.data += delta
    assert torch.allclose(model(x).double(), dense(x.double()), atol=1e-4)


def test_merge_and_unmerge(mlp, x):
    original = copy.deepcopy(mlp)
    model = shake(get_peft_model(mlp, small()))
    expected = model(x)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(model(x), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(mlp.first.base_layer.weight, original.first.weight, atol=1e-6)
    with model.disable_adapter():
        assert torch.allclose(model(x), original(x), atol=1e-6)
    merged = model.merge_and_unload()
    assert isinstance(merged.first, nn.Linear)
    assert torch.allclose(merged(x), expected, atol=1e-5)


def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_weight(mlp):
    before = mlp.first.weight.clone()
    model = get_peft_model(mlp, small())
    mlp.first.lidb_up["default"].data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(mlp.first.base_layer.weight, before)


def test_unload_gives_the_base_model_back(mlp, x):
    expected = mlp(x)
    model = shake(get_peft_model(mlp, small()))
    assert torch.equal(model.unload()(x), expected)


def test_several_adapters_with_different_ranks_and_seeds(mlp, x):
    base = mlp(x)
    model = shake(get_peft_model(mlp, small()))
    only_first = model(x)
    model.add_adapter("other", small(r=2, seed=7))
    assert torch.equal(model(x), only_first)
    assert not mlp.first.lidb_down["other"].requires_grad
    shake(model, "other", seed=1)
    model.set_adapter("other")
    only_other = model(x)
    assert mlp.first.lidb_down["other"].requires_grad
    assert not mlp.first.lidb_down["default"].requires_grad
    assert not torch.allclose(only_first, only_other, atol=1e-3)
    model.base_model.set_adapter(["default", "other"])
    delta = mlp.second.get_delta_weight("default") + mlp.second.get_delta_weight("other")
    hidden = torch.randn(3, 20)
    assert torch.allclose(mlp.second(hidden), mlp.second.base_layer(hidden) + hidden @ delta.T, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert torch.equal(model(x), only_other)
    assert "default" not in mlp.first.lidb_aux


def test_a_mixed_batch_gives_each_sample_its_adapter(mlp, x):
    model = shake(get_peft_model(mlp, small())).eval()
    model.add_adapter("other", small(r=2, seed=7))
    shake(model, "other", seed=1)
    first = model(x)
    model.set_adapter("other")
    other = model(x)
    with model.disable_adapter():
        base = model(x)
    mixed = model(x, adapter_names=["other", "__base__", "default"])
    assert torch.allclose(mixed, torch.stack([other[0], base[1], first[2]]), atol=1e-5)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): typo"):
        model(x, adapter_names=["typo", "other", "other"])
    with pytest.raises(ValueError, match="got 2 and 3 respectively"):
        model(x, adapter_names=["other", "other"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(x, adapter_names=["other"] * 3)


def test_diffusers_adds_enables_scales_and_deletes_it(new_unet, batch):
    unet = new_unet()
    with torch.no_grad():
        base = unet(*batch).sample
        unet.add_adapter(LiDBConfig(down_dim=12, up_dim=6), adapter_name="face")
        assert torch.equal(unet(*batch).sample, base)
        adapted = shake(unet, "face")(*batch).sample
        unet.disable_adapters()
        assert torch.equal(unet(*batch).sample, base)
        unet.enable_adapters()
        assert torch.equal(unet(*batch).sample, adapted)
        unet.set_adapters(["face"], weights=[0.0])
        assert torch.allclose(unet(*batch).sample, base, atol=1e-6)
        unet.set_adapters(["face"], weights=[1.0])
        assert torch.equal(unet(*batch, cross_attention_kwargs={"scale": 1.0}).sample, adapted)
        state = get_peft_model_state_dict(unet, adapter_name="face")
        other = new_unet()
        other.add_adapter(LiDBConfig(down_dim=12, up_dim=6), adapter_name="loaded")
        set_peft_model_state_dict(other, state, adapter_name="loaded")
        assert torch.equal(other(*batch).sample, adapted)
        unet.delete_adapters("face")
        assert torch.equal(unet(*batch).sample, base)


def test_transformers_adds_it_too(new_text_encoder):
    encoder, ids = new_text_encoder(), torch.arange(16).view(2, 8)
    with torch.no_grad():
        base = encoder(ids)[0]
        encoder.add_adapter(LiDBConfig(down_dim=12, up_dim=6), adapter_name="face")
        assert torch.equal(encoder(ids)[0], base)
        assert not torch.allclose(shake(encoder, "face")(ids)[0], base, atol=1e-3)


def test_adapters_and_bases_stay_float32_beside_a_half_precision_base(mlp, x):
    model = shake(get_peft_model(mlp.bfloat16(), small()))
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert mlp.first.lidb_down["default"].dtype == torch.float32
    model.to(torch.bfloat16)
    model(x.bfloat16())
    assert all(basis.dtype == torch.float32 for basis in mlp.first.lidb_aux["default"])
    native = get_peft_model(MLP().bfloat16(), small(), autocast_adapter_dtype=False)
    assert native.base_model.model.first.lidb_down["default"].dtype == torch.bfloat16


def test_layers_of_one_shape_share_their_bases_also_after_moving(new_unet, batch):
    model = get_peft_model(new_unet(), LiDBConfig()).to(torch.float64).to(torch.float32)
    model(*batch)
    layers = [module for module in model.modules() if isinstance(module, LiDBLinear)]
    downs = {layer.lidb_aux["default"][0].data_ptr() for layer in layers}
    assert len(downs) == len({layer.in_features for layer in layers})


def test_stored_projections_are_used_at_load(mlp, x, tmp_path):
    model = shake(get_peft_model(copy.deepcopy(mlp), small(save_projection=True)))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert sum(key.endswith(".values") for key in tensors) == 4
    tensors["lidb_basis.down:12:8.values"] = tensors["lidb_basis.down:12:8.values"].flip(0).contiguous()
    save_file(tensors, file)
    loaded = PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path)
    assert not torch.allclose(loaded(x), model(x), atol=1e-3)
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path / "again")
    assert torch.equal(again(x), loaded(x))


def _tampered(mlp, tmp_path, change):
    shake(get_peft_model(copy.deepcopy(mlp), small())).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return PeftModel.from_pretrained(copy.deepcopy(mlp), tmp_path)


def test_a_checkpoint_that_does_not_fit_is_an_error_and_never_a_fresh_adapter(mlp, tmp_path):
    name = "base_model.model.first.lidb_up"
    record = "lidb_basis.down:12:8.record"
    with pytest.raises(ValueError, match=r"missing keys \['base_model.model.first.lidb_up.default'\]"):
        _tampered(mlp, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=r"unexpected keys \['base_model.model.third.lidb_up'\]"):
        _tampered(mlp, tmp_path, lambda tensors: tensors.update({name.replace("first", "third"): tensors[name] * 1}))
    with pytest.raises(ValueError, match=r"unexpected keys \['base_model.model.third.bias'\]"):
        _tampered(mlp, tmp_path, lambda tensors: tensors.update({"base_model.model.third.bias": torch.zeros(6)}))
    with pytest.raises(ValueError, match="was made with another down:12:8 basis"):
        _tampered(mlp, tmp_path, lambda tensors: tensors[record][0].add_(1))
    with pytest.raises(ValueError, match="records other values of the down:12:8 basis"):
        _tampered(mlp, tmp_path, lambda tensors: tensors[record][-1].add_(1e-4))
    with pytest.raises(ValueError, match="has no record of its down:12:8 basis"):
        _tampered(mlp, tmp_path, lambda tensors: tensors.pop(record))


@pytest.mark.parametrize("bias", ["lidb_only", "all"])
def test_biases_and_whole_modules_are_trained_and_saved(bias, x, tmp_path):
    model = get_peft_model(MLP(), small(target_modules=["first"], bias=bias, modules_to_save=["second"]))
    shake(model)
    with torch.no_grad():
        model.base_model.model.first.base_layer.bias.fill_(0.5)
        model.base_model.model.second.modules_to_save["default"].weight.fill_(0.25)
        model.base_model.model.second.modules_to_save["default"].bias.fill_(0.75)
    assert model.base_model.model.first.base_layer.bias.requires_grad
    model.save_pretrained(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = MLP()
    base.first.weight.data.copy_(model.base_model.model.first.base_layer.weight)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x), model(x))


def test_copies_and_pickles_work(mlp, x):
    model = shake(get_peft_model(mlp, small()))
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


@pytest.mark.filterwarnings("ignore:.*second time", "ignore:Already found a `peft_config`")
def test_it_converts_to_lora_and_carries_one(mlp, x):
    model = shake(get_peft_model(mlp, small(r=2))).eval()
    expected = model(x)
    config, state = convert_to_lora(model, rank=2)
    on_top = get_peft_model(model.base_model.model, LoraConfig(r=2, target_modules=["first"]), adapter_name="more")
    assert torch.allclose(on_top(x), expected, atol=1e-6)
    delta = state["base_model.model.first.lora_B.weight"] @ state["base_model.model.first.lora_A.weight"]
    assert config.r == 2
    assert torch.allclose(delta, mlp.first.base_layer.get_delta_weight("default"), atol=1e-5)


def test_sequential_offloading_brings_the_weights_in(new_unet, batch):
    from accelerate import cpu_offload

    unet = new_unet()
    unet.add_adapter(LiDBConfig(down_dim=12, up_dim=6, init_weights=False), "face")
    with torch.no_grad():
        expected = unet(*batch).sample
        cpu_offload(unet, execution_device=torch.device("cpu"))  # a pipeline's enable_sequential_cpu_offload, for a GPU
        assert all(parameter.is_meta for name, parameter in unet.named_parameters() if "lidb_" in name)
        assert torch.equal(unet(*batch).sample, expected)


def test_it_answers_what_diffusers_asks_of_a_layer(mlp):
    from diffusers.utils import get_adapter_name

    model = get_peft_model(mlp, small())
    model.add_adapter("other", small(r=2))
    assert get_adapter_name(model) == "default_2"
    assert "default" not in mlp.first.lora_A  # so set_lora_device passes it by


def test_other_layers_are_refused_in_words():
    with pytest.raises(TypeError, match=r"only `torch\.nn\.Linear` \(optionally quantized\)"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 3, 1)), LiDBConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), LiDBConfig())


def test_random_weights_change_the_output(mlp, x):
    expected = mlp(x)
    assert not torch.allclose(get_peft_model(mlp, small(init_weights=False))(x), expected, atol=1e-3)
