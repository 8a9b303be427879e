"""Stable Diffusion XL from end to end, beside diffusers' own pipeline."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from converters import describe, write_lora
from hypernet.base_models.base import PromptEmbeds
from hypernet.base_models.loading import load_base
from hypernet.fitting.preoptimize import open_targets, preoptimize
from hypernet.inputs.people import open_people
from hypernet.personalization import personalize
from hypernet.personalized import lora_metadata
from hypernet.recipe import PersonalizeConfig, PreoptimizeConfig
from hypernet.sampling import generate, lora_applied
from hypernet.sheets import DrawConfig, generate_to_file
from lidb_peft import LiDBConfig, LiDBSpace
from lidb_peft.safe_read import read_header

LIDB = LiDBConfig(down_dim=8, up_dim=6)
QUICK = PersonalizeConfig(adapt="all", theta_steps=2, theta_lr=0.1, steps=2, lr=0.05, rank=2, crop=False)
PROMPTS = ("a sks face", "a pencil drawing of a sks face")


@pytest.fixture(scope="module")
def xl_space(sdxl):
    return LiDBSpace(sdxl.adapted, LIDB)


@pytest.fixture(scope="module")
def person(sdxl, portrait):
    return personalize([portrait], sdxl, QUICK, LIDB)


@pytest.fixture
def pipeline(sdxl_folder):
    """diffusers' own, loaded by itself."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline, steps=3, guidance=4.0):
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        PROMPTS[0], num_inference_steps=steps, guidance_scale=guidance, height=32, width=32, output_type="latent",
        generator=generator,
    ).images  # fmt: skip


# ---- what the UNet is asked ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(sdxl_folder, precision):
    base = load_base(str(sdxl_folder), device="cpu", precision=precision)
    prompts = base.prepare_prompts(PROMPTS)
    ids = prompts.token_ids
    assert not torch.equal(ids[:, 0], ids[:, 1])  # the encoders are padded differently
    embeds = base.encode_prompts(prompts)
    expected, _, pooled, _ = base.pipeline().encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    assert embeds.prompt_embeds.dtype == base.dtype
    assert torch.equal(embeds.prompt_embeds, expected)
    assert torch.equal(embeds.pooled_prompt_embeds, pooled)


def test_the_unet_is_asked_what_the_pipeline_asks_it(sdxl, pipeline):
    asked = []
    for unet in (pipeline.unet, sdxl.unet):
        handle = unet.register_forward_hook(lambda *call: asked.append(call), with_kwargs=True)
        if unet is pipeline.unet:
            latents(pipeline, steps=1, guidance=1.0)
            ((_, (noisy, timestep), theirs, expected),) = asked
        else:
            answer = sdxl.denoise(noisy, timestep[None].long(), sdxl.encode_prompts(sdxl.prepare_prompts([PROMPTS[0]])))
        handle.remove()
    _, (seen, _, hidden), ours, _ = asked[1]
    assert torch.equal(seen, noisy)
    assert torch.equal(hidden, theirs["encoder_hidden_states"])
    assert ours["added_cond_kwargs"].keys() == theirs["added_cond_kwargs"].keys()
    for name, value in theirs["added_cond_kwargs"].items():
        assert torch.equal(ours["added_cond_kwargs"][name], value), name
    assert torch.equal(answer, expected[0])


def test_rows_of_prompts_keep_both_embeddings_together(sdxl):
    first, second = (sdxl.encode_prompts(sdxl.prepare_prompts([prompt])) for prompt in PROMPTS)
    both = PromptEmbeds.concatenate([first, second])
    turned = both.rows(torch.tensor([1, 0, 1]))
    for name in vars(both):
        one, two = getattr(first, name), getattr(second, name)
        assert torch.equal(getattr(turned, name), torch.cat([two, one, two]))


# ---- fitting ----


def test_nobody_s_fit_depends_on_who_shares_the_batch(sdxl, xl_space, assert_fits_are_apart):
    assert_fits_are_apart(sdxl, xl_space, PROMPTS[0], steps=2)


@pytest.mark.usefixtures("checkpointing")
def test_gradient_checkpointing_changes_no_gradient(sdxl, xl_space):
    theta = (xl_space.theta_0 + 0.1 * xl_space.mask).requires_grad_()
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = sdxl.prepare_prompts(PROMPTS)
    gradients = []
    for enabled in (False, True):
        with sdxl.checkpointed(enabled), xl_space.apply(xl_space.expand(theta)):
            for model in sdxl.adapted.values():
                assert model.training == enabled
            answer = sdxl.denoise(noisy, torch.tensor([100, 700]), sdxl.encode_prompts(prompts))
            gradients += torch.autograd.grad(answer.square().sum(), theta)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_all_layers_learn_but_the_one_that_sdxl_does_not_read(person):
    """Of the first text encoder the last layer is left out, of the second only the pooled embedding has passed it."""
    still = {layer.rsplit(".", 2)[0] for layer, (_, lora_B) in person.factors.items() if not lora_B.any()}
    assert still == {"text_encoder.text_model.encoder.layers.1"}


