"""Samplers by A1111's names do what k-diffusion's do, on data whose denoiser is known in closed form."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from hypernet import generate
from hypernet.samplers import SAMPLERS, check_sampler, make_sampler, sampler_name

# Stable Diffusion 1.5's own.
OWN = PNDMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
)
SIGMAS = ((1 - OWN.alphas_cumprod) / OWN.alphas_cumprod).sqrt().double().numpy()
MEAN, SPREAD = 0.7, 0.2


def denoised(x, sigma):
    """The mean of x_0 ~ N(MEAN, SPREAD^2) given x = x_0 + sigma * noise."""
    return MEAN + SPREAD**2 / (SPREAD**2 + sigma**2) * (x - MEAN)


def karras(steps: int):
    """Karras et al. 2022, equation 5, from the largest sigma of the schedule to the smallest, and 0."""
    low, high = SIGMAS[0] ** (1 / 7), SIGMAS[-1] ** (1 / 7)
    return [*((high + np.linspace(0, 1, steps) * (low - high)) ** 7), 0.0]


def euler(x, sigmas):
    for sigma, below in itertools.pairwise(sigmas):
        x = x + (x - denoised(x, sigma)) / sigma * (below - sigma)
    return x


def heun(x, sigmas):
    for sigma, below in itertools.pairwise(sigmas):
        slope = (x - denoised(x, sigma)) / sigma
        step = x + slope * (below - sigma)
        x = step if below == 0 else x + (slope + (step - denoised(step, below)) / below) / 2 * (below - sigma)
    return x


def dpm_2m(x, sigmas):
    """Lu et al. 2022 (DPM-Solver++), algorithm 2, in lambda = -log sigma."""
    before = None
    for number, (sigma, below) in enumerate(itertools.pairwise(sigmas)):
        now = denoised(x, sigma)
        if below == 0:
            return now
        step = np.log(sigma / below)
        guess = now
        if before is not None:
            ratio = np.log(sigmas[number - 1] / sigma) / step
            guess = (1 + 1 / (2 * ratio)) * now - before / (2 * ratio)
        x = below / sigma * x + (1 - below / sigma) * guess
        before = now
    return x


def drawn_by(name: str, steps: int):
    """Draw with a scheduler, from the noise 1; what it is told of each step is the noise of the closed form."""
    scheduler = make_sampler(OWN, name)
    scheduler.set_timesteps(steps)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64) * float(scheduler.init_noise_sigma)
    is_scaled = abs(float(scheduler.init_noise_sigma) - 1) < 1e-6  # sqrt(alpha) * x_0 + sqrt(1 - alpha) * noise
    for number, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[number]) if hasattr(scheduler, "sigmas") else float(SIGMAS[int(timestep)])
        whole = x * (1 + sigma**2) ** 0.5 if is_scaled else x
        noise = (whole - denoised(whole, sigma)) / sigma
        x = scheduler.step(noise, timestep, x).prev_sample
    return float(x)


@pytest.mark.parametrize(
    ("name", "formula"), [("Euler Karras", euler), ("Heun Karras", heun), ("DPM++ 2M Karras", dpm_2m)]
)
@pytest.mark.parametrize("steps", [4, 12])
def test_karras_samplers_are_k_diffusions(name, formula, steps):
    sigmas = karras(steps)
    scheduler = make_sampler(OWN, name)
    scheduler.set_timesteps(steps)
    scale = float(scheduler.init_noise_sigma)
    begin = scale if abs(scale - 1) > 1e-6 else (1 + sigmas[0] ** 2) ** 0.5
    assert drawn_by(name, steps) == pytest.approx(formula(begin, sigmas), abs=2e-4)


@pytest.mark.parametrize("steps", [5, 20])
def test_ddim_steps_as_a1111s_does(steps):
    """Song et al. 2021, equation 12 with sigma 0; timesteps 1, 1 + 1000 / steps, ..."""
    alphas = OWN.alphas_cumprod.double().numpy()
    timesteps = [1 + 1000 // steps * number for number in range(steps)]
    x = 1.0
    for number in reversed(range(steps)):
        alpha = alphas[timesteps[number]]
        below = alphas[timesteps[number - 1]] if number else alphas[0]
        sigma = ((1 - alpha) / alpha) ** 0.5
        clean = denoised(x / alpha**0.5, sigma)
        noise = (x - alpha**0.5 * clean) / (1 - alpha) ** 0.5
        x = below**0.5 * clean + (1 - below) ** 0.5 * noise
    assert drawn_by("DDIM", steps) == pytest.approx(x, abs=1e-4)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("PLMS")])
def test_every_sampler_finds_the_data_and_tells_its_name(name):
    assert sampler_name(make_sampler(OWN, name)) == name
    torch.manual_seed(0)  # some add noise
    assert drawn_by(name, 40) == pytest.approx(MEAN, abs=4 * SPREAD)


def test_a_bases_own_sampler_is_named_and_left_as_it_is():
    assert sampler_name(OWN) == "PLMS"
    assert make_sampler(OWN, None) is OWN
    assert make_sampler(OWN, "plms") is OWN
    velocity = DDIMScheduler.from_config(OWN.config, prediction_type="v_prediction")
    assert make_sampler(velocity, "Euler a").config.prediction_type == "v_prediction"


def test_names_are_found_in_any_case_and_mistakes_are_named():
    assert check_sampler("dpm++ 2m karras") == "DPM++ 2M Karras"
    with pytest.raises(ValueError, match=r"no sampler 'Euler b'; did you mean 'Euler a'\? There are Euler, "):
        check_sampler("Euler b")


def test_a_flow_is_drawn_with_its_own_sampler_alone():
    flow = FlowMatchEulerDiscreteScheduler()
    assert make_sampler(flow, "Euler") is flow
    with pytest.raises(ValueError, match="DPM\\+\\+ 2M does not draw with this base"):
        make_sampler(flow, "DPM++ 2M")


def test_a_base_draws_with_another_sampler_and_keeps_its_own(base):
    own = base.scheduler
    pictures = {name: generate(base, "a face", num_steps=4, sampler=name)[0].tobytes() for name in ("Euler", "UniPC")}
    assert pictures["Euler"] != pictures["UniPC"]
    assert base.scheduler is own
