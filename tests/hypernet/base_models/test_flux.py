"""FLUX.1 from end to end, beside diffusers' own pipeline and its flow matching."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from converters.convert import prepare_conversion
from hypernet.base_models.flux import image_ids, pack, shifted_sigmas, unpack
from hypernet.base_models.flux_file import rename
from hypernet.base_models.loading import load_base
from hypernet.fitting.engine import fit_theta
from hypernet.fitting.preoptimize import open_targets, preoptimize
from hypernet.inputs.people import open_people
from hypernet.personalization import personalize
from hypernet.recipe import FitConfig, PersonalizeConfig, PreoptimizeConfig
from hypernet.sampling import generate
from lidb_peft import LiDBConfig, LiDBSpace
from lidb_peft.safe_read import read_header

LIDB = LiDBConfig(down_dim=8, up_dim=6)
QUICK = PersonalizeConfig(theta_steps=1, theta_lr=0.1, steps=2, lr=0.05, rank=2, crop=False, preservation=0.0)
PROMPTS = ("a sks face", "a pencil drawing of a sks face")
SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def flux(flux_folder):
    return load_base(str(flux_folder), device="cpu", precision="fp32", guidance_scale=2.5)


@pytest.fixture(scope="module")
def flux_space(flux):
    return LiDBSpace(flux.adapted, LIDB)


@pytest.fixture(scope="module")
def person(flux, portrait):
    return personalize([portrait], flux, QUICK, LIDB)


def open_pipeline(folder, **options):
    """diffusers' own, loaded by itself."""
    pipeline = FluxPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, steps=2, **options):
    options = {"prompt": PROMPTS[0], "guidance_scale": 2.5} | options
    return pipeline(
        num_inference_steps=steps, height=32, width=32, output_type="latent",
        generator=torch.Generator().manual_seed(0), **options,
    ).images  # fmt: skip


# ---- what the transformer is asked ----


def test_latents_are_packed_and_numbered_as_the_pipeline_does(flux):
    latents = torch.randn(3, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 3, 4, 6, 10))
    assert torch.equal(unpack(tokens, 6, 10), latents)
    assert torch.equal(image_ids(6, 10), FluxPipeline._prepare_latent_image_ids(3, 3, 5, "cpu", torch.float32))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_transformer_is_asked_what_the_pipeline_asks_it(flux_folder, precision):
    base = load_base(str(flux_folder), device="cpu", precision=precision, guidance_scale=2.5)
    pipeline = open_pipeline(flux_folder, dtype=base.dtype)
    asked = []
    for transformer in (pipeline.transformer, base.transformer):
        handle = transformer.register_forward_hook(lambda *call: asked.append(call), with_kwargs=True)
        if transformer is pipeline.transformer:
            draw(pipeline)
        else:
            for call, timestep in zip(asked[:2], pipeline.scheduler.timesteps, strict=True):
                noisy_latents = unpack(call[2]["hidden_states"], *SHAPE[1:])
                prompt_embeds = base.encode_prompts(base.prepare_prompts(PROMPTS[:1]))
                velocity = base.denoise(noisy_latents, timestep[None], prompt_embeds)
                assert torch.equal(velocity, unpack(call[3][0], *SHAPE[1:]).float())
        handle.remove()
    for (_, _, theirs, _), (_, _, ours, _) in zip(asked[:2], asked[2:], strict=True):
        assert {name for name in theirs if name != "joint_attention_kwargs"} == ours.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name], name


def test_pictures_are_drawn_as_the_pipeline_draws_them(flux, flux_folder):
    expected = draw(open_pipeline(flux_folder))
    inputs = flux.pipeline_inputs(PROMPTS[:1], 2.5)
    assert torch.equal(draw(flux.pipeline(), prompt=None, **inputs), expected)


def test_a_prompt_is_read_by_t5_once(flux_folder):
    base = load_base(str(flux_folder), device="cpu", precision="fp32")
    calls = []
    base.text_encoder_2.register_forward_hook(lambda *call: calls.append(call))
    first = base.prepare_prompts([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    again = base.prepare_prompts(PROMPTS)
    assert len(calls) == 2
    assert torch.equal(first.prompt_embeds[:2], again.prompt_embeds)
    assert not any(parameter.requires_grad for parameter in base.text_encoder_2.parameters())


# ---- the flow ----


def test_noise_is_added_as_diffusers_scheduler_adds_it(flux):
    scheduler = FlowMatchEulerDiscreteScheduler()
    latents, noise = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    timesteps = scheduler.timesteps[[0, 400, 999]]
    expected = scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(flux.add_noise(latents, noise, timesteps), expected)


def test_the_target_leads_from_the_noisy_latents_to_the_clean_ones(flux):
    latents, noise = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1.0, 400.0, 1000.0])
    noisy, target = flux.add_noise(latents, noise, timesteps), flux.target(latents, noise, timesteps)
    torch.testing.assert_close(noisy - timesteps.view(-1, 1, 1, 1) / 1000 * target, latents, atol=1e-5, rtol=1e-5)
    for found, true in zip(flux.finished(noisy, target, timesteps), (latents, noise), strict=True):
        torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-5)


