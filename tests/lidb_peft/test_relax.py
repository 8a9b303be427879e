import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lidb_peft import LiDBConfig
from lidb_peft.relax import RELAXED_ADAPTER, THETA_ADAPTER, combine, peft_factors, relax
from lidb_peft.space import LiDBSpace

CONFIG = LiDBConfig(r=1, down_dim=12, up_dim=10, scale=0.7)


@pytest.fixture
def unet(new_unet):
    return new_unet().requires_grad_(False)


@pytest.fixture
def theta_factors(unet):
    space = LiDBSpace({"unet": copy.deepcopy(unet)}, CONFIG)
    noise = torch.randn(space.num_layers, space.row_size, generator=torch.Generator().manual_seed(0))
    return space.factors(space.theta_0 + 0.3 * noise)


def add_to_weights(model, factors):
    """The dense updates on a copy of the base, in float64: what a LoRA file means to its readers."""
    model = copy.deepcopy(model).double()
    for name, (lora_A, lora_B) in factors.items():
        model.get_submodule(name.removeprefix("unet.")).weight.data += lora_B.double() @ lora_A.double()
    return model


def train_a_little(model, batch):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(*batch).sample.float().square().mean().backward()
        optimizer.step()


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def double(batch):
    return batch[0].double(), batch[1], batch[2].double()


def equal_up_to_rounding(found, dense, batch):
    """Whether a float32 output is as near to the float64 model ``dense`` as that model itself in float32, twice over.

    How near that is depends on the processor's kernels.
    """
    expected = dense(*double(batch)).sample
    return relative(found, expected) < 2 * relative(copy.deepcopy(dense).float()(*batch).sample, expected) < 1e-5


@pytest.mark.parametrize("merge", [False, True])
def test_relaxing_changes_nothing(unet, theta_factors, batch, merge):
    with torch.no_grad():
        dense = add_to_weights(unet, theta_factors)
        relaxed = relax(copy.deepcopy(unet), theta_factors, rank=4, merge=merge)
        assert equal_up_to_rounding(relaxed(*batch).sample, dense, batch)
        assert relative(unet(*batch).sample, dense(*double(batch)).sample) > 1e-2


def test_theta_stays_frozen_and_the_fresh_lora_trains(unet, theta_factors, batch):
    relaxed = relax(unet, theta_factors, rank=4)
    before = peft_factors(relaxed, "unet", THETA_ADAPTER)
    with relaxed.disable_adapter():  # on leaving, PEFT makes the active adapters trainable again
        pass
    train_a_little(relaxed, batch)
    trainable = {name for name, p in relaxed.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in relaxed.named_parameters() if f".{RELAXED_ADAPTER}." in n}
    after = peft_factors(relaxed, "unet", THETA_ADAPTER)
    fresh = peft_factors(relaxed, "unet", RELAXED_ADAPTER)
    assert set(before) == set(theta_factors) == set(fresh)
    for name, (lora_A, lora_B) in theta_factors.items():
        assert torch.equal(after[name][0], lora_A)
        assert torch.equal(after[name][1], lora_B)
        assert fresh[name][0].shape[0] == 4
        assert fresh[name][1].any()


def test_the_combined_lora_on_the_untouched_base_equals_the_relaxed_model(unet, theta_factors, batch):
    relaxed = relax(copy.deepcopy(unet), theta_factors, rank=4)
    train_a_little(relaxed, batch)
    combined = combine(theta_factors, peft_factors(relaxed, "unet", RELAXED_ADAPTER))
    assert {lora_A.shape[0] for lora_A, _ in combined.values()} == {5}
    with torch.no_grad():
        assert equal_up_to_rounding(relaxed(*batch).sample, add_to_weights(unet, combined), batch)


