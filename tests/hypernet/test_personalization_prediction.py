"""Personalisation that starts at a hypernetwork's prediction."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import hypernet.personalization as personalization
from hypernet import request
from hypernet.fitting.engine import fit_lora, fit_theta
from hypernet.fitting.subjects import make_subjects
from hypernet.inputs.people import PreparedPerson
from hypernet.inputs.photos import load_photo
from hypernet.network.hypernetwork import HyperNetwork, read_config
from hypernet.network.prediction import check_recipe, predicted_recipe
from hypernet.personalization import personalize, personalize_to_files
from hypernet.recipe import PersonalizeConfig
from hypernet.request import request_person
from lidb_peft import LiDBConfig, LiDBSpace, load_theta
from lidb_peft.bases import get_basis
from testbed import MINIATURE_RECIPE

ALONE = replace(MINIATURE_RECIPE, adapt="all", theta_steps=0, steps=0, rank=2, crop=False, likeness=0.0)
RELAXED = replace(ALONE, steps=2, lr=0.05)


@pytest.fixture(scope="module", params=[False, True], ids=["frozen bases", "learned bases"])
def network(request, space, make_hypernetwork):
    return make_hypernetwork(space, learned_bases=request.param)


@pytest.fixture(scope="module")
def learned(space, make_hypernetwork):
    return make_hypernetwork(space, learned_bases=True)


@pytest.fixture
def second_photo(photo, tmp_path):
    file = tmp_path / "second.png"
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
    return file


@pytest.fixture
def no_work(monkeypatch):
    """Anything that would take time fails the test."""
    monkeypatch.setattr(personalization, "make_person", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(HyperNetwork, "from_pretrained", lambda *_: pytest.fail("the hypernetwork was loaded"))


@torch.no_grad()
def predicted(network, *photos):
    """theta ``(L, row)`` of the person in all the photos."""
    pixels = torch.stack([load_photo(file, 32, crop=False).to_tensor() for file in photos])
    return network(pixels[None])[0]


def rank_one_factors(space, theta, bases):
    """Equation 1 of the paper, layer by layer, for r = 1."""
    factors = {}
    for index, name in enumerate(space.layer_names):
        down_key, up_key = space.basis_keys(index)
        down_aux, up_aux = (
            get_basis(key, torch.device("cpu")) if bases is None else bases[key.label].detach()
            for key in (down_key, up_key)
        )
        down, up = theta[index, : down_key.dim], theta[index, space.config.down_dim :][: up_key.dim]
        factors[name] = (down @ down_aux)[None], space.config.scale * (up_aux @ up)[:, None]
    return factors


# ---- what is predicted, and what leaves ----


@pytest.mark.parametrize("several", [False, True], ids=["one photo", "two photos"])
def test_the_file_holds_the_prediction_module_by_module(
    base, space, network, photo, second_photo, tmp_path, several, assert_same_deltas
):
    photos = [photo, second_photo] if several else [photo]
    result = personalize(photos, base, ALONE, hypernet=network)
    theta = predicted(network, *photos)
    assert torch.equal(result.theta, theta)
    assert (theta - space.theta_0).abs().max() > 0.1
    assert not torch.allclose(theta, predicted(network, second_photo), atol=1e-4)
    assert set(result.seconds) == {"prepare photos", "predict"}
    result.save(tmp_path / "me.safetensors", dtype=torch.float32)
    assert_same_deltas(tmp_path / "me.safetensors", rank_one_factors(space, theta, network.bases), 1e-5)


def test_the_lora_joins_the_frozen_prediction(base, space, network, photo, tmp_path, assert_same_deltas):
    result = personalize([photo], base, RELAXED, hypernet=network)
    assert torch.equal(result.theta, predicted(network, photo))
    expected = rank_one_factors(space, result.theta, network.bases)
    for name, (theta_A, theta_B) in expected.items():
        lora_A, lora_B = result.factors[name]
        assert lora_A.shape[0] == 1 + RELAXED.rank
        assert torch.allclose(lora_A[:1], theta_A, atol=1e-5)
        assert torch.allclose(lora_B[:, :1], theta_B, atol=1e-5)
    assert any(lora_B[:, 1:].any() for _, lora_B in result.factors.values())
    result.save(tmp_path / "me.safetensors", dtype=torch.float32)
    assert_same_deltas(tmp_path / "me.safetensors", result.factors, 1e-6)


def test_both_fits_go_on_from_the_prediction_in_its_bases(base, space, network, photo):
    config = replace(RELAXED, theta_steps=2, theta_lr=0.02)
    result = personalize([photo], base, config, hypernet=network)
    person = PreparedPerson("me", (load_photo(photo, 32, crop=False),))
    subjects = make_subjects(base, [person], config.trigger, config.class_prompt)
    start = predicted(network, photo)
    thetas, _ = fit_theta(base, space, subjects, config.theta_fit, start, bases=network.bases)
    (factors,), losses = fit_lora(base, space, subjects, config.lora_fit, 2, thetas, bases=network.bases)
    assert not torch.equal(thetas[0], start)
    assert torch.equal(result.theta, thetas[0])
    assert torch.equal(result.losses["finetune LoRA"], losses)
    assert all(torch.equal(result.factors[name][side], factors[name][side]) for name in factors for side in (0, 1))
    assert list(result.seconds) == ["prepare photos", "predict", "fit theta", "finetune LoRA"]


def test_a_folder_is_as_good_as_the_network(base, network, photo, tmp_path):
    network.save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        assert torch.equal(personalize([photo], base, ALONE, hypernet=source).theta, predicted(network, photo))


def test_its_config_is_read_once(base, network, photo, tmp_path, monkeypatch):
    network.save_pretrained(tmp_path / "net")
    reads = []
    monkeypatch.setattr(request, "read_config", lambda source: reads.append(source) or read_config(source))
    out = tmp_path / "me.safetensors"
    personalize_to_files([photo], base, out, ALONE, previews=None, hypernet=tmp_path / "net")
    assert len(reads) == 1
    config = read_config(tmp_path / "net")
    request_person([photo], tmp_path / "other.safetensors", ALONE, hypernet=config)
    result = personalize([photo], base, ALONE, hypernet=config)
    assert len(reads) == 1
    assert torch.equal(result.theta, predicted(network, photo))


def test_the_network_stays_as_it_was(base, learned, photo):
    network = learned.train()
    result = personalize([photo], base, replace(RELAXED, theta_steps=1), hypernet=network)
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    network.eval()
    label, basis = next(iter(network.bases.items()))
    assert torch.equal(result.bases[label], basis)
    assert result.bases[label].data_ptr() != basis.data_ptr()


def test_it_brings_its_own_dimensions(base, photo, make_hypernetwork):
    other = LiDBSpace(base.adapted, LiDBConfig(down_dim=8, up_dim=6, seed=3))
    result = personalize([photo], base, ALONE, LiDBConfig(), hypernet=make_hypernetwork(other))
    assert result.space.config == other.config
    assert result.theta.shape == (176, 14)


def test_a_theta_on_frozen_bases_can_be_saved(base, space, photo, tmp_path, make_hypernetwork):
    file = tmp_path / "theta.safetensors"
    network = make_hypernetwork(space)
    result = personalize_to_files([photo], base, tmp_path / "me.safetensors", ALONE, previews=None, save_theta=file,
                                  hypernet=network)  # fmt: skip
    assert torch.equal(load_theta(file, space).theta, result.theta.half().float())


def test_an_interruption_leaves_no_file(base, learned, photo, tmp_path):
    def interrupt(*step):
        assert step == ("predict", 1, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        personalize_to_files([photo], base, tmp_path / "me.safetensors", RELAXED, hypernet=learned, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


# ---- its prompt ----


def test_the_recipe_takes_the_prompt_and_no_theta_fit(space, make_hypernetwork):
    network = make_hypernetwork(space, prompt="a photo of [V]", token="ohwx")
    own = {"prompt": "a photo of [V]", "token": "ohwx"}
    assert check_recipe(network.config, None) == PersonalizeConfig(**own, steps=40)
    recipe = predicted_recipe(network.config, replace(MINIATURE_RECIPE, theta_steps=3, steps=7))
    assert recipe == replace(MINIATURE_RECIPE, **own, theta_steps=0, steps=4)
    fitting = replace(recipe, theta_steps=7)
    assert check_recipe(network.config, fitting) is fitting


@pytest.mark.parametrize("change", [{"token": "ohwx"}, {"prompt": "a photo of [V]"}])
def test_another_prompt_is_refused(base, learned, photo, tmp_path, change, no_work):
    with pytest.raises(
        ValueError, match=r"for the prompt 'a \[V\] face' with the token 'sks', not for .* leave --prom"
    ):
        personalize([photo], base, replace(ALONE, **change), hypernet=learned)
    learned.save_pretrained(tmp_path / "net")
    with pytest.raises(
        ValueError, match=r"for the prompt 'a \[V\] face' with the token 'sks', not for .* leave --prom"
    ):
        request_person([photo], tmp_path / "me.safetensors", replace(ALONE, **change), hypernet=tmp_path / "net")


# ---- refused ----


def test_another_base_is_refused(base, photo, make_hypernetwork):
    another = make_hypernetwork(LiDBSpace({"unet": base.unet.mid_block}, LiDBConfig(down_dim=8, up_dim=6)))
    with pytest.raises(ValueError, match=r"another list of 8 layers .* this model's 128 .* made for, that of mini"):
        personalize([photo], base, ALONE, hypernet=another)


def test_a_hypernetwork_of_the_denoiser_alone_adapts_that_alone(base, photo, make_hypernetwork):
    denoiser = make_hypernetwork(LiDBSpace({"unet": base.unet}, LiDBConfig(down_dim=8, up_dim=6)))
    found = personalize([photo], base, RELAXED, hypernet=denoiser)
    assert found.theta.shape[0] == len(found.factors) == 128
    assert all(name.startswith("unet.") for name in found.factors)


def test_other_weights_of_the_base_are_a_warning(base, space, photo, make_hypernetwork):
    network = make_hypernetwork(space)
    network.config.record["base_fingerprint"] = network.config.record["base_fingerprint"].replace("0.", "1.")
    with pytest.warns(UserWarning, match="was made on mini, whose weights differ"):
        personalize([photo], base, ALONE, hypernet=network)


def test_a_theta_file_cannot_hold_learned_bases(base, learned, photo, tmp_path, no_work, monkeypatch):
    out, theta = tmp_path / "me.safetensors", tmp_path / "theta.safetensors"
    learned.save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match="has learned its bases, and a theta file holds none"):
        request_person([photo], out, ALONE, save_theta=theta, hypernet=tmp_path / "net")
    with pytest.raises(ValueError, match="leave --save-theta out"):
        personalize_to_files([photo], base, out, ALONE, save_theta=theta, hypernet=learned)
    monkeypatch.undo()
    result = personalize([photo], base, ALONE, hypernet=learned)
    with pytest.raises(ValueError, match="has learned its bases"):
        result.save_theta(theta)
    assert [file.name for file in tmp_path.iterdir()] == ["net"]


def test_theta_starts_at_one_place(base, learned, photo, tmp_path):
    for call in (
        lambda **starts: personalize([photo], base, ALONE, **starts),
        lambda **starts: request_person([photo], tmp_path / "me.safetensors", ALONE, **starts),
    ):
        with pytest.raises(ValueError, match="from_theta and hypernet are both given"):
            call(from_theta=tmp_path / "theta.safetensors", hypernet=learned)


def test_damage_is_found_before_a_base_is_loaded(learned, photo, tmp_path, no_work):
    folder, out = tmp_path / "net", tmp_path / "me.safetensors"
    learned.save_pretrained(folder)
    request_person([photo], out, ALONE, hypernet=folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        request_person([photo], out, ALONE, hypernet=folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="net holds a model of type 'vit'"):
        request_person([photo], out, ALONE, hypernet=folder)
    with pytest.raises(FileNotFoundError, match="could not be downloaded from the Hugging Face hub"):
        request_person([photo], out, ALONE, hypernet=tmp_path / "none")