def test_latents_are_scaled_as_the_pipeline_unscales_them(flux):
    mean = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    moments = torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)
    config = flux.vae.config
    latents = flux.sample_latents(moments, torch.zeros_like(mean))
    torch.testing.assert_close(latents / config.scaling_factor + config.shift_factor, mean)
    with torch.no_grad():
        torch.testing.assert_close(flux.decode_latents(latents), flux.vae.decode(mean).sample)


@pytest.mark.parametrize("shift", [1.0, 1.6, 3.1582])
@pytest.mark.parametrize("highest", [1.0, 0.7])
def test_noise_levels_are_spread_as_kohya_s_flux_shift_draws_them(shift, highest):
    t = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).sigmoid()
    drawn = shift * t / (1 + (shift - 1) * t)
    drawn = drawn[drawn < highest]
    positions = torch.linspace(0.02, 0.98, 25)
    expected = torch.quantile(drawn[:100_000], positions)
    torch.testing.assert_close(shifted_sigmas(positions, shift, highest), expected, atol=0.01, rtol=0)
    assert shifted_sigmas(torch.tensor([0.0, 1 - 1e-7]), shift, highest).max() <= highest


def test_noise_levels_are_shifted_as_the_scheduler_shifts_its_own(flux):
    scheduler = flux.scheduler
    mu = 0.5 + (64 - 256) * (1.15 - 0.5) / (4096 - 256)  # diffusers' calculate_shift, of 8 x 8 tokens
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(sigmas=[0.3, 0.6, 0.9], mu=mu)
    t = torch.tensor([0.3, 0.6, 0.9])
    torch.testing.assert_close(flux.shift * t / (1 + (flux.shift - 1) * t), scheduler.sigmas[:3])


# ---- fitting ----


def test_nobody_s_fit_depends_on_who_shares_the_batch(flux, flux_space, assert_fits_are_apart):
    assert_fits_are_apart(flux, flux_space, PROMPTS[0], steps=1)


def test_gradient_checkpointing_changes_no_gradient(flux, flux_space):
    theta = (flux_space.theta_0 + 0.1 * flux_space.mask).requires_grad_()
    noisy = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    prompts = flux.prepare_prompts(PROMPTS)
    gradients = []
    for enabled in (False, True):
        with flux.checkpointed(enabled), flux_space.apply(flux_space.expand(theta)):
            velocity = flux.denoise(noisy, torch.tensor([100.0, 700.0]), flux.encode_prompts(prompts))
            gradients += torch.autograd.grad(velocity.square().sum(), theta)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_people_are_preoptimized(flux, flux_space, drawn_faces, datasets_cache, tmp_path):
    (tmp_path / "faces").mkdir()
    for index, face in enumerate(drawn_faces[:2]):
        (tmp_path / "faces" / f"{index}.png").write_bytes(face)
    people, config = open_people(tmp_path / "faces"), PreoptimizeConfig(QUICK, batch_size=2)
    store = open_targets(tmp_path / "targets", flux, flux_space, people, config)
    assert preoptimize(people, flux, flux_space, store, config).fitted == 2
    first, second = store.thetas(sorted(store.places))
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"guidance_scale 2.5 \(here 3.5\)"):
        open_targets(tmp_path / "targets", replace(flux, guidance_scale=3.5), flux_space, people, config)


# ---- the LoRA file ----


def test_diffusers_draws_with_the_file_what_the_fit_draws(person, flux_folder, tmp_path):
    person.save(tmp_path / "kohya.safetensors", dtype=torch.float32)
    assert all(name.startswith("lora_unet_") for name in read_header(tmp_path / "kohya.safetensors").tensors)
    # diffusers reads kohya's fused layers at the published widths only.
    prepare_conversion(tmp_path / "kohya.safetensors", tmp_path / "me.safetensors", "diffusers").write()
    pipeline = open_pipeline(flux_folder)
    plain = draw(pipeline)
    inputs = person.base.pipeline_inputs(PROMPTS[:1], 2.5)
    with person.space.apply(person.factors):
        expected = draw(person.base.pipeline(), prompt=None, **inputs)
    pipeline.load_lora_weights(str(tmp_path), weight_name="me.safetensors")
    assert (draw(pipeline) - expected).norm() < 1e-4 * (expected - plain).norm()


