"""One adapted layer: the kinds of base layer, merging, dropout, copies."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lidb_peft import LiDBConfig, bases
from lidb_peft.bases import get_basis

CPU = torch.device("cpu")
IN, OUT = 24, 20


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapted(base, adapter="default", seed=0, **changes):
    """Return a PEFT model of one layer, "0", whose adapter has values, and that layer."""
    config = LiDBConfig(**({"target_modules": ["0"], "down_dim": 8, "up_dim": 6, "r": 2} | changes))
    model = get_peft_model(nn.Sequential(base), config, adapter_name=adapter)
    return model, fill(model.base_model.model[0], adapter, seed)


@torch.no_grad()
def fill(layer, adapter, seed=0):
    layer.lidb_down[adapter].copy_(random(*layer.lidb_down[adapter].shape, seed=seed))
    layer.lidb_up[adapter].copy_(random(*layer.lidb_up[adapter].shape, seed=seed + 1))
    return layer


def dense_update(layer, adapter="default"):
    """``dW`` ``(out, in)``, float64, multiplied out from its four factors."""
    down_aux, up_aux = (get_basis(key, CPU).double() for key in layer.lidb_keys[adapter])
    down, up = layer.lidb_down[adapter].detach().double(), layer.lidb_up[adapter].detach().double()
    return up_aux @ up @ down @ down_aux


def linear(dtype=torch.float32):
    base = nn.Linear(IN, OUT)
    with torch.no_grad():
        base.weight.copy_(random(OUT, IN, seed=7))
        base.bias.copy_(random(OUT, seed=8))
    return base.to(dtype)


def conv1d():
    base = Conv1D(OUT, IN)
    with torch.no_grad():
        base.weight.copy_(random(IN, OUT, seed=7))
        base.bias.copy_(random(OUT, seed=8))
    return base


@pytest.mark.parametrize("make", [linear, conv1d])
def test_both_orientations_of_the_weight_equal_the_dense_product(make):
    model, layer = adapted(make())
    x = random(3, 5, IN)
    expected = layer.base_layer(x).double() + x.double() @ dense_update(layer).T
    assert torch.allclose(model(x).double(), expected, atol=1e-5)
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape
    merged = model.merge_and_unload()
    assert type(merged[0]) is type(make())
    assert torch.allclose(merged(x).double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_brings_every_bit_of_the_weight_back(dtype):
    base = linear(dtype)
    before, parameter = base.weight.detach().clone(), base.weight
    model, layer = adapted(base)
    model.add_adapter("other", LiDBConfig(target_modules=["0"], down_dim=8, up_dim=6))
    fill(layer, "other", seed=4)
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        layer.merge(adapter_names=["default", "other"])
    expected = before.double() + dense_update(layer) + dense_update(layer, "other")
    assert torch.allclose(
        base.weight.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * expected.abs().max()
    )
    layer.unmerge()
    assert torch.equal(base.weight, before)
    assert base.weight is parameter  # an optimiser or a tied layer still has it
    assert not layer.merged
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_dropout_drops_the_input_of_the_update_while_training():
    model, layer = adapted(linear(), lidb_dropout=0.5)
    x = random(4, IN)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        dropped = nn.functional.dropout(x, 0.5)
        torch.manual_seed(3)
        found = model.train()(x)
    update = dense_update(layer).float().T
    assert torch.allclose(found, layer.base_layer(x) + dropped @ update, atol=1e-5)
    assert torch.allclose(model.eval()(x), layer.base_layer(x) + x @ update, atol=1e-5)
    with pytest.raises(ValueError, match=r"lidb_dropout is 1.0; choose a number from 0 to below 1"):
        LiDBConfig(lidb_dropout=1.0)


def test_gradients_are_the_same_under_checkpointing():
    model, layer = adapted(linear())
    x = random(4, IN).requires_grad_()
    parameters = [layer.lidb_down["default"], layer.lidb_up["default"], x]
    plain = torch.autograd.grad(model(x).square().sum(), parameters)
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), parameters)
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in plain)


def test_copies_share_the_bases_and_bases_follow_the_weights():
    _, layer = adapted(linear())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.lidb_down["default"] is not layer.lidb_down["default"]
        assert all(a is b for a, b in zip(other.lidb_aux["default"], layer.lidb_aux["default"], strict=True))
    layer.to("meta")
    assert all(basis.is_meta for basis in layer.lidb_aux["default"])


def test_a_pickle_brings_its_bases_to_where_they_are_not_known(monkeypatch):
    model, _ = adapted(linear())
    model.base_model.use_bases({"down:24:8": random(8, IN), "up:20:6": random(OUT, 6)})
    x = random(3, IN)
    expected, pickled = model(x), pickle.dumps(model)
    monkeypatch.setattr(bases, "_stored", {})  # as in a fresh process
    get_basis.cache_clear()
    loaded = pickle.loads(pickled)
    loaded.add_adapter("other", LiDBConfig(target_modules=["0"]))
    loaded.base_model.model[0].lidb_aux.clear()  # look them up again, as moving to another device does
    assert torch.equal(loaded(x), expected)


def quantised(bits):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    options = {"has_fp16_weights": False} if bits == 8 else {"quant_type": "nf4", "compute_dtype": torch.float32}
    layer = (bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit)(IN, OUT, **options)
    layer.load_state_dict(linear().state_dict(), strict=False)
    return layer.to("cpu")  # which quantises


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_layers_are_adapted_trained_merged_and_unmerged(bits):
    base = quantised(bits)
    x = random(3, IN)
    plain = base(x).detach()
    model, layer = adapted(base)
    adapted_output = model(x)
    assert torch.allclose(adapted_output, plain + x @ dense_update(layer).float().T, atol=1e-4)
    adapted_output.square().sum().backward()
    assert all(p["default"].grad.abs().max() > 0 for p in (layer.lidb_down, layer.lidb_up))
    weight = layer.get_base_weight().clone()
    layer.merge(safe_merge=True)
    # Rounding the sum to 8 or 4 bits again costs up to half a step of the largest weight of a row or block.
    step = (weight.double() + dense_update(layer)).abs().max() / (127 if bits == 8 else 4)
    assert torch.allclose(layer.get_base_weight().double(), weight.double() + dense_update(layer), atol=step.item())
    assert base.weight.dtype == (torch.int8 if bits == 8 else torch.uint8)
    layer.unmerge()
    # 8 bits come back exactly; the scales of 4-bit blocks are themselves rounded, to 8 bits.
    assert torch.allclose(layer.get_base_weight(), weight, rtol=0, atol=0 if bits == 8 else 0.01)
    assert torch.allclose(model(x), adapted_output, atol=1e-6 if bits == 8 else 0.1)
