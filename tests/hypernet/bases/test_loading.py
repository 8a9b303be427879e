import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

import hypernet.bases.loading as base_loading
from hypernet.bases.loading import load_base
from testbed import miniature_path

UNET = "unet/diffusion_pytorch_model.safetensors"
CLIP = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
CHECKPOINT_HEAD = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of the miniature to break."""
    return shutil.copytree(miniature_path(), tmp_path / "model")


@pytest.fixture
def save(tmp_path):
    def write(tensors, name="model.safetensors"):
        save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / name)
        return tmp_path / name

    return write


def refused(source, text, kind=ValueError, culprit=None):
    """Loading fails with one sentence that names the culprit: the source, or a file in it."""
    with pytest.raises(kind, match=text) as caught:
        load_base(str(source), device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert str(source if culprit is None else source / culprit) in message


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- what loads ----


def test_a_folder_loads_frozen(base):
    assert base.family == "sd1"
    assert base.prediction_type in ("epsilon", "v_prediction")
    assert base.size_px == 32
    assert base.device.type == "cpu"
    assert base.dtype == torch.float32
    assert base.alphas_cumprod.shape == (1000,)
    for model in (base.unet, base.text_encoder, base.vae):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    stored = load_file(miniature_path() / UNET)["conv_in.weight"]
    assert torch.equal(base.unet.conv_in.weight, stored.float())


def test_an_sdxl_folder_loads_frozen(sdxl):
    assert sdxl.family == "sdxl"
    assert sdxl.size_px == 32
    assert list(sdxl.adapted) == ["unet", "text_encoder", "text_encoder_2"]
    for model in sdxl.adapted.values():
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_prompts_become_the_pipelines_tokens(base):
    prompt = "a pencil drawing of a sks face"
    expected = base.tokenizer(prompt, padding="max_length", max_length=base.tokenizer.model_max_length)["input_ids"]
    assert base.prepare_prompts([prompt]).token_ids.tolist() == [[expected]]
    long = base.prepare_prompts(["a face " * 200]).token_ids
    assert long.shape == (1, 1, base.tokenizer.model_max_length)


def test_the_precision_is_the_bases(folder):
    assert load_base(str(folder), device="cpu", precision="bf16").unet.dtype == torch.bfloat16


def test_weights_of_the_fp16_variant_load(folder, base):
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    loaded = load_base(str(folder), device="cpu")
    assert torch.equal(loaded.unet.conv_in.weight, base.unet.conv_in.weight)


def test_a_tokenizer_of_two_classic_files_is_the_same_tokenizer(folder, base):
    (folder / "tokenizer/tokenizer.json").unlink()
    prompt = "a watercolour painting of a sks face wearing a crown"
    expected = base.prepare_prompts([prompt]).token_ids
    assert torch.equal(load_base(str(folder), device="cpu").prepare_prompts([prompt]).token_ids, expected)


def test_text_encoder_weights_load_with_and_without_the_text_model_level(folder, base):
    for prefix in ("", "text_model."):
        tensors = {prefix + name.removeprefix("text_model."): value for name, value in load_file(folder / CLIP).items()}
        save_file(tensors, folder / CLIP, metadata={"format": "pt"})
        loaded = load_base(str(folder), device="cpu").text_encoder.state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in base.text_encoder.state_dict().items())


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_a_single_file_checkpoint_loads(request, tmp_path, monkeypatch, import_helper, kind):
    base = request.getfixturevalue("base" if kind is StableDiffusionPipeline else "sdxl")
    file = tmp_path / "checkpoint.safetensors"
    import_helper("ldm_checkpoint").write_checkpoint(base, file)
    # Offline, the configuration comes from the folder instead of the hub.
    monkeypatch.setattr(kind, "from_single_file", partial(kind.from_single_file, config=base.name))
    loaded = load_base(str(file), device="cpu", precision="fp32")
    assert loaded.family == base.family
    for part in (*base.adapted, "vae"):
        expected = getattr(base, part).state_dict()
        found = getattr(loaded, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), part
    ours, theirs = (model.prepare_prompts(["a sks face"]).token_ids for model in (loaded, base))
    assert torch.equal(ours, theirs)


# ---- folders that are no Stable Diffusion ----


def test_a_folder_without_an_index_is_refused(tmp_path):
    refused(tmp_path, "not a Stable Diffusion in diffusers' layout.*pass the folder that holds unet/")


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusion3Pipeline",
        "FluxFillPipeline",
        "FluxKontextPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
        None,
    ],
)
def test_another_kind_of_pipeline_is_refused(folder, name):
    edit_json(folder / "model_index.json", _class_name=name)
    refused(folder, f"holds a {name}; expected a StableDiffusionPipeline or StableDiffusionXLPipeline or Flux")


def test_an_sdxl_refiner_is_refused(folder):
    nothing = [None, None]
    edit_json(folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline",
              requires_aesthetics_score=True, text_encoder=nothing, tokenizer=nothing)  # fmt: skip
    shutil.rmtree(folder / "text_encoder")
    refused(folder, "is an SDXL refiner.*pass an SDXL base")


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_missing_part_of_sdxl_is_named(folder, part):
    edit_json(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    for name in {"text_encoder_2", "tokenizer_2"} - {part}:
        (folder / name).mkdir()
    refused(folder, f"has no {part}/ folder")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    refused(folder, f"has no {part}/ folder")


@pytest.mark.parametrize("name", ["unet/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_config_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, f"has no {name}")


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "vae/config.json", "tokenizer/vocab.json"])
@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe\x00", b"", b"[" * 100_000])
def test_a_broken_config_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    refused(folder, "is not valid JSON|is not a JSON object", culprit=name)


@pytest.mark.parametrize("name", [UNET, CLIP, VAE])
@pytest.mark.parametrize("damage", ["half", "empty", "text"])
def test_a_damaged_weights_file_is_named(folder, name, damage):
    whole = (folder / name).read_bytes()
    content = {"half": whole[: len(whole) // 2], "empty": b"", "text": b"<html>404</html>" * 9}[damage]
    (folder / name).write_bytes(content)
    refused(folder, "truncated|too few|not a safetensors file|is empty", culprit=name)


@pytest.mark.parametrize("name", [UNET, CLIP, VAE])
def test_missing_weights_are_named(folder, name):
    (folder / name).unlink()
    refused(folder, "has no weights in safetensors", culprit=name.partition("/")[0])


def test_pickled_weights_are_never_read(folder):
    (folder / UNET).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    refused(folder, r"diffusion_pytorch_model.bin is a pickle, which can run code", culprit="unet")


def test_an_empty_tokenizer_is_refused(folder):
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    refused(folder, "neither tokenizer.json nor vocab.json and merges.txt", culprit="tokenizer")


@pytest.mark.parametrize("name", [UNET, VAE, CLIP])
def test_weights_that_lack_a_tensor_are_refused(folder, name):
    tensors = load_file(folder / name)
    dropped = sorted(tensors)[3]
    del tensors[dropped]
    save_file(tensors, folder / name, metadata={"format": "pt"})
    refused(folder, f"lacks 1 weights.*{dropped.removeprefix('text_model.')}")


def test_weights_of_another_width_are_refused(folder):
    edit_json(folder / "unet/config.json", block_out_channels=[32, 64, 96, 96])
    refused(folder, "cannot be loaded as a Stable Diffusion")


def test_a_component_of_no_known_class_is_refused(folder):
    edit_json(folder / "model_index.json", unet=["diffusers", "NoSuchModel"])
    refused(folder, "cannot be loaded as a Stable Diffusion")


def test_an_inpainting_unet_is_refused(folder):
    tensors = load_file(folder / UNET)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9].contiguous()
    save_file(tensors, folder / UNET, metadata={"format": "pt"})
    edit_json(folder / "unet/config.json", in_channels=9)
    refused(folder, "9 input channels")


def test_text_encoders_that_are_not_the_unets_are_refused(folder):
    edit_json(folder / "unet/config.json", cross_attention_dim=80)
    tensors = load_file(folder / UNET)
    for name in [name for name in tensors if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]:
        tensors[name] = torch.zeros(len(tensors[name]), 80)
    save_file(tensors, folder / UNET, metadata={"format": "pt"})
    refused(folder, "reads prompts of width 80 and text encoders of width 64")


def test_a_scheduler_of_another_kind_of_diffusion_is_refused(folder):
    edit_json(folder / "model_index.json", scheduler=["diffusers", "EDMDPMSolverMultistepScheduler"])
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "EDMDPMSolverMultistepScheduler"}')
    refused(folder, "EDMDPMSolverMultistepScheduler, which adds noise otherwise")


def test_another_prediction_is_refused(folder):
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type="sample")
    refused(folder, "predicts 'sample'")


# ---- the hub ----


def test_an_id_that_cannot_be_had_says_the_three_ways_on(monkeypatch):
    def offline(source):
        raise OSError("Cannot load model nobody/nothing: not cached locally.\nSee the documentation.")

    monkeypatch.setattr(DiffusionPipeline, "load_config", offline)
    refused("nobody/nothing", "connect to the internet.*diffusers folder.*--base testbed", FileNotFoundError)


@pytest.mark.parametrize("source", ["/no/such/folder", "a b", "~/models/sd15"])
def test_a_path_that_is_not_there_asks_no_hub(source, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "load_config", None)
    refused(source, "is not a folder or file here", FileNotFoundError)


@pytest.mark.parametrize("source", ["v1-5.safetensors", "models/v1-5.ckpt"])
def test_a_checkpoint_that_is_not_there_asks_no_hub(source, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "load_config", None)
    refused(source, "does not exist", FileNotFoundError)


def test_a_full_disk_during_the_download_is_said(monkeypatch):
    def full(source, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda source: {"_class_name": "StableDiffusionPipeline"})
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", full)
    refused("some/model", "No space left on device", FileNotFoundError)


def test_another_kind_of_pipeline_is_not_downloaded(monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda source: {"_class_name": "StableDiffusion3Pipeline"})
    monkeypatch.setattr(base_loading, "_load_pretrained", None)
    refused("some/sd3", "holds a StableDiffusion3Pipeline")


def test_an_sdxl_model_from_the_hub_loads_as_one(sdxl_folder, monkeypatch):
    index = json.loads((sdxl_folder / "model_index.json").read_text())
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda source: index)
    from_folder = partial(StableDiffusionXLPipeline.from_pretrained, str(sdxl_folder))
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", lambda source, **given: from_folder(**given))
    assert load_base("some/xl", device="cpu").family == "sdxl"


# ---- single files ----


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_a_pickled_checkpoint_is_never_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    refused(tmp_path / name, "are pickles, which can run code, and are never read")


def test_a_pickle_under_another_name_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 4)
    refused(tmp_path / "model.safetensors", "pickled file")


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (1, 2)}, "is a LoRA, not a base model"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (1, 2)}, "is a LoRA, not a base model"),
        ({"conditioner.embedders.0.model.ln_final.weight": (1,), CHECKPOINT_HEAD: (1, 4, 1, 1)}, "is an SDXL refiner"),
        (
            {CHECKPOINT_HEAD: (1, 4, 1, 1), "first_stage_model.x": (1,), "conditioner.embedders.0.transformer.x": (1,)},
            "has no second text encoder",
        ),
        ({CHECKPOINT_HEAD: (1, 4, 1, 1), "conditioner.embedders.1.model.x": (1,), "v_pred": ()}, "predicts v"),
        ({"conv_in.weight": (1,), "conv_out.bias": (1,)}, "not a Stable Diffusion checkpoint: it holds conv_in.weight"),
        ({}, "it holds no tensors"),
        ({CHECKPOINT_HEAD: (1, 4, 1, 1), "cond_stage_model.x": (1,)}, "has no VAE"),
        ({CHECKPOINT_HEAD: (1, 4, 1, 1), "first_stage_model.x": (1,)}, "has no text encoder"),
        (
            {CHECKPOINT_HEAD: (1, 9, 1, 1), "first_stage_model.x": (1,), "cond_stage_model.x": (1,)},
            "9 input channels",
        ),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(save, tensors, text):
    refused(save(tensors), text)


def test_a_truncated_checkpoint_is_refused(save):
    file = save({CHECKPOINT_HEAD: (32, 4, 3, 3)})
    file.write_bytes(file.read_bytes()[:-100])
    refused(file, "truncated")


def test_a_checkpoint_without_hub_says_what_is_missing(save, monkeypatch):
    def offline(*args, **options):
        raise FileNotFoundError("Cannot find an appropriate cached snapshot folder. Connect.")

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", offline)
    file = save({CHECKPOINT_HEAD: (1, 4, 1, 1), "first_stage_model.x": (1,), "cond_stage_model.x": (1,)})
    refused(file, "tokenizer and configuration.*connect to the internet once", FileNotFoundError)


def test_a_checkpoint_of_odd_shapes_is_refused(base, tmp_path, monkeypatch, import_helper):
    file = tmp_path / "odd.safetensors"
    tensors = import_helper("ldm_checkpoint").checkpoint_tensors(base)
    tensors["model.diffusion_model.out.2.bias"] = torch.zeros(7)
    save_file(tensors, file)
    local = partial(StableDiffusionPipeline.from_single_file, config=str(miniature_path()))
    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", local)
    refused(file, "cannot be loaded as a Stable Diffusion")


# ---- compiling, and little memory ----


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C++ compiler. Please specify one"),
        ImportError("no module named triton"),
        OSError(2),
    ],
)
def test_a_machine_that_cannot_compile_says_so_before_anything_is_loaded(monkeypatch, error):
    def fail(function):
        raise error

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ValueError, match=r"--compile cannot be had on cpu.*leave --compile out") as caught:
        load_base("nobody/nothing", device="cpu", compile=True)
    assert "\n" not in str(caught.value)


def test_photos_that_do_not_fit_beside_the_models_are_encoded_alone(base, monkeypatch):
    """SDXL's VAE and a photo take more than a step of finetuning on cards of 8 to 10 GB."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    expected = base.encode_photos(pixels)
    original, moves = type(base)._encode, []

    def encode(self, pixels, device):
        if not moves:
            raise RuntimeError("CUDA out of memory. Tried to allocate 4.50 GiB")
        return original(self, pixels, device)

    monkeypatch.setattr(type(base), "_encode", encode)
    for model in base.adapted.values():
        moved = type(model).to
        monkeypatch.setattr(
            model, "to", lambda device, moved=moved, model=model: (moves.append(str(device)), moved(model, device))[1]
        )
    assert torch.equal(base.encode_photos(pixels), expected)
    assert moves == ["cpu", "cpu", "cpu", "cpu"]  # both away, both back
