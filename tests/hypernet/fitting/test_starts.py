"""A finetuning that starts from a LoRA that was learned: the file, what it fits, and where it is found."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hypernet.fitting.engine import fit_flat_lora, fit_lora
from hypernet.fitting.starts import START_FILE, find_start, load_start, save_start
from hypernet.inputs.people import open_people, prepare_person
from hypernet.personalization import personalize
from hypernet.recipe import FitConfig, StartConfig
from hypernet.training import start as learning
from hypernet.training.start import StartState, first_start, learn_start, resumable_start, rounds_of
from lidb_peft import LiDBSpace
from testbed import MINIATURE_RECIPE, miniature_lidb_config
from testbed.protocol import shown_subjects

RANK = 2
FIT = FitConfig(2, 1e-2, timesteps_per_step=2, max_timestep=500)
PEOPLE = (1_000_000, 1_000_001)


@pytest.fixture(scope="module")
def denoiser_space(base):
    return LiDBSpace({"unet": base.denoiser}, miniature_lidb_config())


@pytest.fixture(scope="module")
def start(denoiser_space):
    fresh = first_start(denoiser_space, RANK).start
    return fresh + 0.02 * torch.randn(fresh.shape, generator=torch.Generator().manual_seed(0))


def test_a_file_holds_the_start_as_it_is_but_for_rounding(denoiser_space, start, tmp_path):
    save_start(tmp_path / START_FILE, start, RANK, denoiser_space)
    found = load_start(tmp_path / START_FILE)
    assert (found.rank, set(found.factors)) == (RANK, set(denoiser_space.layer_names))
    flat = found.flat(denoiser_space)
    assert torch.equal(flat, start.half().float())
    assert find_start(str(tmp_path), "") == find_start("", str(tmp_path)) == tmp_path / START_FILE
    assert find_start(str(tmp_path), "elsewhere")
    assert find_start("", "stable-diffusion-v1-5/stable-diffusion-v1-5") is None


def test_no_step_gives_the_start_beside_theta(base, denoiser_space, start):
    subjects = shown_subjects(base, PEOPLE)
    theta = denoiser_space.theta_0 + 0.1 * denoiser_space.mask
    factors, losses = fit_lora(base, denoiser_space, subjects, replace(FIT, steps=0), RANK, theta, start=start)
    own, expected = denoiser_space.factors(theta), denoiser_space.lora_factors(start, RANK)
    for name, (lora_A, lora_B) in factors[1].items():
        together = own[name][1] @ own[name][0] + expected[name][1] @ expected[name][0]
        assert torch.allclose(lora_B @ lora_A, together, atol=1e-6)
    assert losses.shape == (0, 2)


def test_reptile_moves_to_the_mean_of_the_fits_and_goes_on_where_it_stopped(base, denoiser_space):
    config = StartConfig(rounds=2, people=2, inner_steps=1, rate=0.5)

    def people(number):
        return shown_subjects(base, [1_000_000 + 2 * number, 1_000_001 + 2 * number]), None

    states = []
    first = first_start(denoiser_space, RANK)
    begun = first.start.clone()
    whole = learn_start(
        base, denoiser_space, people, config, FIT, first, RANK,
        checkpoint=lambda state: states.append(StartState(state.start.clone(), state.rounds, [*state.losses])),
    )  # fmt: skip
    fitted, _ = fit_flat_lora(base, denoiser_space, people(0)[0], config.inner_fit(FIT, 0), RANK, start=begun)
    assert torch.allclose(states[0].start, begun + 0.5 * (fitted.mean(dim=0) - begun))
    assert len(whole.losses) == whole.rounds == 2
    resumed = learn_start(base, denoiser_space, people, config, FIT, states[0], RANK)
    assert torch.equal(resumed.start, whole.start)


def test_a_start_of_other_layers_or_rank_is_refused_and_named(denoiser_space, space, start, tmp_path, base, photo):
    save_start(tmp_path / START_FILE, start, RANK, denoiser_space)
    found = load_start(tmp_path / START_FILE)
    with pytest.raises(ValueError, match="128 layers and 176"):
        found.flat(space)
    recipe = replace(MINIATURE_RECIPE, steps=1, rank=4, crop=False)
    with pytest.raises(ValueError, match=r"start of rank 2 .* has rank 4"):
        personalize([photo], base, recipe, miniature_lidb_config(), start=tmp_path / START_FILE)


def test_the_denoiser_alone_is_adapted_from_the_start_that_is_named(base, denoiser_space, start, photo, tmp_path):
    save_start(tmp_path / START_FILE, start, RANK, denoiser_space)
    recipe = replace(MINIATURE_RECIPE, steps=1, lr=1e-6, rank=RANK, crop=False, adapt="denoiser")
    found = personalize([photo], base, recipe, miniature_lidb_config(), start=tmp_path / START_FILE)
    assert found.start_source == str(tmp_path / START_FILE)
    assert set(found.factors) == set(denoiser_space.layer_names)
    expected = denoiser_space.lora_factors(start.half().float(), RANK)
    for name, (lora_A, lora_B) in found.factors.items():
        assert torch.allclose(lora_A, expected[name][0], atol=1e-5)
        assert torch.allclose(lora_B, expected[name][1], atol=1e-5)


def test_the_recipe_says_with_which_detector_faces_are_found_and_which_is_taken(base, tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "ann.png")
    asked = []

    def note(person, size_px, crop, detector, face):
        asked.append((detector, face))
        return prepare_person(person, size_px, False)

    monkeypatch.setattr(learning, "prepare_person", note)
    recipe = replace(MINIATURE_RECIPE, face_detector="yunet", face="leftmost")
    subjects, theta = rounds_of(open_people(tmp_path), base, recipe, StartConfig(people=1))(0)
    assert (len(subjects), theta, asked) == (1, None, [("yunet", "leftmost")])


@pytest.mark.parametrize("told", ["{", "[]", "{}", '{"layers_hash": "x", "rounds": null, "losses": []}'])
def test_a_damaged_unfinished_start_is_refused_in_words(denoiser_space, tmp_path, told):
    file = tmp_path / "me.unfinished"
    save_file({"start": first_start(denoiser_space, RANK).start}, file, metadata={"learn_start": told})
    with (
        pytest.raises(ValueError, match="is not a start that is being learned"),
        resumable_start(file, denoiser_space, RANK),
    ):
        raise AssertionError("it was read")
    assert file.exists()
