"""Base models in single files, as Automatic1111 and kohya users have them, without any hub."""

import re
import shutil
import time
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from hypernet.base_models.checkpoints import denoiser_prefix
from hypernet.base_models.loading import load_base
from hypernet.base_models.prediction import stated_prediction
from hypernet.base_models.stable_diffusion_file import (
    find_parts,
    stated_size,
    text_encoder_config,
    unet_config,
    vae_config,
)
from lidb_peft.families import FAMILIES

STATED = {"modelspec.resolution": "64x64", "modelspec.prediction_type": "epsilon"}
KINDS = ("sd1", "sd2", "sdxl")
FIRST = "cond_stage_model.transformer.text_model."


@pytest.fixture(scope="module")
def ldm(import_helper):
    return import_helper("ldm_checkpoint")


@pytest.fixture(scope="module")
def originals(import_helper, ldm):
    """A function: family -> a narrow pipeline and its tensors by the names that checkpoints have."""
    made = {}

    def make(kind):
        if kind not in made:
            pipeline = import_helper("narrow").NARROW[kind]()
            parts = SimpleNamespace(**pipeline.components)
            if kind != "sdxl":
                parts.text_encoder_2 = None
            tensors = ldm.checkpoint_tensors(parts)
            if kind == "sd2":
                tensors = {name: value for name, value in tensors.items() if not name.startswith(FIRST)}
                openclip = ldm.openclip_tensors(pipeline.text_encoder.state_dict())
                tensors |= {f"cond_stage_model.model.{name}": value.contiguous() for name, value in openclip.items()}
            made[kind] = pipeline, tensors
        return made[kind]

    return make


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Nothing here asks a hub, not even for what is in its cache."""

    def ask(*args, **options):
        raise AssertionError("the hub is asked")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", ask)


@pytest.fixture
def save(tmp_path):
    def write(tensors, metadata=STATED):
        save_file(tensors, tmp_path / "model.safetensors", metadata=dict(metadata))
        return tmp_path / "model.safetensors"

    return write


def load(file, **options):
    return load_base(str(file), device="cpu", precision="fp32", **options)


def refused(file, text, **options):
    with pytest.raises(ValueError, match=text) as caught:
        load(file, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


def assert_same(loaded, pipeline):
    names = [name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    assert len(names) >= 3
    for name in names:
        expected, found = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def replaced(tensors, start, new):
    return {new + name.removeprefix(start) if name.startswith(start) else name: t for name, t in tensors.items()}


# ---- what loads ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_models_that_it_was_written_from(originals, save, kind):
    pipeline, tensors = originals(kind)
    loaded = load(save(tensors))
    assert_same(loaded, pipeline)
    for name in pipeline.components:
        if name.startswith("tokenizer"):
            prompt = "a photo of a sks face, naïve & 2 more"
            ours, theirs = (
                getattr(model, name)(prompt, padding="max_length", max_length=77) for model in (loaded, pipeline)
            )
            assert ours["input_ids"] == theirs["input_ids"]
    assert loaded.size_px == 64
    assert type(loaded.scheduler) is type(pipeline.scheduler)
    assert torch.equal(loaded.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    assert loaded.vae.config.scaling_factor == pipeline.vae.config.scaling_factor
    ids = loaded.prepare_prompts(["a face"])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # and so the configs are those of the models, heads and activations included
        embeds = loaded.encode_prompts(ids)
        predicted = loaded.denoise(noise, torch.tensor([300]), embeds)
        encoded = pipeline.encode_prompt(
            "a face", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        added = {}
        if kind == "sdxl":
            times = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
            added = {"added_cond_kwargs": {"text_embeds": encoded[2], "time_ids": times}}
        expected = pipeline.unet(noise, 300, encoded[0], **added).sample
        pictures = [model.decode(noise).sample for model in (loaded.vae, pipeline.vae)]
    torch.testing.assert_close(predicted, expected)
    torch.testing.assert_close(*pictures)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_file_gives_what_diffusers_own_conversion_gives_with_a_folder_of_configs(originals, save, tmp_path, kind):
    pipeline, tensors = originals(kind)
    pipeline.save_pretrained(tmp_path / "folder")
    file = save(tensors)
    theirs = type(pipeline).from_single_file(str(file), config=str(tmp_path / "folder"), local_files_only=True)
    assert_same(load(file), theirs)


@pytest.mark.parametrize(
    ("start", "new"),
    [
        (FIRST, "cond_stage_model.transformer."),
        (FIRST, "cond_stage_model."),
        (FIRST, "cond_stage_model.clip_l.transformer.text_model."),
        (FIRST, "text_encoders.clip_l.transformer.text_model."),
        (FIRST, "conditioner.embedders.0.transformer.text_model."),
        (FIRST, "te1.text_model."),
        (FIRST, "text_encoder."),
        ("first_stage_model.", "vae."),
        ("model.diffusion_model.", ""),
    ],
)
def test_it_does_not_matter_how_a_program_calls_the_parts(originals, save, start, new):
    _, tensors = originals("sd1")
    usual, other = (find_parts(save(named), FAMILIES["sd1"]) for named in (tensors, replaced(tensors, start, new)))
    assert len(usual) == 3
    for name, part in usual.items():
        stored = {ours: tensors[file_name] for file_name, ours in names_in(part)}
        renamed = {ours: replaced(tensors, start, new)[file_name] for file_name, ours in names_in(other[name])}
        assert stored.keys() == renamed.keys()
        assert all(stored[ours] is renamed[ours] for ours in stored)


def names_in(part):
    return [(name, part.rename(name)) for name in part.shapes]


def test_all_the_uncommon_names_at_once_load(originals, save):
    pipeline, tensors = originals("sd1")
    for start, new in ((FIRST, "te1."), ("first_stage_model.", "vae."), ("model.diffusion_model.", "")):
        tensors = replaced(tensors, start, new)
    assert_same(load(save(tensors)), pipeline)


def test_sdxl_s_second_text_encoder_may_have_transformers_names_and_both_any_prefix(originals, save):
    pipeline, tensors = originals("sdxl")
    tensors = {name: value for name, value in tensors.items() if not name.startswith("conditioner.")}
    for prefix, model in (("te2.", pipeline.text_encoder_2), ("te1.text_model.", pipeline.text_encoder)):
        tensors |= {prefix + name.removeprefix("text_model."): t for name, t in model.state_dict().items()}
    assert_same(load(save(tensors)), pipeline)


@pytest.mark.parametrize(
    ("stated", "side"),
    [
        ("1024x1024", 1024),
        ("64x64", 64),
        ("768x512", None),
        ("00x00", None),
        ("500x500", None),
        ("x", None),
        ("", None),
    ],
)
def test_metadata_say_the_size_if_it_is_one(stated, side):
    assert stated_size({"modelspec.resolution": stated}) == side


def test_what_a_file_holds_besides_is_left_alone(originals, save):
    pipeline, tensors = originals("sd1")
    besides = {
        f"{FIRST}embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logit_scale": torch.zeros(()),
        "model_ema.decay": torch.zeros(()),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(2),
        "alphas_cumprod": torch.zeros(1000),
        "control_model.input_hint_block.0.weight": torch.zeros(2, 3, 3, 3),
    }
    assert_same(load(save(tensors | besides)), pipeline)


def test_layers_are_1x1_convolutions_or_linear(originals, save):
    pipeline, tensors = originals("sd2")
    convolutional = {
        name: value[:, :, None, None] if name.endswith(("proj_in.weight", "proj_out.weight")) and value.dim() == 2
        and name != "model.diffusion_model.input_blocks.1.1.proj_in.weight" else value
        for name, value in tensors.items()
    }  # fmt: skip
    assert_same(load(save(convolutional)), pipeline)


def test_weights_are_cast_one_at_a_time_to_the_dtype_asked_for(originals, save):
    pipeline, tensors = originals("sd1")
    file = save({name: value.half() for name, value in tensors.items()})
    loaded = load_base(str(file), device="cpu", precision="bf16")
    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.unet.conv_in.weight, pipeline.unet.conv_in.weight.half().bfloat16())


# ---- the published models, by their shapes ----

UNETS = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {
        "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
ENCODERS = {
    "sd1": [{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}],
    "sd2": [{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
             "hidden_act": "gelu"}],
    "sdxl": [
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
         "hidden_act": "gelu", "projection_dim": 1280},
    ],
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_configs_are_those_of_the_published_models(ldm, monkeypatch, kind):
    """Published numbers of each model's own config.json, on the meta device: names and shapes only."""
    family = FAMILIES[kind]
    with torch.device("meta"):
        unet, vae = diffusers.UNet2DConditionModel(**UNETS[kind]), diffusers.AutoencoderKL(**VAE)
        more = {"num_hidden_layers": 24} if kind == "sd2" else {}  # of which the last is not used
        models = [CLIPTextModel(CLIPTextConfig(vocab_size=49408, **settings | more)) for settings in ENCODERS[kind]]
    parts = SimpleNamespace(unet=unet, vae=vae, text_encoder=models[0], text_encoder_2=None)
    shapes = {name: value.shape for name, value in ldm.checkpoint_tensors(parts).items()}
    if kind != "sd1":
        openclip = ldm.openclip_tensors(models[-1].state_dict())
        width = ENCODERS[kind][-1]["hidden_size"]
        openclip["text_projection"] = torch.empty(width, width, device="meta")
        prefix = "cond_stage_model.model." if kind == "sd2" else "conditioner.embedders.1.model."
        if kind == "sd2":
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith(FIRST)}
        shapes |= {prefix + name: value.shape for name, value in openclip.items()}
    if kind == "sdxl":  # whose UNet is told apart by the helper for a base with two encoders only
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("model.diffusion_model.")}
        shapes |= {
            f"model.diffusion_model.{ldm.unet_name(name, True)}": t.shape for name, t in unet.state_dict().items()
        }
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    assert [name for name in FAMILIES if denoiser_prefix(FAMILIES[name], shapes) is not None] == [kind]
    header = SimpleNamespace(tensors={name: SimpleNamespace(shape=shape) for name, shape in shapes.items()})
    monkeypatch.setattr("hypernet.base_models.stable_diffusion_file.read_header", lambda path: header)
    parts = find_parts(None, family)
    assert set(parts) == {component.name for component in family.components} | {"vae"}
    config = unet_config(family, parts["unet"], 1280)
    assert {key: config.get(key) for key in UNETS[kind]} == UNETS[kind]
    with torch.device("meta"):
        rebuilt = {
            name: model.from_config(made).state_dict()
            for name, model, made in (
                ("unet", diffusers.UNet2DConditionModel, config),
                ("vae", diffusers.AutoencoderKL, vae_config(family, parts["vae"])),
            )
        }
    for name, model in (("unet", unet), ("vae", vae)):
        expected = {key: value.shape for key, value in model.state_dict().items()}
        assert {key: value.shape for key, value in rebuilt[name].items()} == expected
    default = CLIPTextConfig()
    for component, settings in zip(family.text_encoders, ENCODERS[kind], strict=True):
        config = text_encoder_config(component, parts[component.name])
        assert {key: config[key] for key in settings} == settings
        assert config["hidden_act"] == settings.get("hidden_act", default.hidden_act)


