import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from hypernet.base_models.base import sample_moments
from hypernet.base_models.loading import load_base
from hypernet.fitting import engine
from hypernet.fitting.engine import fit_lora, fit_theta
from hypernet.recipe import FitConfig, PersonalizeConfig
from lidb_peft.bases import get_basis
from lidb_peft.layout import distinct_basis_keys
from testbed import miniature_path

UNCLIPPED = 1e9


@pytest.fixture
def gradients(monkeypatch):
    """Every step's gradient ``(N, ...)`` as the optimiser gets it."""
    seen = []

    class Recorder(torch.optim.AdamW):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["params"][0].grad.clone())
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    return seen


@pytest.fixture
def batches(monkeypatch):
    """Every step's ``(clean, noise, timesteps)``."""
    seen, original = [], engine.noise_photos

    def record(base, moments, noise):
        clean = sample_moments(moments, noise.latent) * base.vae.config.scaling_factor
        seen.append((clean, noise.added.clone(), noise.timesteps.clone()))
        return original(base, moments, noise)

    monkeypatch.setattr(engine, "noise_photos", record)
    return seen


def with_prediction(base, prediction_type):
    return replace(base, scheduler=DDIMScheduler.from_config(base.scheduler.config, prediction_type=prediction_type))


def error(found, expected):
    """Relative error by norm."""
    return ((found - expected).norm() / expected.norm()).item()


# ---- who shares the batch does not matter ----


def test_a_batch_of_thetas_equals_one_at_a_time(base, space, new_subject, random_theta, gradients):
    subjects = [new_subject("ann", 2), new_subject("bob", prompt="a face at night"), new_subject("cy", 3)]
    config = FitConfig(steps=2, lr=1e-3, timesteps_per_step=2, max_grad_norm=UNCLIPPED)
    together, losses = fit_theta(base, space, subjects, config, start=random_theta)
    in_batch = gradients[0].clone()
    for i, subject in enumerate(subjects):
        gradients.clear()
        alone, alone_losses = fit_theta(base, space, [subject], config, start=random_theta)
        assert error(in_batch[i], gradients[0][0]) < 1e-5
        assert error(losses[0, i], alone_losses[0, 0]) < 1e-5
        assert error(together[i] - random_theta, alone[0] - random_theta) < 1e-2  # Adam blows float noise up


def test_a_batch_of_loras_equals_one_at_a_time(base, space, new_subject, random_theta, gradients):
    subjects = [new_subject("ann"), new_subject("bob", 2)]
    config = FitConfig(steps=2, lr=1e-3, max_grad_norm=UNCLIPPED)
    thetas = torch.stack([random_theta, 0.5 * random_theta])
    together, _ = fit_lora(base, space, subjects, config, rank=3, theta=thetas)
    in_batch = gradients[0].clone()
    for i, subject in enumerate(subjects):
        gradients.clear()
        (alone,), _ = fit_lora(base, space, [subject], config, rank=3, theta=thetas[i : i + 1])
        assert error(in_batch[i], gradients[0][0]) < 1e-5
        for name, (lora_A, lora_B) in alone.items():
            assert error(together[i][name][1] @ together[i][name][0], lora_B @ lora_A) < 1e-3


def test_noise_follows_the_key_and_the_seed_alone(base, space, new_subject, batches):
    ann, bob = new_subject("ann"), new_subject("bob")
    config = FitConfig(steps=2, lr=1e-3)
    fit_theta(base, space, [ann, bob], config)
    fit_theta(base, space, [bob, ann], config)
    fit_theta(base, space, [replace(ann, key="dora"), bob], config)
    fit_theta(base, space, [ann, bob], replace(config, seed=1))
    first, swapped, other_key, other_seed = batches[1], batches[3], batches[5], batches[7]
    for part in range(3):
        assert torch.equal(first[part][0], swapped[part][1])
        assert torch.equal(first[part][1], other_key[part][1])
        assert not torch.equal(first[part][0], other_key[part][0])
        assert not torch.equal(first[part], other_seed[part])


def test_thetas_are_fitted_in_learned_bases(base, space, new_subject, random_theta):
    """Turned around, down and its bases give the same updates, to the last bit, and so the same fits."""
    signs = torch.ones(space.row_size)
    signs[: space.config.down_dim] = -1
    keys = distinct_basis_keys(space.shapes, space.config)
    turned = torch.nn.ParameterDict(
        {key.label: get_basis(key, torch.device("cpu")) * (-1 if key.side == "down" else 1) for key in keys}
    )
    subjects, config = [new_subject("ann")], FitConfig(steps=2, lr=1e-2)
    theta, losses = fit_theta(base, space, subjects, config, random_theta)
    turned_theta, turned_losses = fit_theta(base, space, subjects, config, signs * random_theta, bases=turned)
    assert torch.equal(turned_losses, losses)
    assert torch.equal(signs * turned_theta, theta)
    (lora,), losses = fit_lora(base, space, subjects, config, 2, theta)
    (turned_lora,), turned_losses = fit_lora(base, space, subjects, config, 2, turned_theta, bases=turned)
    assert torch.equal(turned_losses, losses)
    assert all(torch.equal(turned_lora[name][side], lora[name][side]) for name in lora for side in (0, 1))
    assert all(basis.grad is None for basis in turned.values())


