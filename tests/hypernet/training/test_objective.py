"""The terms of equation 2 against formulas of their own, and what a training step makes of them."""

from dataclasses import replace

import pytest
import torch
from transformers import ViTConfig

import hypernet.training.objective as objective_module
from hypernet.fitting.losses import layer_distance, layer_scale
from hypernet.fitting.noise import draw_noise, noise_photos
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.recipe import TrainConfig
from hypernet.training.examples import Batch
from hypernet.training.objective import SUMMED, Objective
from lidb_peft import squared_distance

ENCODER = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
)
CONFIG = TrainConfig(batch_size=2, num_workers=0, crop=False, timesteps_per_step=2)


def make_network(space, **options):
    decoder = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "k": 2}
    return HyperNetwork(HyperNetworkConfig.for_space(space, ENCODER, "mini", **decoder | options))


@pytest.fixture(scope="module")
def thetas(space):
    noise = torch.randn(3, *space.theta_0.shape, generator=torch.Generator().manual_seed(1))
    return space.theta_0 + 0.3 * noise * space.mask


@pytest.fixture(scope="module")
def batch(thetas):
    """Two people, each in two noisy copies."""
    pixels = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return Batch(
        seen=pixels[0], denoised=pixels[1], photos=("a", "b"), targets=thetas[:2],
        drops_caption=torch.tensor([False, False]), counts=torch.ones(2), seeds=(3, 4), skipped=(), copies=2,
    )  # fmt: skip


def dense_updates(space, theta, bases=None):
    return [up @ down for down, up in space.factors(theta, bases).values()]


def asked(base, batch):
    """What the base is asked and should answer: noisy latents, timesteps, targets."""
    moments = base.encode_photos(batch.denoised).repeat_interleave(batch.copies, dim=0)
    noise = draw_noise(base, moments.shape, batch.generators())
    noisy, target = noise_photos(base, moments, noise)
    return noisy, noise.timesteps, target


def test_updates_are_compared_as_dense_matrices_would_be(space, thetas):
    ours, targets = dense_updates(space, thetas[0]), dense_updates(space, thetas[1])
    expected = [(a - b).square().sum() for a, b in zip(ours, targets, strict=True)]
    distance = layer_distance(space, thetas[0], thetas[1], "updates")
    assert torch.allclose(distance, torch.stack(expected), rtol=1e-4, atol=1e-6)
    norms = torch.stack([torch.stack([u.square().sum() for u in dense_updates(space, t)]) for t in thetas])
    assert torch.allclose(layer_scale(space, thetas, "updates"), norms.mean(dim=0), rtol=1e-4)


def test_learned_bases_are_compared_with_the_targets_frozen_ones(space, thetas):
    network = make_network(space, learned_bases=True)
    with torch.no_grad():
        for number, basis in enumerate(network.bases.values()):
            basis += 0.1 * torch.randn(basis.shape, generator=torch.Generator().manual_seed(number))
    ours, theirs = dense_updates(space, thetas[0], network.bases), dense_updates(space, thetas[1])
    expected = torch.stack([(a - b).square().sum() for a, b in zip(ours, theirs, strict=True)])
    distance = layer_distance(space, thetas[0], thetas[1], "updates", network.bases)
    assert torch.allclose(distance, expected, rtol=1e-4, atol=1e-6)


def test_factors_are_compared_number_by_number(space, thetas):
    distance = layer_distance(space, thetas[0], thetas[1], "factors")
    expected = [((a - b)[m] ** 2).mean() for a, b, m in zip(thetas[0], thetas[1], space.mask, strict=True)]
    assert torch.allclose(distance, torch.stack(expected))
    zeros = torch.stack([space.theta_0, space.theta_0])
    assert (layer_scale(space, zeros, "factors") > 0).all()


def test_a_layer_that_no_target_changes_does_not_outweigh_the_others(space, thetas):
    targets = thetas.clone()
    targets[:, 0] = space.theta_0[0]
    scale = layer_scale(space, targets, "updates")
    assert torch.isclose(scale[0], 1e-3 * scale.mean(), rtol=0.1)