@pytest.mark.parametrize(
    ("kind", "prediction_type", "size_px"),
    [("sd1", "epsilon", 512), ("sd2", "epsilon", 512), ("sd2", "v_prediction", 768), ("sdxl", "epsilon", 1024)],
)
def test_pictures_are_as_large_as_the_published_model_s_where_a_file_does_not_say(kind, prediction_type, size_px):
    assert FAMILIES[kind].version(prediction_type).size_px == size_px


# ---- what a file lacks ----


@pytest.mark.parametrize(
    ("starts", "what", "folders"),
    [
        (("first_stage_model.",), "VAE", "vae/"),
        (("cond_stage_model.",), "text encoder", "text_encoder/"),
        (("first_stage_model.", "cond_stage_model."), "text encoder and no VAE", "text_encoder/, vae/"),
    ],
)
def test_what_a_file_lacks_is_said_and_taken_from_a_folder(originals, save, tmp_path, starts, what, folders):
    pipeline, tensors = originals("sd1")
    file = save({name: value for name, value in tensors.items() if not name.startswith(starts)})
    refused(file, f"has no {what}; pass --components with a diffusers folder of Stable Diffusion 1 that has {folders}")
    pipeline.save_pretrained(tmp_path / "folder")
    assert_same(load(file, components=tmp_path / "folder"), pipeline)