def test_people_are_preoptimized(sdxl, xl_space, drawn_faces, datasets_cache, tmp_path):
    (tmp_path / "faces").mkdir()
    for index, face in enumerate(drawn_faces[:2]):
        (tmp_path / "faces" / f"{index}.png").write_bytes(face)
    people, config = open_people(tmp_path / "faces"), PreoptimizeConfig(QUICK, batch_size=2)
    store = open_targets(tmp_path / "targets", sdxl, xl_space, people, config)
    assert preoptimize(people, sdxl, xl_space, store, config).fitted == 2
    first, second = store.thetas(sorted(store.places))
    assert not torch.equal(first, second)


# ---- the LoRA file ----


def kohya_name(layer, unet_name):
    component, _, path = layer.partition(".")
    if component == "unet":
        path = unet_name(f"{path}.weight", is_xl=True).removesuffix(".weight")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component]
    return prefix + path.replace(".", "_")


def test_the_file_is_named_and_marked_as_kohya_s_sdxl_loras_are(person, tmp_path, import_helper):
    person.save(tmp_path / "me.safetensors")
    unet_name = import_helper("ldm_checkpoint").unet_name
    header = read_header(tmp_path / "me.safetensors")
    names = {name.partition(".")[0] for name in header.tensors}
    assert names == {kohya_name(layer, unet_name) for layer in person.factors}
    assert len(names) == 136 + 8 + 8
    assert "lora_unet_input_blocks_8_1_transformer_blocks_1_attn2_to_k" in names
    expected = {
        "ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False", "ss_resolution": "(32, 32)",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.resolution": "32x32",
    }  # fmt: skip
    assert {key: header.metadata[key] for key in expected} == expected
    assert json.loads((tmp_path / "me.json").read_text())["sd version"] == "SDXL"
    assert describe(tmp_path / "me.safetensors").base == "SDXL"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2)])
def test_diffusers_draws_with_the_file_what_the_fit_draws(person, pipeline, tmp_path, dtype, tolerance):
    person.save(tmp_path / "me.safetensors", dtype=dtype)
    plain = latents(pipeline)
    with person.space.apply(person.factors):
        expected = latents(person.base.pipeline())
    pipeline.load_lora_weights(str(tmp_path), weight_name="me.safetensors")
    assert set(pipeline.get_list_adapters()) == set(person.base.adapted)
    assert (latents(pipeline) - expected).norm() < tolerance * (expected - plain).norm()


def test_pictures_are_drawn_with_the_file(person, tmp_path):
    person.save(tmp_path / "me.safetensors", dtype=torch.float32)
    generate_to_file(
        person.base, PROMPTS[:1], tmp_path / "me.png", [tmp_path / "me.safetensors"], config=DrawConfig(num_steps=2)
    )
    (expected,) = generate(person.base, PROMPTS[:1], person.space, person.factors, num_steps=2)
    (plain,) = generate(person.base, PROMPTS[:1], num_steps=2)
    found = Image.open(tmp_path / "me.png")
    assert found.size == (32, 32)
    assert max(abs(a - b) for a, b in zip(found.tobytes(), expected.tobytes(), strict=True)) <= 1
    assert plain.tobytes() != expected.tobytes()


def test_a_lora_of_another_family_is_refused(sdxl, person, tmp_path):
    file = tmp_path / "me.safetensors"
    layers = {name: pair for name, pair in person.factors.items() if name.startswith("text_encoder.")}
    write_lora(file, layers, replace(lora_metadata(sdxl, PROMPTS[0]), family="sd1"))
    with pytest.raises(ValueError, match=r"is made for SD1 and .* is SDXL"), lora_applied(sdxl, file):
        pass


# ---- pictures and photos ----


def test_a_model_that_encodes_the_empty_prompt_goes_on_doing_so(sdxl_folder, tmp_path):
    """SDXL has zeros there; some models of its kind do not."""
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    base = load_base(str(folder), device="cpu", precision="fp32")
    _, empty, _, pooled = base.pipeline().encode_prompt(PROMPTS[0])
    expected = base.encode_prompts(base.prepare_prompts([""]))
    assert torch.equal(empty, expected.prompt_embeds)
    assert torch.equal(pooled, expected.pooled_prompt_embeds)


def test_in_half_precision_the_vae_encodes_and_draws_in_full(sdxl_folder):
    """SDXL's overflows in float16."""
    base = load_base(str(sdxl_folder), device="cpu", precision="fp32")
    seen = []
    for part in (*base.adapted.values(), base.vae):
        part.to(torch.float16)
    for part in (base.vae.encoder, base.vae.decoder):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    base.encode_photos(torch.zeros(1, 3, 32, 32))
    generate(base, PROMPTS[:1], num_steps=1)
    assert seen == [torch.float32, torch.float32]
    base.release_vae()  # which drawing leaves in full precision, and on the device
    assert base.vae.dtype == torch.float16