def test_clip_is_adapted_on_request(flux_folder, portrait, tmp_path):
    base = load_base(str(flux_folder), device="cpu", precision="fp32", train_text_encoder=True)
    assert list(base.adapted) == ["transformer", "text_encoder"]
    person = personalize([portrait], base, QUICK, LIDB)
    taught = {name.partition(".")[0] for name, (_, lora_B) in person.factors.items() if lora_B.any()}
    assert taught == {"transformer", "text_encoder"}
    person.save(tmp_path / "kohya.safetensors", dtype=torch.float32)
    prepare_conversion(tmp_path / "kohya.safetensors", tmp_path / "me.safetensors", "diffusers").write()
    pipeline = open_pipeline(flux_folder)
    plain = draw(pipeline)
    with person.space.apply(person.factors):
        expected = draw(base.pipeline(), prompt=None, **base.pipeline_inputs(PROMPTS[:1], 2.5))
    pipeline.load_lora_weights(str(tmp_path), weight_name="me.safetensors")
    assert (draw(pipeline) - expected).norm() < 1e-4 * (expected - plain).norm()


def test_pictures_are_drawn(person):
    (mine,) = generate(person.base, PROMPTS[:1], person.space, person.factors, num_steps=2)
    (plain,) = generate(person.base, PROMPTS[:1], num_steps=2)
    assert mine.size == (32, 32)
    assert mine.tobytes() != plain.tobytes()


# ---- a transformer in a file of its own ----