def test_a_folder_without_what_the_file_lacks_or_of_another_family_is_refused(originals, save, tmp_path):

    _, tensors = originals("sd1")
    file = save({name: value for name, value in tensors.items() if not name.startswith("first_stage_model.")})
    originals("sdxl")[0].save_pretrained(tmp_path / "xl")
    refused(file, "xl holds a Stable Diffusion XL, and .* is of Stable Diffusion 1", components=tmp_path / "xl")
    originals("sd1")[0].save_pretrained(tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "vae")
    with pytest.raises(ValueError, match="has no vae/ folder"):
        load(file, components=tmp_path / "one")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load(file, components=tmp_path / "nowhere")


def test_a_whole_model_takes_no_components(originals, save, tmp_path):
    refused(save(originals("sd1")[1]), "is a whole model; leave --components out", components=tmp_path)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.diffusion_model.output_blocks.3.1.norm.weight", "UNet"),
        ("model.diffusion_model.out.2.weight", "conv_out.weight"),
        ("first_stage_model.decoder.norm_out.bias", "VAE"),
        (f"{FIRST}encoder.layers.1.mlp.fc2.bias", "text encoder"),
        (f"{FIRST}embeddings.position_embedding.weight", "position_embedding"),
    ],
)
def test_a_missing_weight_is_named(originals, save, name, part):
    tensors = {key: value for key, value in originals("sd1")[1].items() if key != name}
    refused(save(tensors), rf"cannot be loaded as a Stable Diffusion: it lacks .*{part}")