def test_in_bf16_the_combined_lora_equals_the_relaxed_model_to_2_percent(unet, theta_factors, batch):
    generator = torch.Generator().manual_seed(0)
    relaxed = relax(copy.deepcopy(unet).bfloat16(), theta_factors, rank=4, generator=generator)
    half = batch[0].bfloat16(), batch[1], batch[2].bfloat16()
    train_a_little(relaxed, half)
    assert {p.dtype for p in relaxed.parameters() if p.requires_grad} == {torch.float32}
    combined = combine(theta_factors, peft_factors(relaxed, "unet", RELAXED_ADAPTER))
    base = copy.deepcopy(unet).bfloat16()
    lora = get_peft_model(base, LoraConfig(r=5, lora_alpha=5, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        for name, (lora_A, lora_B) in combined.items():
            layer = base.get_submodule(name.removeprefix("unet."))
            layer.lora_A["default"].weight.copy_(lora_A)
            layer.lora_B["default"].weight.copy_(lora_B)
        # bf16 itself is 1.3 % from float32 on this model; the two only add their parts in another order
        assert relative(lora(*half).sample, relaxed(*half).sample) < 0.02


def test_merging_is_in_float32_and_leaves_only_the_lora(unet, theta_factors):
    relaxed = relax(unet.bfloat16(), theta_factors, rank=2, merge=True)
    assert {p.dtype for p in relaxed.parameters()} == {torch.float32}
    assert list(relaxed.peft_config) == [RELAXED_ADAPTER]


def test_the_generator_alone_decides_the_fresh_lora(unet, theta_factors):
    first, second = (
        relax(copy.deepcopy(unet), theta_factors, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    first, second = (peft_factors(model, "unet", RELAXED_ADAPTER) for model in (first, second))
    assert all(torch.equal(first[name][0], second[name][0]) for name in first)
    assert all(lora_A.abs().max() <= lora_A.shape[1] ** -0.5 for lora_A, _ in first.values())


def test_factors_of_a_lidb_adapter_are_its_spaces(unet, theta_factors):
    model = get_peft_model(unet, CONFIG)
    space = LiDBSpace({"unet": model}, CONFIG)
    noise = torch.randn(space.num_layers, space.row_size, generator=torch.Generator().manual_seed(0))
    space.load_into_adapters(space.theta_0 + 0.3 * noise)
    factors = peft_factors(model, "unet")
    assert set(factors) == set(theta_factors)
    for name, (lora_A, lora_B) in theta_factors.items():
        assert torch.allclose(factors[name][0], lora_A, atol=1e-6)
        assert torch.allclose(factors[name][1], lora_B, atol=1e-6)


def test_factors_of_a_lora_have_its_scale_folded_in(unet):
    model = get_peft_model(unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora_A, lora_B = peft_factors(model, "unet")[f"unet.{name}"]
    delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
    assert torch.allclose(lora_B @ lora_A, delta, atol=1e-6)


def test_a_batch_of_identities_combines_too():
    theta = {"unet.x": (torch.randn(3, 1, 6), torch.randn(3, 5, 1))}
    lora = {"unet.x": (torch.randn(3, 2, 6), torch.randn(3, 5, 2))}
    lora_A, lora_B = combine(theta, lora)["unet.x"]
    expected = theta["unet.x"][1] @ theta["unet.x"][0] + lora["unet.x"][1] @ lora["unet.x"][0]
    assert torch.allclose(lora_B @ lora_A, expected, atol=1e-5)


def test_what_does_not_fit_is_refused_in_words(unet, theta_factors):
    name = next(iter(theta_factors))
    lora_A, lora_B = theta_factors[name]
    with pytest.raises(ValueError, match="rank is 0; choose 1 or more"):
        relax(unet, theta_factors, rank=0)
    with pytest.raises(ValueError, match=r"0 of its layers"):
        relax(unet, theta_factors, rank=1, component="text_encoder")
    with pytest.raises(ValueError, match=r"missing \['unet.nowhere'\]"):
        relax(unet, {**theta_factors, "unet.nowhere": (lora_A, lora_B)}, rank=1)
    with pytest.raises(ValueError, match=f"the factors of {name} have shapes"):
        relax(unet, {**theta_factors, name: (lora_A[:, 1:], lora_B)}, rank=1)
    with pytest.raises(ValueError, match=r"ranks \[1, 2\]"):
        relax(unet, {**theta_factors, name: (lora_A.repeat(2, 1), lora_B.repeat(1, 2))}, rank=1)
    with pytest.raises(ValueError, match=f"only theta on \\['{name}'\\], only LoRA on \\[\\]"):
        combine(theta_factors, {key: value for key, value in theta_factors.items() if key != name})
    with pytest.raises(ValueError, match=f"the updates of {name} map"):
        combine(theta_factors, {**theta_factors, name: (lora_A[:, 1:], lora_B)})
    with pytest.raises(ValueError, match="the unet has no LiDB or LoRA adapter called 'default'"):
        peft_factors(unet, "unet")
    relaxed = relax(unet, theta_factors, rank=1)
    with pytest.raises(ValueError, match="already has adapters"):
        relax(relaxed, theta_factors, rank=1)