def test_the_loss_is_the_weighted_sum_of_its_terms_one_person_at_a_time(base, space, thetas, batch):
    config = replace(CONFIG, denoising=0.7, target_distance=0.3)
    network = make_network(space)
    scale = layer_scale(space, thetas, "updates")
    loss, sums = Objective(base, space, network, config, scale)(batch)
    noisy, timesteps, target = asked(base, batch)
    prompts = base.prepare_prompts(["a sks face"] * 2)
    expected = []
    for person in range(2):
        theta = network(batch.seen[person : person + 1])[0]
        rows = slice(2 * person, 2 * person + 2)
        with space.apply(theta):
            embeds = base.encode_prompts(prompts)
            denoising = (base.denoise(noisy[rows], timesteps[rows], embeds) - target[rows]).square().mean()
        distance = (squared_distance(space, theta, batch.targets[person]) / scale).mean()
        expected.append(torch.stack([denoising, distance]))
    expected = torch.stack(expected)
    assert torch.allclose(loss, (expected @ torch.tensor([0.7, 0.3])).mean(), rtol=1e-5)
    assert torch.allclose(sums[:2], expected.sum(dim=0), rtol=1e-5)
    assert dict(zip(SUMMED[2:], sums[2:].tolist(), strict=True)) == {"preservation": 0.0, "people": 2.0}
    assert (timesteps.view(2, 2) // 500 == torch.tensor([0, 1])).all()  # stratified


def test_noise_is_each_seeds_own_and_no_global_generator_is_touched(base, space, batch):
    """Where a module seeded the global generator, every step drew the same noise and timestep."""
    state = torch.get_rng_state()
    first, other = asked(base, batch), asked(base, replace(batch, seeds=(5, 4)))
    for drawn, drawn_other in zip(first, other, strict=True):
        assert not torch.equal(drawn[:2], drawn_other[:2])
        assert torch.equal(drawn[2:], drawn_other[2:])  # the second person's
    Objective(base, space, make_network(space), replace(CONFIG, preservation=1.0))(batch)[0].backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_blank_place_counts_nothing(base, space, thetas, batch):
    objective = Objective(base, space, make_network(space), replace(CONFIG, denoising=0.0, target_distance=1.0),
                          layer_scale(space, thetas, "factors"))  # fmt: skip
    both, _ = objective(batch)
    first, sums = objective(replace(batch, counts=torch.tensor([1.0, 0.0])))
    second, _ = objective(replace(batch, counts=torch.tensor([0.0, 1.0])))
    assert torch.allclose(first + second, both)
    assert sums[-1] == 1


def test_without_its_caption_a_person_answers_to_the_empty_prompt(base, space, batch):
    network = make_network(space)
    _, sums = Objective(base, space, network, CONFIG)(replace(batch, drops_caption=torch.tensor([True, True])))
    noisy, timesteps, target = asked(base, batch)
    with space.apply(network(batch.seen)):
        embeds = base.encode_prompts(base.prepare_prompts([""] * 2)).rows(torch.tensor([0, 0, 1, 1]))
        error = base.denoise(noisy, timesteps, embeds) - target
    expected = error.square().mean(dim=(1, 2, 3)).view(2, 2).mean(dim=1).sum()
    assert torch.allclose(sums[0], expected, rtol=1e-5)


def test_preservation_is_of_people_with_a_caption(base, space, batch):
    objective = Objective(base, space, make_network(space), replace(CONFIG, preservation=1.0))
    with torch.no_grad():
        terms = [
            objective(replace(batch, drops_caption=torch.tensor(drops)))[1][2].item()
            for drops in ([False, False], [True, False], [False, True], [True, True])
        ]
    assert terms[0] > 0
    assert terms[0] == pytest.approx(terms[1] + terms[2], rel=1e-5)
    assert terms[3] == 0


def test_deep_supervision_is_the_mean_over_the_rounds(base, space, thetas, batch):
    network = make_network(space)
    config = replace(CONFIG, denoising=0.0, target_distance=1.0, compare="factors")
    scale = layer_scale(space, thetas, "factors")
    deep, _ = Objective(base, space, network, replace(config, deep_supervision=True), scale)(batch)
    rounds = network(batch.seen, return_rounds=True)
    each = [(layer_distance(space, theta, batch.targets, "factors") / scale).mean() for theta in rounds]
    assert len(each) == 2
    assert torch.allclose(deep, torch.stack(each).mean())


def test_checkpointing_changes_no_gradient_and_learned_bases_get_theirs(base, space, batch):
    """In other re-implementations a checkpointed hypernetwork got no gradients."""

    def gradients(enabled: bool) -> dict[str, torch.Tensor]:
        network = make_network(space, learned_bases=True, train_encoder=True).train()
        if enabled:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        objective = Objective(base, space, network, replace(CONFIG, timesteps_per_step=1))
        with base.checkpointed(enabled):
            objective(replace(batch, copies=1))[0].backward()
        assert not base.unet.training
        return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    assert all(torch.allclose(plain[name], recomputed[name], rtol=1e-4, atol=1e-8) for name in plain)
    bases = [grad for name, grad in plain.items() if name.startswith("bases.")]
    assert bases
    assert all(grad.any() for grad in bases)


def test_no_more_moments_are_kept_than_the_limit_and_all_are_the_same(base, space, batch, monkeypatch):
    of_one = base.encode_photos(batch.denoised[:1]).nbytes
    monkeypatch.setattr(objective_module, "KEPT_BYTES", 2 * of_one + 1)
    latents, pixels = objective_module.Latents(base, keep=True), torch.rand(4, *batch.denoised.shape[1:]) * 2 - 1
    expected, names = base.encode_photos(pixels), ("a", "b", "c", "d")
    for rows in ([0, 1, 2], [3, 0, 3], [2, 3, 1]):
        found = latents.moments(pixels[rows], tuple(names[row] for row in rows))
        assert torch.equal(found, expected[rows])
        held = sum(own.untyped_storage().nbytes() for own in latents.kept.values())
        assert held == latents.kept_bytes == 2 * of_one
    assert set(latents.kept) == {"a", "b"}
    base.release_vae()


def test_moments_are_encoded_once_unless_photos_change(base, space, batch):
    for config, kept in ((CONFIG, {"a", "b"}), (replace(CONFIG, flip=True), None)):
        objective = Objective(base, space, make_network(space), config)
        with torch.no_grad():
            first = objective(batch)[1]
            assert torch.equal(objective(batch)[1], first)
        assert (objective.latents.kept and set(objective.latents.kept)) == kept
        other = objective.latents.moments(batch.seen, batch.photos)
        assert torch.equal(other, base.encode_photos(batch.denoised if kept else batch.seen))
        base.release_vae()