def test_layers_that_no_such_unet_has_are_refused(originals, save):
    more = {"model.diffusion_model.input_blocks.1.1.adapter.weight": torch.zeros(2)}
    refused(save(originals("sd1")[1] | more), "has 1 tensors that no such model has, such as .*adapter.weight")


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        (f"{FIRST}embeddings.token_embedding.weight", (8,), r"has shape \(8,\) where 2 dimensions are expected"),
        (f"{FIRST}encoder.layers.0.mlp.fc1.weight", (), r"has shape \(\) where 2 dimensions are expected"),
        ("model.diffusion_model.input_blocks.0.0.weight", (8,), r"has shape \(8,\) where 4 dimensions are expected"),
        ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (8,), "2 dimensions"),
        ("first_stage_model.encoder.down.0.block.0.conv1.weight", (8, 8), "4 dimensions"),
    ],
)
def test_another_number_of_dimensions_is_one_sentence(originals, save, name, shape, text):
    refused(save(originals("sd1")[1] | {name: torch.zeros(shape)}), text)


def test_names_without_end_do_not_hang(originals, save):
    """Each would take minutes if it were looked into from every dot or number on."""
    start = "model.diffusion_model."
    names = [f"{start}input_blocks{'.1' * 200_000}", f"first_stage_model{'.mid.attn_1' * 100_000}.q.weight"]
    names += [f"{FIRST}encoder.layers.{number}.x" for number in range(20_000)]
    begun = time.process_time()
    refused(save(originals("sd1")[1] | {name: torch.zeros(()) for name in names}), "cannot be loaded as a Stable")
    assert time.process_time() - begun < 20


def test_another_shape_is_refused(originals, save):
    changed = {"model.diffusion_model.out.2.bias": torch.zeros(7)}
    refused(save(originals("sd1")[1] | changed), r"its conv_out.bias has shape \(7,\) where \(4,\) is expected")


def test_another_tokenizer_is_refused(originals, save):
    name = f"{FIRST}embeddings.token_embedding.weight"
    changed = {name: originals("sd1")[1][name][:1000].contiguous()}
    refused(save(originals("sd1")[1] | changed), "reads 77 of 1000 tokens, and CLIP's tokenizer gives 77 of 49408")


# ---- what it predicts ----


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon", "ss_base_model_version": "sd_v2_v"}, "epsilon"),
        ({"ss_base_model_version": "sd_v2_v"}, "v_prediction"),
        ({"ss_base_model_version": "sd_v2"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
    ],
)
def test_metadata_say_what_a_file_predicts(metadata, expected):
    assert stated_prediction({}, metadata, FAMILIES["sd2"]).type == expected


def test_metadata_that_leave_it_open_say_nothing():
    for family, architecture in (("sd1", "stable-diffusion-v1"), ("sdxl", "stable-diffusion-xl-v1-base"), ("sd2", "")):
        assert stated_prediction({}, {"modelspec.architecture": architecture}, FAMILIES[family]) is None


def test_a_tensor_says_what_a_file_predicts_unless_somebody_else_does(originals, save):
    file = save(originals("sd2")[1] | {"v_pred": torch.zeros(())})
    for asked, expected, reason in (("auto", "v_prediction", "its tensor v_pred says so"),
                                    ("epsilon", "epsilon", "as asked for")):  # fmt: skip
        base = load(file, prediction=asked)
        assert base.prediction_type == base.scheduler.config.prediction_type == expected
        assert base.prediction_reason == reason