STACKED = {
    "img_attn.qkv": ("to_q", "to_k", "to_v"),
    "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def authors_tensors(state):
    """A transformer's weights by the names of black-forest-labs' code, written down from ``src/flux/model.py``."""
    tensors = {}
    for kind in ("weight", "bias"):
        for ours, theirs in {
            "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
            "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
            "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
            "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
            "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
            "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
            "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        }.items():  # fmt: skip
            tensors[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        tensors[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        for i in range(2):
            block, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
            for stacked, parts in STACKED.items():
                tensors[f"{theirs}.{stacked}.{kind}"] = torch.cat([state[f"{block}.attn.{p}.{kind}"] for p in parts])
            for name, path in {
                "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.net.0.proj": "img_mlp.0",
                "ff.net.2": "img_mlp.2", "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
                "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
            }.items():  # fmt: skip
                tensors[f"{theirs}.{path}.{kind}"] = state[f"{block}.{name}.{kind}"]
            block, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            tensors[f"{theirs}.linear1.{kind}"] = torch.cat([state[f"{block}.{part}.{kind}"] for part in parts])
            tensors[f"{theirs}.linear2.{kind}"] = state[f"{block}.proj_out.{kind}"]
            tensors[f"{theirs}.modulation.lin.{kind}"] = state[f"{block}.norm.linear.{kind}"]
    for i in range(2):
        for stream, name in (("img", "norm_{}"), ("txt", "norm_added_{}")):
            for long, short in (("query", "q"), ("key", "k")):
                ours = f"transformer_blocks.{i}.attn.{name.format(short)}.weight"
                tensors[f"double_blocks.{i}.{stream}_attn.norm.{long}_norm.scale"] = state[ours]
        for long, short in (("query", "q"), ("key", "k")):
            ours = f"single_transformer_blocks.{i}.attn.norm_{short}.weight"
            tensors[f"single_blocks.{i}.norm.{long}_norm.scale"] = state[ours]
    return tensors


@pytest.mark.parametrize("kind", ["authors", "authors with a prefix", "diffusers"])
def test_a_transformer_in_a_file_of_its_own_loads(flux, flux_folder, tmp_path, kind):
    state = {name: value.contiguous() for name, value in flux.transformer.state_dict().items()}
    tensors = state if kind == "diffusers" else authors_tensors(state)
    prefix = "model.diffusion_model." if "prefix" in kind else ""
    save_file({prefix + name: value.contiguous() for name, value in tensors.items()}, tmp_path / "me.safetensors")
    components = shutil.copytree(flux_folder, tmp_path / "components")
    (components / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    base = load_base(str(tmp_path / "me.safetensors"), device="cpu", precision="fp32", components=components)
    loaded = base.transformer.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_file_s_names_are_those_that_diffusers_makes_of_them():
    """At the published widths, which its converter takes for granted; on tensors without numbers."""
    with torch.device("meta"):
        square, wide = torch.empty(3072, 8), torch.empty(7 * 3072, 8)
        tensors = {name: torch.empty(3 * 3072) if name.endswith("bias") else torch.empty(3 * 3072, 8)
                   for name in ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.txt_attn.qkv.weight",
                                "double_blocks.0.img_attn.qkv.bias", "double_blocks.0.txt_attn.qkv.bias")}  # fmt: skip
        for kind in ("weight", "bias"):
            for name in ("img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"):
                tensors[f"{name}.{kind}"] = square
            for name in ("time_in", "vector_in", "guidance_in"):
                tensors |= {f"{name}.{part}_layer.{kind}": square for part in ("in", "out")}
            for name in ("img_attn.proj", "txt_attn.proj", "img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2",
                         "img_mod.lin", "txt_mod.lin"):  # fmt: skip
                tensors[f"double_blocks.0.{name}.{kind}"] = square
            tensors |= {f"single_blocks.0.{name}.{kind}": square for name in ("linear2", "modulation.lin")}
            tensors[f"single_blocks.0.linear1.{kind}"] = wide if kind == "weight" else torch.empty(7 * 3072)
        for stream in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
            tensors |= {f"{stream}.norm.{name}_norm.scale": torch.empty(128) for name in ("query", "key")}
    ours = {name: part.shape for key, value in tensors.items() for name, part in rename(key, value)}
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(tensors))
    assert ours == {name: value.shape for name, value in expected.items()}


# ---- refused ----


def refused(source, text, kind=ValueError, **options):
    with pytest.raises(kind, match=text) as caught:
        load_base(str(source), device="cpu", **options)
    assert "\n" not in str(caught.value)


def test_what_only_flux_has_is_refused_elsewhere(sdxl_folder, flux_folder):
    text = "is for FLUX.1, and .* is Stable Diffusion"
    refused(sdxl_folder, f"--quantize {text}", quantize="nf4")
    refused(sdxl_folder, f"--guidance-scale {text}", guidance_scale=3.5)
    refused(sdxl_folder, f"--train-text-encoder {text}", train_text_encoder=True)
    refused(flux_folder, "--components requires", components=sdxl_folder)
    refused(flux_folder, "quantize is 'int2'; choose nf4 or int8", quantize="int2")


def test_a_model_without_guidance_is_told_none(flux_folder, tmp_path):
    folder = shutil.copytree(flux_folder, tmp_path / "schnell")
    pipeline = open_pipeline(folder)
    config = dict(pipeline.transformer.config) | {"guidance_embeds": False}
    pipeline.transformer = type(pipeline.transformer).from_config(config)
    pipeline.save_pretrained(folder)
    refused(folder, "takes no guidance scale", guidance_scale=1.0)
    base = load_base(str(folder), device="cpu", precision="fp32")
    assert base.prepare_prompts(PROMPTS).prompt_embeds.shape[1] == 256
    assert generate(base, PROMPTS[:1], num_steps=1)[0].size == (32, 32)


def test_a_transformer_s_file_needs_the_other_components(flux, flux_folder, sdxl_folder, tmp_path):
    file = tmp_path / "me.safetensors"
    save_file({name: value.contiguous() for name, value in flux.transformer.state_dict().items()}, file)
    refused(file, "holds the transformer of FLUX.1 alone; pass --components with a diffusers folder")
    refused(file, "is not a folder", FileNotFoundError, components=tmp_path / "nowhere")
    refused(file, "holds a Stable Diffusion.*, and .* is of FLUX.1", components=sdxl_folder)
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, file)
    refused(file, "of its weights are not those of .*config.json", components=flux_folder)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("distilled_guidance_layer.in_proj.weight", "Chroma"),
        ("double_stream_modulation_img.lin.weight", "FLUX.2"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder"),
    ],
)
def test_a_file_of_another_family_is_named(tmp_path, name, title):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "me.safetensors")
    refused(tmp_path / "me.safetensors", f"seems to be {title}; pass a whole model of .*FLUX.1")


# ---- fewer bits ----


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 0.3), ("int8", 0.05)])
def test_a_quantised_transformer_predicts_nearly_the_same_and_is_fitted(
    flux, flux_folder, kind, tolerance, new_subject
):
    pytest.importorskip("bitsandbytes")
    base = load_base(str(flux_folder), device="cpu", precision="fp32", quantize=kind, guidance_scale=2.5)
    stored = {parameter.dtype for block in base.transformer.transformer_blocks for parameter in block.parameters()}
    assert stored & {torch.uint8, torch.int8}
    noisy = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = (
            model.denoise(noisy, torch.tensor([500.0]), model.encode_prompts(model.prepare_prompts(PROMPTS[:1])))
            for model in (base, flux)
        )
    assert 0 < (found - expected).norm() < tolerance * expected.norm()
    space = LiDBSpace(base.adapted, LIDB)
    theta, losses = fit_theta(
        base, space, [new_subject("ann", 2, PROMPTS[0], "a face", SHAPE)], FitConfig(steps=1, lr=0.1)
    )
    assert not torch.equal(theta[0], space.theta_0)
    assert losses.isfinite().all()
