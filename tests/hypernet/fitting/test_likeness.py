"""The likeness of drawn pictures in a fit. The networks that recognise here are formulas, so that answers are known."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from hypernet.base_models.base import PromptEmbeds
from hypernet.base_models.loading import load_base
from hypernet.fitting import likeness
from hypernet.fitting.engine import fit_flat_lora, fit_lora
from hypernet.fitting.likeness import PICTURES, STEPS, Likeness, half_drawn
from hypernet.fitting.subjects import make_subjects
from hypernet.inputs.people import open_people, prepare_person
from hypernet.recipe import FitConfig
from lidb_peft import LiDBConfig, LiDBSpace

RANK = 2
FIT = FitConfig(steps=3, lr=0.02, likeness=5.0, guidance=3.0, preserved=("a pencil drawing of {}",), preservation=1.0)


class Colours:
    """Takes the mean colour of a picture for the person: what it should be is known, and every picture has it."""

    def embed(self, pixels):
        return normalize(pixels.mean(dim=(2, 3)), dim=1)


class Blind:
    """Sees nobody."""

    def embed(self, pixels):
        return pixels.new_zeros(len(pixels), 3)


RED = torch.tensor([1.0, 0.0, 0.0])


@pytest.fixture
def people(new_subject):
    return [replace(new_subject(key, 1, "a sks face", "a face"), embedding=RED) for key in ("ann", "bob")]


@pytest.fixture
def prepared(portrait, tmp_path):
    """A function: a base -> one person on two photos."""
    folder = tmp_path / "people" / "ann"
    folder.mkdir(parents=True)
    with Image.open(portrait) as picture:
        picture.save(folder / "0.png")
        picture.rotate(180).save(folder / "1.png")

    def prepare(base):
        (person,) = open_people(folder.parent)
        return prepare_person(person, base.size_px, False)[0]

    return prepare


def redness(base, space, factors):
    """Of one picture, drawn to its end."""
    with torch.no_grad(), space.apply(factors):
        asked = base.encode_prompts(base.prepare_prompts(["a sks face"]))
        noise = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(9))
        pictures = base.decode_latents(half_drawn(base, noise, asked, STEPS - 1, 3.0))
    return float(Colours().embed(pictures)[0, 0])


def test_pictures_are_drawn_as_diffusers_pipeline_draws_them(base):
    asked = base.encode_prompts(base.prepare_prompts(["a cartoon of a face", "a face at night"]))
    noise = torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = half_drawn(base, noise, asked, STEPS - 1, 4.0)
    drawn = base.pipeline()(
        prompt_embeds=asked.prompt_embeds, negative_prompt_embeds=base.encode_no_prompt(asked).prompt_embeds,
        latents=noise, num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(found, drawn, atol=1e-3)


def test_a_fit_draws_more_of_what_its_recogniser_rewards(base, space, people):
    plain, _ = fit_lora(base, space, people[:1], replace(FIT, likeness=0.0), RANK)
    fitted, _ = fit_lora(base, space, people[:1], FIT, RANK, recogniser=Colours())
    assert redness(base, space, fitted[0]) > redness(base, space, plain[0]) + 0.05


def test_who_shares_the_batch_does_not_matter(base, space, people):
    together, losses = fit_flat_lora(base, space, people, replace(FIT, steps=1), RANK, recogniser=Colours())
    for row, person in enumerate(people):
        alone, own = fit_flat_lora(base, space, [person], replace(FIT, steps=1), RANK, recogniser=Colours())
        assert torch.allclose(losses[:, row], own[:, 0], rtol=1e-5)
        moved = together[row] - alone[0]
        # Adam's first step is the gradient's sign, which rounding gives where there is none.
        assert (moved.abs() > 1e-4).float().mean() < 0.02


def test_a_resumed_fit_draws_what_an_uninterrupted_one_draws(base, space, people):
    whole, _ = fit_flat_lora(base, space, people, FIT, RANK, recogniser=Colours())
    states = []
    fit_flat_lora(
        base,
        space,
        people,
        FIT,
        RANK,
        recogniser=Colours(),
        observe=lambda run: bool(states.append(run.state())) or True,
    )
    resumed, _ = fit_flat_lora(base, space, people, FIT, RANK, recogniser=Colours(), resume=states[0])
    assert torch.equal(resumed, whole)


def test_pictures_that_are_decoded_one_by_one_give_the_same(base, space, people, monkeypatch):
    whole, _ = fit_flat_lora(base, space, people, replace(FIT, steps=1), RANK, recogniser=Colours())
    monkeypatch.setattr(likeness, "_PIXELS_AT_ONCE", 1)
    parts, _ = fit_flat_lora(base, space, people, replace(FIT, steps=1), RANK, recogniser=Colours())
    assert ((parts - whole).abs() > 1e-4).float().mean() < 0.02


def test_a_picture_in_which_nobody_is_seen_teaches_nothing(base, space, people):
    plain, _ = fit_flat_lora(base, space, people, replace(FIT, likeness=0.0, steps=1), RANK)
    blind, _ = fit_flat_lora(base, space, people, replace(FIT, steps=1), RANK, recogniser=Blind())
    assert torch.equal(blind, plain)


def test_half_of_the_pictures_are_of_prompts_whose_effect_is_preserved(base):
    drawn = Likeness(base, Colours(), ["a sks face"], RED[None], ("{} at night", "a cartoon of {}"), 3.0)
    generators = [torch.Generator().manual_seed(1)], torch.Generator().manual_seed(2)
    chosen = [drawn.choose(*generators) for _ in range(200)]
    prompts = torch.stack([each.prompts for each in chosen]).flatten()
    assert len(prompts) == 200 * PICTURES
    shares = torch.bincount(prompts, minlength=3) / len(prompts)
    assert torch.allclose(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.1)
    stops = {each.stop for each in chosen}
    assert stops == set(range(likeness.FIRST_STOP, STEPS))
    plain = Likeness(base, Colours(), ["a sks face"], RED[None], (), 3.0)
    assert not plain.choose(*generators).prompts.any()


def test_what_is_missing_is_said(base, space, people):
    with pytest.raises(ValueError, match="pass a recogniser, or set likeness to 0"):
        fit_lora(base, space, people, FIT, RANK)
    with pytest.raises(ValueError, match="has no embedding"):
        fit_lora(base, space, [replace(people[0], embedding=None)], FIT, RANK, recogniser=Colours())
    with pytest.raises(ValueError, match="cannot be replayed as a CUDA graph; set graph to auto or off"):
        replace(FIT, graph="on")


def test_people_get_the_mean_embedding_of_their_photos(base, prepared):
    person = prepared(base)
    assert len(person.photos) == 2
    (subject,) = make_subjects(base, [person], "a sks face", "a face", recogniser=Colours())
    expected = normalize(Colours().embed(person.pixels).sum(dim=0), dim=0)
    assert torch.allclose(subject.embedding, expected)


def test_people_in_whose_photos_nobody_is_seen_are_named(base, prepared):
    with pytest.raises(
        ValueError, match="nobody is recognised in the photos of ann; choose others, or pass --likeness"
    ):
        make_subjects(base, [prepared(base)], "a sks face", recogniser=Blind())
    failed = {}
    (subject,) = make_subjects(base, [prepared(base)], "a sks face", recogniser=Blind(), failed=failed)
    assert list(failed) == [0]
    assert not subject.embedding.any()


def test_a_base_without_guidance_is_drawn_without_it(flux_folder, prepared):
    base = load_base(str(flux_folder), device="cpu", precision="fp32")
    space = LiDBSpace(base.adapted, LiDBConfig(down_dim=8, up_dim=6))
    assert base.encode_no_prompt(base.encode_prompts(base.prepare_prompts(["a face"]))) is None
    subjects = make_subjects(base, [prepared(base)], "a sks face", "a face", recogniser=Colours())
    plain, _ = fit_flat_lora(base, space, subjects, replace(FIT, steps=1, likeness=0.0), RANK)
    fitted, losses = fit_flat_lora(base, space, subjects, replace(FIT, steps=1), RANK, recogniser=Colours())
    assert torch.isfinite(losses).all()
    assert not torch.equal(fitted, plain)


def test_sdxl_learns_from_its_pictures_too(sdxl, prepared):
    space = LiDBSpace(sdxl.models_to_adapt("all"), LiDBConfig(down_dim=8, up_dim=6))
    subjects = make_subjects(sdxl, [prepared(sdxl)], "a sks face", "a face", recogniser=Colours())
    plain, _ = fit_flat_lora(sdxl, space, subjects, replace(FIT, steps=1, likeness=0.0), RANK)
    fitted, losses = fit_flat_lora(sdxl, space, subjects, replace(FIT, steps=1), RANK, recogniser=Colours())
    assert torch.isfinite(losses).all()
    assert not torch.equal(fitted, plain)


def test_sdxl_draws_with_zeros_for_no_prompt(sdxl):
    asked = sdxl.encode_prompts(sdxl.prepare_prompts(["a face", "a hat"]))
    nothing = sdxl.encode_no_prompt(asked)
    assert isinstance(nothing, PromptEmbeds)
    assert len(nothing) == 2
    assert not nothing.prompt_embeds.any()
    own = replace(sdxl, zeros_for_no_prompt=False).encode_no_prompt(asked)
    assert own.prompt_embeds.any()
    assert own.pooled_prompt_embeds.any()
