import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from hypernet.base_models.base import sample_moments
from hypernet.base_models.loading import load_base
from hypernet.base_models.stable_diffusion import add_noise, prediction_target
from hypernet.fitting.losses import denoising_error
from testbed import miniature_path

TIMESTEPS = torch.tensor([0, 1, 499, 998, 999])


@pytest.fixture
def scheduler():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 4, 8, 8, generator=generator)


def test_noise_is_added_as_diffusers_adds_it(scheduler, pair):
    clean, noise = pair
    expected = scheduler.add_noise(clean, noise, TIMESTEPS)
    assert torch.allclose(add_noise(clean, noise, scheduler.alphas_cumprod[TIMESTEPS]), expected, atol=1e-6)


def test_the_target_is_the_noise_or_diffusers_velocity(scheduler, pair):
    clean, noise = pair
    alphas = scheduler.alphas_cumprod[TIMESTEPS]
    assert prediction_target(clean, noise, alphas, "epsilon") is noise
    expected = scheduler.get_velocity(clean, noise, TIMESTEPS)
    assert torch.allclose(prediction_target(clean, noise, alphas, "v_prediction"), expected, atol=1e-6)


def test_the_target_says_where_the_noisy_latents_came_from(scheduler, pair):
    clean, noise = pair
    alphas = scheduler.alphas_cumprod[TIMESTEPS]
    noisy, velocity = add_noise(clean, noise, alphas), prediction_target(clean, noise, alphas, "v_prediction")
    alpha = alphas.view(-1, 1, 1, 1)
    assert torch.allclose(alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity, clean, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_prediction_implies_latents_and_noise(base, pair, prediction_type):
    typed = replace(base, scheduler=DDIMScheduler.from_config(base.scheduler.config, prediction_type=prediction_type))
    clean, noise = pair[:, :3]
    timesteps = torch.tensor([0, 400, 900])
    noisy, target = (ask(clean, noise, timesteps) for ask in (typed.add_noise, typed.target))
    for found, true in zip(typed.finished(noisy, target, timesteps), (clean, noise), strict=True):
        assert torch.allclose(found, true, atol=1e-3)


def test_latents_are_decoded_as_the_pipeline_decodes_them(base):
    latents = torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(4))
    base.vae.disable_slicing()
    expected = base.vae.decode(latents / base.vae.config.scaling_factor).sample
    assert torch.equal(base.decode_latents(latents), expected)
    base.pipeline()  # which turns slicing on
    assert torch.equal(base.decode_latents(latents), expected)
    assert base.vae.use_slicing


def test_latents_are_drawn_as_diffusers_draws_them():
    moments = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    moments[0, 4:] = 50.0  # beyond the clamp of the log variance
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    expected = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(2)) * 0.18215
    assert torch.allclose(sample_moments(moments, noise) * 0.18215, expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_per_sample(base, pair, prediction_type):
    clean, noise = pair[:, :3]
    typed = replace(base, scheduler=DDIMScheduler.from_config(base.scheduler.config, prediction_type=prediction_type))
    timesteps = torch.tensor([10, 500, 990])
    with torch.no_grad():
        embeds = base.encode_prompts(base.prepare_prompts(["a face"] * 3))

        def losses(rows):
            asked = clean[rows], noise[rows], timesteps[rows]
            noisy, target = typed.add_noise(*asked), typed.target(*asked)
            return denoising_error(typed.denoise(noisy, timesteps[rows], embeds.rows(torch.arange(3)[rows])), target)

        together, alone = losses(slice(3)), [losses(slice(i, i + 1)) for i in range(3)]
    assert together.shape == (3,)
    assert torch.allclose(together, torch.cat(alone), rtol=1e-5)
    assert together.unique().numel() == 3


def test_photos_are_encoded_as_the_autoencoder_encodes_them(base):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    moments = base.encode_photos(pixels)
    with torch.no_grad():
        expected = base.vae.encode(pixels).latent_dist
    mean, log_variance = moments.chunk(2, dim=1)
    assert torch.allclose(mean, expected.mean, atol=1e-5)
    assert torch.allclose(log_variance.clamp(-30, 20), expected.logvar, atol=1e-5)


def test_photos_are_encoded_in_float32_whatever_the_base_runs_in():
    half = load_base(str(miniature_path()), device="cpu", precision="bf16")
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        expected = copy.deepcopy(half.vae).float().encode(pixels).latent_dist.parameters
    staying = half.encode_photos(pixels, release=False)
    assert half.vae.dtype == torch.float32
    moments = half.encode_photos(pixels)
    assert half.vae.dtype == torch.bfloat16  # as it was
    assert moments.dtype == torch.float32
    assert torch.allclose(moments, expected, atol=1e-5)
    assert torch.equal(moments, staying)


def test_pictures_of_a_base_in_float16_are_decoded_in_float32(base):
    """In which many a VAE overflows, and a picture is black."""
    half = load_base(str(miniature_path()), device="cpu", precision="fp32")
    for model in (*half.adapted.values(), half.vae):
        model.half()
    latents = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(3)).half()
    vae = half.pipeline().vae
    with torch.no_grad():
        picture = vae.decode(latents).sample
        expected = copy.deepcopy(base.vae).float().decode(latents.float()).sample
    assert picture.dtype == torch.float32
    assert torch.allclose(picture, expected, atol=2e-2)
    half.release_vae()
    assert half.vae.dtype == torch.float16


def test_the_background_counts_as_much_as_asked():
    prediction, target = torch.zeros(2, 4, 16, 16), torch.zeros(2, 4, 16, 16)
    prediction[0, :, 0, 0] = 3.0  # a corner
    prediction[1, :, 8, 8] = 3.0  # the middle of the face
    corner, face = denoising_error(prediction, target)
    assert corner == face == pytest.approx(9 / 256)
    corner, face = denoising_error(prediction, target, background=0.25)
    assert (corner / face).item() == pytest.approx(0.25)
    assert denoising_error(prediction, target, background=0.0)[0] == 0
    everywhere = torch.full((1, 4, 16, 16), 2.0)
    assert denoising_error(everywhere, torch.zeros_like(everywhere), background=0.25).item() == pytest.approx(4)
