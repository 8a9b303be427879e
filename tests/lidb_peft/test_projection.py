"""A LoRA is projected onto the nearest theta."""

import pytest
import torch

from lidb_peft import LiDBConfig, LiDBSpace, peft_factors, project_lora
from lidb_peft.bases import get_basis
from lidb_peft.layout import split_theta, starting_theta, theta_mask
from lidb_peft.stacks import LayerGroups

CPU = torch.device("cpu")
NAME = "unet.attn1.to_q"
SHAPES = {NAME: (24, 16), "unet.attn1.to_k": (5, 16)}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(rank, shape=(24, 16), seed=0):
    return random(rank, shape[0], seed=seed), random(shape[1], rank, seed=seed + 1)


def factors_of(config, theta, bases=None):
    groups = LayerGroups(SHAPES)
    return dict(zip(SHAPES, groups.unstack(groups.expand(theta, config, bases)), strict=True))


def update(config, theta, name=NAME, bases=None):
    lora_A, lora_B = factors_of(config, theta, bases)[name]
    return lora_B.double() @ lora_A.double()


def learned_bases(config):
    """Bases by label that are far from orthonormal."""
    keys = {key for shape in SHAPES.values() for key in config.basis_keys(*shape)}
    return {key.label: random(*key.shape, seed=index) for index, key in enumerate(sorted(keys))}


@pytest.mark.parametrize("r", [1, 3])
def test_the_update_of_a_theta_comes_back_whole(r):
    config = LiDBConfig(r=r, down_dim=10, up_dim=6, scale=0.3, seed=4)
    theta = starting_theta(list(SHAPES.values()), config)
    theta += 0.5 * random(*theta.shape) * theta_mask(list(SHAPES.values()), config)
    factors = factors_of(config, theta)
    found, residuals = project_lora(SHAPES, config, factors)
    for name in SHAPES:
        assert torch.allclose(update(config, found, name), update(config, theta, name), atol=1e-5)
    assert residuals.max() < 1e-5
    again, _ = project_lora(SHAPES, config, {n: (a * -3, b / -3) for n, (a, b) in factors.items()})
    assert torch.allclose(again, found, atol=1e-5)  # one update, one theta


@pytest.mark.parametrize("learned", [False, True])
def test_nothing_in_the_bases_is_nearer(learned):
    """Against dense arithmetic: orthogonal projectors from the pseudo-inverse, then Eckart-Young."""
    config = LiDBConfig(r=2, down_dim=10, up_dim=6)
    bases = learned_bases(config) if learned else None
    lora_A, lora_B = lora(8)
    theta, residuals = project_lora(SHAPES, config, {NAME: (lora_A, lora_B)}, bases)
    down_key, up_key = config.basis_keys(24, 16)
    down_aux, up_aux = (bases[k.label] if learned else get_basis(k, CPU) for k in (down_key, up_key))
    dense = lora_B.double() @ lora_A.double()
    inside = (up_aux.double() @ torch.linalg.pinv(up_aux.double())) @ dense
    inside = inside @ (torch.linalg.pinv(down_aux.double()) @ down_aux.double())
    left, singular, right = torch.linalg.svd(inside)
    best = (left[:, :2] * singular[:2]) @ right[:2]
    assert torch.allclose(update(config, theta, bases=bases), best, atol=1e-4)
    assert residuals[0].item() == pytest.approx(((dense - best).norm() / dense.norm()).item(), abs=1e-6)


def test_both_halves_have_one_norm_and_lie_on_the_side_of_the_start():
    config = LiDBConfig(down_dim=10, up_dim=6)
    theta, _ = project_lora(SHAPES, config, {NAME: lora(4)})
    down, up = theta[0, :10], theta[0, 10:]
    assert torch.allclose(down.norm(), up.norm())
    assert down @ starting_theta(list(SHAPES.values()), config)[0, :10] > 0


def test_a_layer_without_factors_and_an_update_of_zero_are_the_identity():
    config = LiDBConfig(r=2, down_dim=10, up_dim=6)
    lora_A, lora_B = lora(4)
    theta, residuals = project_lora(SHAPES, config, {NAME: (lora_A, lora_B * 0)})
    assert torch.equal(theta, starting_theta(list(SHAPES.values()), config))
    assert residuals.tolist() == [0, 0]


def test_ranks_that_the_lora_lacks_stay_at_the_start():
    config = LiDBConfig(r=3, down_dim=10, up_dim=6)
    theta, _ = project_lora(SHAPES, config, {NAME: lora(2)})
    down, up = split_theta(theta[0], config)
    assert torch.equal(down[2], split_theta(starting_theta(list(SHAPES.values()), config)[0], config)[0][2])
    assert up[:, 2].norm() == 0
    assert up[:, :2].norm(dim=0).min() > 0.1


def test_it_is_the_way_back_from_a_peft_lora(new_unet, batch):
    from peft import LoraConfig, get_peft_model

    config = LiDBConfig(r=2, down_dim=12, up_dim=6, target_modules=["to_q", "to_k"])
    source = get_peft_model(new_unet(), LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"]))
    space = LiDBSpace({"unet": get_peft_model(new_unet(), config)}, config)
    theta = starting_theta(space.shapes, config) + 0.1 * random(space.num_layers, space.row_size) * space.mask
    with torch.no_grad():
        for name, (lora_A, lora_B) in space.factors(theta).items():
            layer = source.base_model.model.get_submodule(name.removeprefix("unet."))
            layer.lora_A["default"].weight.copy_(lora_A)
            layer.lora_B["default"].weight.copy_(lora_B / 2)  # alpha / r
        found, residuals = project_lora(space.named_shapes, config, peft_factors(source, "unet"))
        space.load_into_adapters(found)
        assert residuals.max() < 1e-5
        assert torch.allclose(space.models["unet"](*batch).sample, source(*batch).sample, atol=1e-5)


def test_what_does_not_fit_is_refused():
    config = LiDBConfig(down_dim=10, up_dim=6)
    with pytest.raises(ValueError, match=r"theta has no row for \['unet.ff'\]; leave out these layers"):
        project_lora(SHAPES, config, {"unet.ff": lora(2)})
    with pytest.raises(ValueError, match=r"have shapes \[\(2, 16\), \(24, 2\)\]; expected \(k, 24\) and \(16, k\)"):
        project_lora(SHAPES, config, {NAME: lora(2, (16, 24))})
    with pytest.raises(ValueError, match="hold values that are not finite"):
        project_lora(SHAPES, config, {NAME: (lora(2)[0] * float("inf"), lora(2)[1])})
    with pytest.raises(ValueError, match="scale is 0"):
        project_lora(SHAPES, LiDBConfig(scale=0.0), {NAME: lora(2)})