def test_a_file_that_says_nothing_is_asked_and_is_of_the_published_size(originals, save):
    base = load(save(originals("sd2")[1], {}))
    assert re.fullmatch(r"measured, for nothing .* does not return it, correlation -?0\.0\d", base.prediction_reason)
    assert (base.prediction_type, base.family, base.size_px) == (
        "v_prediction",
        "sd1",
        512,
    )  # narrow ones are SD1 to all


def test_an_sdxl_that_says_nothing_is_asked_at_its_size(originals, save):
    base = load(save(originals("sdxl")[1], {}))
    assert base.prediction_reason.startswith("measured")
    assert base.size_px == 1024
    assert base.time_ids.tolist() == [1024, 1024, 0, 0, 1024, 1024]


def test_a_unet_that_returns_the_noise_predicts_noise(originals, save):
    """One with nothing but a way through: its first and last layers, and a skip from the one to the other."""
    tensors = dict(originals("sd1")[1])
    start = "model.diffusion_model."
    for name in tensors:
        if name.startswith(start) and not name.endswith(
            ("norm.weight", "norm1.weight", "norm2.weight", "norm3.weight")
        ):
            tensors[name] = torch.zeros_like(tensors[name])
    way = torch.zeros(32, 4, 3, 3)
    way[:4, :, 1, 1] = torch.eye(4)
    tensors[f"{start}input_blocks.0.0.weight"] = way
    skip = torch.zeros_like(tensors[f"{start}output_blocks.11.0.skip_connection.weight"])
    skip[:, -32:, 0, 0] = torch.eye(32)  # the outermost skip is the last of what is concatenated
    tensors[f"{start}output_blocks.11.0.skip_connection.weight"] = skip
    tensors[f"{start}out.0.weight"] = torch.ones(32)
    out = torch.zeros(4, 32, 3, 3)
    out[:, :4, 1, 1] = torch.eye(4)
    tensors[f"{start}out.2.weight"] = out
    base = load(save(tensors, {"modelspec.resolution": "64x64"}))
    assert base.prediction_type == "epsilon"
    assert base.prediction_reason.startswith("measured, for nothing says it: asked of noise alone it returns it")


def test_a_model_of_zero_terminal_snr_says_so(originals, save):
    more = {"v_pred": torch.zeros(()), "ztsnr": torch.zeros(())}
    base = load(save(originals("sdxl")[1] | more))
    assert base.alphas_cumprod[-1] < 1e-6
    assert base.prediction_type == "v_prediction"


def test_a_folder_s_scheduler_says_it_unless_somebody_else_does(base):
    assert base.prediction_reason == "its scheduler says so"
    other = load(base.name, prediction="epsilon")
    assert (base.prediction_type, other.prediction_type) == ("v_prediction", "epsilon")
    assert other.prediction_reason == "as asked for"
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([500])
    assert torch.equal(other.target(latents, noise, times), noise)
    assert not torch.equal(base.target(latents, noise, times), noise)
    assert other.pipeline().scheduler.config.prediction_type == "epsilon"


def test_the_measurement_of_the_miniature_agrees_with_its_scheduler(base):
    """It is trained, to predict v; and v with the noise taken out of it again is a prediction of noise."""
    assert abs(base.noise_returned()) < 0.3
    denoise = base.denoise

    def denoise_noise(noisy, times, embeds):
        alpha = base.alphas_cumprod[times].view(-1, 1, 1, 1)
        return alpha.sqrt() * denoise(noisy, times, embeds) + (1 - alpha).sqrt() * noisy

    assert type(base).noise_returned(SimpleNamespace(
        unet=base.unet, device=base.device, scheduler=base.scheduler, denoise=denoise_noise,
        encode_prompts=base.encode_prompts, prepare_prompts=base.prepare_prompts,
    )) > 0.9  # fmt: skip


def test_a_family_that_leaves_no_doubt_takes_no_prediction(flux_folder):
    with pytest.raises(ValueError, match=r"--prediction is for Stable Diffusion 1 and .* is FLUX.1; leave it out"):
        load(flux_folder, prediction="v")
    assert load(flux_folder).prediction_reason == ""


def test_an_unknown_prediction_is_refused(base):
    with pytest.raises(ValueError, match="prediction is 'x'; choose auto, epsilon, v"):
        load(base.name, prediction="x")
