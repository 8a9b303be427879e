"""Per-sample weights under gradient checkpointing: the recomputation must see the factors of its own forward."""

import functools
import threading

import pytest
import torch
import torch.utils.checkpoint

from lidb_peft import LiDBConfig
from lidb_peft.space import LiDBSpace

CONFIG = LiDBConfig(r=1, down_dim=12, up_dim=10)
# torch says so of blocks without adapted layers, before the first one with some
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
MODES = {"non-reentrant": False, "reentrant": True}


@pytest.fixture
def models(new_unet, new_text_encoder):
    models = {"unet": new_unet(), "text_encoder": new_text_encoder()}
    for model in models.values():
        model.requires_grad_(False).train()
    return models


@pytest.fixture
def space(models):
    return LiDBSpace(models, CONFIG)


@pytest.fixture
def switch_on(checkpointing):
    """A function: (models, reentrant) -> nothing; by the models' own methods, as users do."""
    return _switch_on


def _switch_on(models, reentrant):
    keywords = {"use_reentrant": reentrant}
    if reentrant:
        models["unet"].enable_gradient_checkpointing(
            lambda module, *args: torch.utils.checkpoint.checkpoint(module.__call__, *args, use_reentrant=True)
        )
    else:
        models["unet"].enable_gradient_checkpointing()
    encoder = models["text_encoder"]
    enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
    enable(keywords)


def make_inputs(samples=2, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, 4, 8, 8, generator=generator),
        torch.randint(0, 1000, (samples,), generator=generator),
        torch.randint(0, 48, (samples, 8), generator=generator),
    )


def make_theta(space, *batch, seed=0):
    noise = torch.randn(*batch, space.num_layers, space.row_size, generator=torch.Generator().manual_seed(seed))
    return (space.theta_0 + 0.2 * noise * space.mask).requires_grad_()


def loss_of(models, latents, timesteps, ids):
    return models["unet"](latents, timesteps, models["text_encoder"](ids)[0]).sample.square().mean(dim=(1, 2, 3)).sum()


def gradient(models, space, seed=0, samples=2):
    theta = make_theta(space, samples, seed=seed)
    with space.apply(theta):
        loss_of(models, *make_inputs(samples)).backward()
    return theta.grad