def test_the_same_call_gives_the_same_numbers(base, space, new_subject):
    first, again = (fit_theta(base, space, [new_subject("ann")], FitConfig(steps=3, lr=1e-2))[0] for _ in range(2))
    assert torch.equal(first, again)


def test_each_identity_is_clipped_by_its_own_norm(base, space, new_subject, random_theta, gradients):
    subjects = [new_subject("ann"), new_subject("bob")]
    config = FitConfig(steps=1, lr=1e-3, max_grad_norm=UNCLIPPED)
    fit_theta(base, space, subjects, config, start=random_theta)
    norms = gradients[0].flatten(1).norm(dim=1)
    limit = norms.mean().item()  # between the two, so that one of them is clipped
    fit_theta(base, space, subjects, replace(config, max_grad_norm=limit), start=random_theta)
    assert gradients[1].flatten(1).norm(dim=1).tolist() == pytest.approx(
        [min(n, limit) for n in norms.tolist()], rel=1e-3
    )


# ---- what is fitted ----


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_merged_weights_under_diffusers_own_scheduler(
    base, space, new_subject, random_theta, batches, prediction_type
):
    typed = with_prediction(base, prediction_type)
    config = FitConfig(steps=1, lr=1e-3, timesteps_per_step=3)
    _, losses = fit_theta(typed, space, [new_subject("ann", 2)], config, start=random_theta)
    clean, noise, timesteps = batches[0]
    scheduler = DDPMScheduler.from_config(typed.scheduler.config)
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(clean, noise, timesteps)
    merged = load_base(str(miniature_path()), device="cpu", precision="fp32")
    with torch.no_grad():
        for name, (lora_A, lora_B) in space.factors(random_theta).items():
            component, path = name.split(".", 1)
            modules = dict(merged.adapted[component].named_modules())
            (modules.get(path) or modules[path.removeprefix("text_model.")]).weight += lora_B @ lora_A
        embeds = merged.encode_prompts(merged.prepare_prompts(["a sks face"] * 3)).prompt_embeds
        noisy = scheduler.add_noise(clean, noise, timesteps)
        expected = torch.nn.functional.mse_loss(merged.unet(noisy, timesteps, embeds).sample, target)
    assert losses[0, 0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_falls(base, space, new_subject, prediction_type):
    typed, subject = with_prediction(base, prediction_type), new_subject("ann", 2)
    exam = FitConfig(steps=1, lr=1e-9, timesteps_per_step=16, seed=9)

    def loss(theta):
        return fit_theta(typed, space, [subject], exam, start=theta)[1].item()

    config = FitConfig(steps=8, lr=1.6e-2, timesteps_per_step=4)
    theta, _ = fit_theta(typed, space, [subject], config)
    assert loss(theta) < loss(space.theta_0)
    (factors,), losses = fit_lora(typed, space, [subject], replace(config, steps=2, lr=4e-3), rank=4, theta=theta)
    assert losses.shape == (2, 1)
    assert factors.keys() == set(space.layer_names)


def test_padding_of_narrow_layers_stays_zero(base, space, new_subject):
    theta, _ = fit_theta(base, space, [new_subject("ann")], FitConfig(steps=2, lr=1e-2))
    assert not theta[0][~space.mask].any()
    assert (theta[0] != space.theta_0)[space.mask].float().mean() > 0.5


def test_every_photo_of_a_subject_is_used(base, space, new_subject, batches):
    subject = new_subject("ann", 3)
    levels = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    moments = torch.cat([levels.expand(3, 4, 8, 8), torch.full((3, 4, 8, 8), -30.0)], dim=1)
    fit_theta(base, space, [replace(subject, moments=moments)], FitConfig(steps=4, lr=1e-3, timesteps_per_step=4))
    drawn = torch.cat([batch[0] for batch in batches]) / base.vae.config.scaling_factor
    assert set(drawn[:, 0, 0, 0].round().tolist()) == {1.0, 2.0, 3.0}
    assert drawn.var(dim=(1, 2, 3)).max() < 1e-4  # a sample is one photo, not a mixture


def test_copies_are_spread_over_the_schedule(base, space, new_subject, batches):
    fit_theta(base, space, [new_subject("ann")], FitConfig(steps=6, lr=1e-3, timesteps_per_step=4))
    quarters = torch.stack([batch[2] for batch in batches]) // 250
    assert quarters.tolist() == [[0, 1, 2, 3]] * 6


def test_no_copy_is_noisier_than_the_max_timestep(base, space, new_subject, batches):
    config = FitConfig(steps=6, lr=1e-3, timesteps_per_step=4, max_timestep=200)
    fit_theta(base, space, [new_subject("ann")], config)
    for _, _, timesteps in batches:
        assert (timesteps // 50).tolist() == [0, 1, 2, 3]


def test_only_the_finetuning_of_a_recipe_keeps_to_its_max_timestep():
    recipe = PersonalizeConfig(theta_steps=1, max_timestep=200)
    assert (recipe.theta_fit.max_timestep, recipe.lora_fit.max_timestep) == (1000, 200)


def test_the_latents_are_resampled_at_each_step(base, space, new_subject, batches):
    fit_theta(base, space, [new_subject("ann")], FitConfig(steps=2, lr=1e-3))
    assert not torch.equal(batches[0][0], batches[1][0])


def test_theta_is_frozen_while_the_lora_is_fitted(base, space, taught, new_subject, random_theta):
    before = random_theta.clone()
    (factors,), _ = fit_lora(base, space, [new_subject("ann")], FitConfig(2, 1e-2), rank=2, theta=random_theta)
    assert torch.equal(random_theta, before)
    for name, (theta_A, theta_B) in space.factors(random_theta).items():
        lora_A, lora_B = factors[name]
        assert lora_A.shape[0] == lora_B.shape[1] == 3
        assert torch.equal(lora_A[:1], theta_A)
        assert torch.equal(lora_B[:, :1], theta_B)
        assert (lora_B[:, 1:].abs().max() > 1e-6) == (name in taught)


def test_a_plain_lora_needs_no_theta(base, space, new_subject):
    (factors,), _ = fit_lora(base, space, [new_subject("ann")], FitConfig(1, 1e-2), rank=2)
    assert {lora_A.shape[0] for lora_A, _ in factors.values()} == {2}


def test_everybody_starts_at_the_same_vector(base, space, new_subject):
    """Each person's own random start was noise in the targets that no photo could predict."""
    thetas, _ = fit_theta(base, space, [new_subject("ann"), new_subject("bob", 2)], FitConfig(0, 1e-2))
    assert thetas.shape == (2, *space.theta_0.shape)
    assert (thetas == space.theta_0).all()


def test_no_steps_change_nothing(base, space, new_subject, random_theta):
    theta, losses = fit_theta(base, space, [new_subject("ann")], FitConfig(0, 1e-2), start=random_theta)
    assert torch.equal(theta[0], random_theta)
    assert losses.shape == (0, 1)


# ---- what stays as it was ----


@pytest.mark.usefixtures("checkpointing")
def test_gradient_checkpointing_changes_no_gradient(base, space, new_subject, random_theta, gradients):
    config = FitConfig(steps=1, lr=1e-3, max_grad_norm=UNCLIPPED)
    for checkpointing in ("off", "on"):
        checked = replace(config, gradient_checkpointing=checkpointing)
        fit_theta(base, space, [new_subject("ann"), new_subject("bob")], checked, start=random_theta)
    assert error(gradients[1], gradients[0]) < 1e-5
    assert gradients[0].flatten(1).norm(dim=1).min() > 0
    assert not base.unet.is_gradient_checkpointing
    assert not base.text_encoder.is_gradient_checkpointing
    assert not base.unet.training
    assert not base.text_encoder.training


@pytest.mark.usefixtures("checkpointing")
def test_auto_checkpoints_what_does_not_fit_otherwise(base, space, new_subject, random_theta, monkeypatch):
    """A card that has no room for the third step by itself: the fit is that of checkpointing from the start."""
    config = FitConfig(4, 1e-3, gradient_checkpointing="on")
    expected, losses = fit_theta(base, space, [new_subject("ann")], config, start=random_theta)
    original, calls = engine.base_losses, []

    def small_card(base, *arguments):
        calls.append(base.unet.is_gradient_checkpointing)
        if calls == [False] * 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return original(base, *arguments)

    monkeypatch.setattr(engine, "base_losses", small_card)
    with pytest.warns(UserWarning, match="gradient checkpointing is on now"):
        theta, found = fit_theta(
            base, space, [new_subject("ann")], replace(config, gradient_checkpointing="auto"), start=random_theta
        )
    assert calls == [False] * 3 + [True] * 4
    assert torch.equal(theta, expected)
    assert torch.equal(found, losses)
    calls.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fit_theta(base, space, [new_subject("ann")], replace(config, gradient_checkpointing="off"))


@pytest.mark.usefixtures("checkpointing")
def test_checkpointing_is_switched_off_after_an_interruption(base, space, new_subject):
    def interrupt(done, total):
        raise KeyboardInterrupt

    config = FitConfig(3, 1e-3, gradient_checkpointing="on")
    with pytest.raises(KeyboardInterrupt):
        fit_theta(base, space, [new_subject("ann")], config, progress=interrupt)
    assert not base.unet.is_gradient_checkpointing
    assert not base.unet.training


def test_no_global_generator_is_touched(base, space, new_subject):
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    theta, _ = fit_theta(base, space, [new_subject("ann")], FitConfig(1, 1e-2))
    fit_lora(base, space, [new_subject("ann")], FitConfig(1, 1e-2), rank=2, theta=theta)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(now, then) for now, then in zip(np.random.get_state(), numpy_state, strict=True))
    assert random.getstate() == python_state


def test_the_base_is_left_as_it_was(base, space, new_subject):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    fit_theta(base, space, [new_subject("ann")], FitConfig(2, 1e-2))
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.unet.parameters())


