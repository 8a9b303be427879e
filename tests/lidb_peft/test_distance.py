"""Distances between updates, against the dense matrices."""

import pytest
import torch

from lidb_peft import LiDBConfig, LiDBSpace, squared_distance
from lidb_peft.bases import get_basis
from lidb_peft.layout import distinct_basis_keys, split_theta

CONFIG = LiDBConfig(r=2, down_dim=28, up_dim=40, scale=0.5)  # wider than the text encoder's 24


@pytest.fixture
def space(new_unet, new_text_encoder):
    return LiDBSpace({"unet": new_unet(), "text_encoder": new_text_encoder()}, CONFIG)


def random_theta(space, *batch, seed):
    """Also the padding holds numbers; they must not count."""
    noise = torch.randn(*batch, space.num_layers, space.row_size, generator=torch.Generator().manual_seed(seed))
    return space.theta_0 + 0.3 * noise


def random_bases(space, seed):
    """Bases that are far from orthonormal."""
    generator = torch.Generator().manual_seed(seed)
    keys = distinct_basis_keys(space.shapes, space.config)
    return {key.label: 0.3 * torch.randn(key.shape, generator=generator) for key in keys}


def dense(space, theta, bases):
    """Each layer's update as a matrix, float64."""
    updates = []
    for index, row in enumerate(theta.double()):
        down_key, up_key = space.basis_keys(index)
        down_aux, up_aux = (
            get_basis(key, torch.device("cpu")) if bases is None else bases[key.label] for key in (down_key, up_key)
        )
        down, up = split_theta(row, CONFIG)
        down, up = down[:, : down_key.dim], up[: up_key.dim]
        updates.append(CONFIG.scale * up_aux.double() @ up @ down @ down_aux.double())
    return updates


@pytest.mark.parametrize(("learned", "other_learned"), [(False, False), (True, False), (False, True), (True, True)])
def test_it_is_the_frobenius_norm_of_the_dense_difference(space, learned, other_learned):
    theta, other = random_theta(space, 3, seed=0), random_theta(space, seed=1)
    bases = random_bases(space, seed=2) if learned else None
    other_bases = random_bases(space, seed=3) if other_learned else None
    found = squared_distance(space, theta, other, bases, other_bases)
    assert found.shape == (3, space.num_layers)
    for i in range(3):
        pairs = zip(dense(space, theta[i], bases), dense(space, other, other_bases), strict=True)
        expected = torch.stack([(first - second).pow(2).sum() for first, second in pairs])
        assert torch.allclose(found[i].double(), expected, rtol=1e-4)


def test_it_is_blind_to_the_gauge(space):
    theta = random_theta(space, seed=0)
    scaled = theta.clone()
    down, up = split_theta(scaled, CONFIG)
    down *= 3
    up /= 3
    norms = squared_distance(space, theta, space.theta_0)
    assert (squared_distance(space, theta, scaled).abs() < 1e-5 * norms).all()
    bases = random_bases(space, seed=1)
    norms = squared_distance(space, theta, space.theta_0, bases)
    assert (squared_distance(space, theta, scaled, bases, bases).abs() < 1e-5 * norms).all()


def test_it_is_differentiable_in_thetas_and_bases(space):
    theta, other = random_theta(space, seed=0).requires_grad_(), random_theta(space, seed=1)
    bases = {label: basis.requires_grad_() for label, basis in random_bases(space, seed=2).items()}
    squared_distance(space, theta, other, bases).sum().backward()
    used = [basis.clone().detach().requires_grad_() for basis in bases.values()]
    copy = theta.detach().clone().requires_grad_()
    updates = dense(space, copy, dict(zip(bases, used, strict=True)))
    pairs = zip(updates, dense(space, other, None), strict=True)
    sum((first - second).pow(2).sum() for first, second in pairs).backward()
    assert torch.allclose(theta.grad, copy.grad, rtol=1e-3, atol=1e-4)
    assert not theta.grad[~space.mask].any()
    for basis, expected in zip(bases.values(), used, strict=True):
        assert torch.allclose(basis.grad, expected.grad, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused(space):
    with pytest.raises(ValueError, match="theta has shape"):
        squared_distance(space, torch.zeros(2, 3), space.theta_0)
    bases = random_bases(space, seed=0)
    label = min(bases)
    with pytest.raises(ValueError, match=f"the learned bases have no {label} basis of shape"):
        squared_distance(space, space.theta_0, space.theta_0, bases | {label: torch.zeros(2, 2)})