def close(found, expected):
    return (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside the block", "backward after the block"])
def test_gradients_are_those_without_checkpointing(models, space, reentrant, inside, switch_on):
    expected = gradient(models, space)
    switch_on(models, reentrant)
    theta = make_theta(space, 2)
    with space.apply(theta):
        loss = loss_of(models, *make_inputs())
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert close(theta.grad, expected)
    assert all(row.any() for row in theta.grad[0])


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
def test_two_forwards_with_different_weights_before_one_backward(models, space, reentrant, switch_on):
    expected = [gradient(models, space, seed) for seed in (1, 2)]
    switch_on(models, reentrant)
    thetas = [make_theta(space, 2, seed=seed) for seed in (1, 2)]
    losses = []
    for theta in thetas:
        with space.apply(theta):
            losses.append(loss_of(models, *make_inputs()))
    with space.apply(make_theta(space, seed=3)):  # an unrelated block is open while the others are recomputed
        sum(losses).backward()
    assert all(close(theta.grad, want) for theta, want in zip(thetas, expected, strict=True))


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
def test_backwards_in_the_order_of_the_forwards(models, space, reentrant, switch_on):
    expected = [gradient(models, space, seed) for seed in (1, 2)]
    switch_on(models, reentrant)
    thetas = [make_theta(space, 2, seed=seed) for seed in (1, 2)]
    losses = []
    for theta in thetas:
        with space.apply(theta):
            losses.append(loss_of(models, *make_inputs()))
    for theta, loss, want in zip(thetas, losses, expected, strict=True):
        loss.backward()
        assert close(theta.grad, want)


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
def test_other_blocks_and_sampling_may_come_in_between(models, space, reentrant, switch_on):
    expected = gradient(models, space)
    switch_on(models, reentrant)
    theta, other = make_theta(space, 2), make_theta(space, seed=9)
    with space.apply(theta):
        with torch.no_grad(), space.apply(other):
            sampled = loss_of(models, *make_inputs())
        loss = loss_of(models, *make_inputs())
        with torch.no_grad():
            loss_of(models, *make_inputs(4))
    with torch.no_grad():
        base = loss_of(models, *make_inputs())
    loss.backward()
    assert close(theta.grad, expected)
    assert other.grad is None
    assert not torch.allclose(sampled, base)


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
def test_a_batch_equals_one_at_a_time(models, space, reentrant, switch_on):
    switch_on(models, reentrant)
    together = gradient(models, space, samples=3)
    inputs = make_inputs(3)
    for i in range(3):
        theta = make_theta(space, 3).detach()[i].clone().requires_grad_()
        with space.apply(theta):
            loss = loss_of(models, *(part[i : i + 1] for part in inputs))
        loss.backward()
        assert close(theta.grad, together[i])


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
def test_a_lora_beside_a_frozen_theta(models, space, reentrant, switch_on):
    theta = make_theta(space).detach()
    generator = torch.Generator().manual_seed(0)
    flat = space.init_lora(2, generator) + 0.05 * torch.randn(2, space.lora_size(2), generator=generator)
    gradients = []
    for on in (False, True):
        if on:
            switch_on(models, reentrant)
        leaf = flat.clone().requires_grad_()
        with space.apply(space.expand(theta), space.split_lora(leaf, 2)):
            loss = loss_of(models, *make_inputs())
        loss.backward()
        gradients.append(leaf.grad)
    assert close(gradients[1], gradients[0])


def test_the_models_own_checkpointing_functions_come_back(models, space, switch_on):
    switch_on(models, reentrant=False)
    owners = [m for model in models.values() for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    before = [owner._gradient_checkpointing_func for owner in owners]
    assert owners
    with space.apply(space.theta_0):
        with pytest.raises(ZeroDivisionError), space.apply(space.theta_0):
            raise ZeroDivisionError
        assert any(owner._gradient_checkpointing_func is not f for owner, f in zip(owners, before, strict=True))
    assert all(owner._gradient_checkpointing_func is f for owner, f in zip(owners, before, strict=True))


def test_checkpointing_that_bypasses_the_models_is_an_error_and_not_a_wrong_gradient(models, space):
    latents, timesteps, ids = make_inputs()
    unet = models["unet"]
    for reentrant in MODES.values():
        theta = make_theta(space, 2)
        inputs = latents.clone().requires_grad_()
        with space.apply(theta):
            prompts = models["text_encoder"](ids)[0]
            function = functools.partial(unet, return_dict=False)
            (sample,) = torch.utils.checkpoint.checkpoint(function, inputs, timesteps, prompts, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match="recomputes a layer without its factors"):
            sample.square().sum().backward()


def test_training_the_base_model_after_sampling_in_the_space_is_no_concern_of_it(models, space, switch_on):
    latents, timesteps, ids = make_inputs()
    with torch.no_grad(), space.apply(space.theta_0):
        loss_of(models, latents, timesteps, ids)
    models["unet"].requires_grad_(True)
    switch_on(models, reentrant=False)
    loss_of(models, latents, timesteps, ids).backward()
    assert models["unet"].conv_out.weight.grad.any()


@pytest.mark.parametrize("reentrant", MODES.values(), ids=MODES)
def test_backward_may_run_in_another_thread(models, space, reentrant, switch_on):
    """As autograd does for every backward on a GPU."""
    expected = gradient(models, space)
    switch_on(models, reentrant)
    theta = make_theta(space, 2)
    with space.apply(theta):
        thread = threading.Thread(target=loss_of(models, *make_inputs()).backward)
        thread.start()
        thread.join()
    assert close(theta.grad, expected)


def test_the_graph_outlives_the_space(models, switch_on):
    space = LiDBSpace(models, CONFIG)
    expected = gradient(models, space)
    switch_on(models, reentrant=False)
    theta = make_theta(space, 2)
    with space.apply(theta):
        loss = loss_of(models, *make_inputs())
    del space
    loss.backward()
    assert close(theta.grad, expected)