def test_a_base_in_bfloat16_fits_float32_weights(space, new_subject):
    half = load_base(str(miniature_path()), device="cpu", precision="bf16")
    half_space = type(space)(half.adapted, space.config)
    theta, losses = fit_theta(half, half_space, [new_subject("ann")], FitConfig(2, 1e-2))
    assert theta.dtype == losses.dtype == torch.float32
    assert torch.isfinite(theta).all()
    assert not torch.equal(theta[0], space.theta_0)


def test_progress_counts_every_step(base, space, new_subject):
    seen = []
    fit_theta(base, space, [new_subject("ann")], FitConfig(3, 1e-2), progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# ---- bad input ----


def test_a_diverging_fit_is_an_error(base, space, new_subject):
    with pytest.raises(ValueError, match=r"diverged.*lower the learning rate"):
        fit_theta(base, space, [new_subject("ann")], FitConfig(steps=4, lr=1e30))


def test_bad_subjects_are_refused(base, space, new_subject):
    ann, config = new_subject("ann"), FitConfig(1, 1e-2)
    with pytest.raises(ValueError, match="no subject"):
        fit_theta(base, space, [], config)
    with pytest.raises(ValueError, match="no subject"):
        fit_lora(base, space, [], config, rank=2)
    with pytest.raises(ValueError, match="share the key 'ann'"):
        fit_theta(base, space, [ann, new_subject("bob"), replace(new_subject("cy"), key="ann")], config)
    with pytest.raises(ValueError, match="'ann' has no photos"):
        fit_theta(base, space, [replace(ann, moments=ann.moments[:0])], config)
    small = replace(new_subject("bob"), moments=torch.zeros(1, 8, 4, 4))
    with pytest.raises(ValueError, match="prepare all photos at one size"):
        fit_theta(base, space, [ann, small], config)


def test_theta_of_another_shape_is_refused(base, space, new_subject):
    subjects, config = [new_subject("ann"), new_subject("bob")], FitConfig(1, 1e-2)
    with pytest.raises(ValueError, match=r"theta has shape \(176, 150\)"):
        fit_theta(base, space, subjects, config, start=torch.zeros(176, 150))
    three = space.theta_0.expand(3, -1, -1)
    with pytest.raises(ValueError, match="for 2 subjects"):
        fit_theta(base, space, subjects, config, start=three)
    with pytest.raises(ValueError, match="for 2 subjects"):
        fit_lora(base, space, subjects, config, rank=2, theta=three)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"timesteps_per_step": 0}, "timesteps_per_step is 0"),
        ({"max_timestep": 0}, "max_timestep is 0; expected 1 to 1000"),
        ({"max_timestep": 1001}, "max_timestep is 1001; expected 1 to 1000"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is True; choose auto, on or off"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; choose auto, adamw or adamw8bit"),
        ({"graph": "yes"}, "graph is 'yes'; choose auto, on or off"),
        ({"background": -1.0}, "background is -1.0"),
        ({"preservation": float("nan")}, "preservation is nan"),
        ({"preservation": 1.0, "preserved": ()}, "preserved is"),
        ({"preservation": 1.0, "preserved": ("a cartoon",)}, "stands for the subject"),
    ],
)
def test_bad_settings_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        FitConfig(**({"steps": 1, "lr": 1e-2} | change))


def test_rank_zero_is_refused(base, space, new_subject):
    with pytest.raises(ValueError, match="rank is 0"):
        fit_lora(base, space, [new_subject("ann")], FitConfig(1, 1e-2), rank=0)
