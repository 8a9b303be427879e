import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hypernet.base_models.loading import load_base
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


def test_flow_matching_is_refused(folder):
    edit_json(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    refused(folder, "FlowMatchEulerDiscreteScheduler, which adds noise otherwise")


@pytest.mark.parametrize("part", ["unet", "tokenizer", "scheduler"])
@pytest.mark.parametrize("value", [None, "CLIPTextModel", ["diffusers"], [None, None], [1, {}]])
def test_an_index_that_does_not_say_what_a_part_is_is_named(folder, part, value):
    edit_json(folder / "model_index.json", **{part: value})
    refused(folder, f"does not say which class its {part} is of", culprit="model_index.json")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"block_out_channels": "wide"}),
        ("unet/config.json", {"down_block_types": ["NoBlock2D"] * 4}),
        ("text_encoder/config.json", {"hidden_size": None}),
        ("text_encoder/config.json", {"num_attention_heads": 0}),
        ("vae/config.json", {"norm_num_groups": 7}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "none"}),
        ("tokenizer/tokenizer.json", {"model": 3}),
        ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}),
        ("model_index.json", {"scheduler": ["diffusers", "UNet2DConditionModel"]}),
    ],
)
def test_whatever_a_library_finds_wrong_is_one_sentence(folder, file, changes):
    edit_json(folder / file, **changes)
    refused(folder, "cannot be loaded as a Stable Diffusion: .{3}")


def test_another_prediction_is_refused(folder):
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type="sample")
    refused(folder, "predicts 'sample'")


# ---- the hub ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function: (id, folder) -> the snapshot of a repository in a hub's cache, as a download leaves it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name, folder, revision="main", commit=40 * "a"):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        return shutil.copytree(folder, repository / "snapshots" / commit)

    return put


@pytest.fixture
def hub(cache, monkeypatch):
    """A function: (id, folder) -> the list of the files that are downloaded from there, as they are."""
    import huggingface_hub

    def serve(name, folder, files=None):
        downloaded = []
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]

        def download(repo_id, revision=None, allow_patterns=None):
            assert repo_id == name
            downloaded.extend(pattern for pattern in allow_patterns if pattern in names)
            target = folder.with_name(40 * "b")
            for pattern in allow_patterns:
                if pattern in names:
                    (target / pattern).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(folder / pattern, target / pattern)
            return str(target)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files or names])
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo_id, revision: listed)
        return downloaded

    return serve


def test_an_id_that_cannot_be_had_says_the_three_ways_on(cache):
    refused("nobody/nothing", "unset it to download.*diffusers folder.*--base testbed", FileNotFoundError)


def test_a_base_in_the_hub_s_cache_loads_without_the_hub(cache, base):
    cache("some/model", miniature_path())
    loaded = load_base("some/model", device="cpu", precision="fp32")
    assert loaded.name == "some/model"
    assert torch.equal(loaded.unet.conv_in.weight, base.unet.conv_in.weight)


def test_a_revision_is_the_one_that_is_asked_for(cache, folder):
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type="epsilon")
    cache("some/model", miniature_path())
    cache("some/model", folder, "old", 40 * "c")
    for source, expected in (("some/model", "v_prediction"), ("some/model@old", "epsilon"),
                             (f"some/model@{40 * 'c'}", "epsilon")):  # fmt: skip
        assert load_base(source, device="cpu", precision="fp32").prediction_type == expected
    refused("some/model@new", "could not be downloaded from the Hugging Face hub", FileNotFoundError)


def test_a_base_that_is_in_the_cache_in_part_asks_for_the_hub(cache, folder):
    shutil.rmtree(folder / "vae")
    cache("some/model", folder)
    refused("some/model", r"unset it.* \(the copy in the cache is not whole: .* has no vae/ folder", FileNotFoundError)


def test_what_is_downloaded_is_what_is_needed(hub, folder):
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"8 GB")
    (folder / "unet/diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"8 GB")
    shutil.copy(folder / UNET, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    downloaded = hub("some/model", folder)
    load_base("some/model", device="cpu")
    assert sorted(set(downloaded)) == sorted(
        ["model_index.json", UNET, VAE, CLIP, "scheduler/scheduler_config.json"]
        + [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]
        + [f"tokenizer/{name}" for name in ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")]
    )


@pytest.mark.parametrize("parts", [(UNET,), (UNET, CLIP, VAE)])
def test_a_base_of_which_there_is_fp16_only_loads(hub, folder, base, parts):
    for name in parts:
        (folder / name).rename((folder / name).with_suffix(".fp16.safetensors"))
    hub("some/model", folder)
    loaded = load_base("some/model", device="cpu", precision="fp32")
    for part in (*base.adapted, "vae"):
        expected = getattr(base, part).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in getattr(loaded, part).state_dict().items())


def test_pickles_are_not_downloaded(hub, folder):
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")
    downloaded = hub("some/model", folder)
    refused(
        "some/model",
        "some/model/unet has no weights in safetensors .diffusion_pytorch_model.bin is a pickle.*pass a repository",
    )
    assert downloaded == ["model_index.json"]


@pytest.mark.parametrize("leads_to", ["pytorch_model.bin", "../../../secret.safetensors", "/etc/x.safetensors"])
def test_an_index_on_the_hub_leads_to_no_pickle_and_nowhere_else(hub, cache, folder, leads_to):
    (folder / "text_encoder/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": leads_to}}))
    hub("some/model", folder)
    with pytest.raises(ValueError, match="which is no safetensors file beside it and is not read"):
        load_base("some/model", device="cpu")


def test_a_repository_that_is_not_in_diffusers_layout_says_what_it_has(hub, tmp_path):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "model.safetensors").write_bytes(b"x")
    hub("some/model", tmp_path / "repository")
    refused("some/model", "has no model_index.json; download model.safetensors from it and pass the file")


@pytest.mark.parametrize("source", ["/no/such/folder", "a b", "~/models/sd15"])
def test_a_path_that_is_not_there_asks_no_hub(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    refused(source, "is not a local folder or file", FileNotFoundError)


@pytest.mark.parametrize("source", ["v1-5.safetensors", "models/v1-5.ckpt"])
def test_a_checkpoint_that_is_not_there_asks_no_hub(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    refused(source, "does not exist", FileNotFoundError)


def test_a_full_disk_during_the_download_is_said(monkeypatch):
    def full(name, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    refused("some/model", "No space left on device", FileNotFoundError)


def test_another_kind_of_pipeline_is_not_downloaded(hub, folder):
    edit_json(folder / "model_index.json", _class_name="StableDiffusion3Pipeline")
    downloaded = hub("some/sd3", folder)
    refused("some/sd3", "holds a StableDiffusion3Pipeline")
    assert downloaded == ["model_index.json"]


def test_an_option_that_the_family_does_not_have_is_refused_before_the_download(hub, folder):
    downloaded = hub("some/model", folder)
    with pytest.raises(ValueError, match=r"--quantize is for FLUX.1, and some/model is"):
        load_base("some/model", device="cpu", quantize="nf4")
    assert downloaded == ["model_index.json"]


def test_an_sdxl_model_from_the_hub_loads_as_one(cache, sdxl_folder):
    cache("some/xl", sdxl_folder)
    assert load_base("some/xl", device="cpu").family == "sdxl"


# ---- single files ----


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_a_pickled_checkpoint_is_never_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    refused(tmp_path / name, "are pickles, which can run code, and are never read")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265146304\n",
            "a Git LFS pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
        (b"\xff\xd8\xff\xe0" + bytes(200), "is a picture .JPEG."),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_what_is_no_model_at_all_is_named(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, text)


def test_a_pickle_under_another_name_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 4)
    refused(tmp_path / "model.safetensors", "pickled file")


SD1 = {"input_blocks.0.0.weight": (32, 4, 3, 3), "input_blocks.1.1.proj_in.weight": (32, 32, 1, 1),
       "input_blocks.11.0.in_layers.2.weight": (32, 32, 3, 3)}  # fmt: skip
XL = {"input_blocks.0.0.weight": (32, 4, 3, 3), "input_blocks.4.1.proj_in.weight": (32, 32),
      "label_emb.0.0.weight": (32, 8)}  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (1, 2)}, "is a LoRA, not a base model"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (1, 2)}, "is a LoRA, not a base model"),
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (1, 2)}, "is a LoRA, not a base model"),
        (XL | {"input_blocks.11.0.in_layers.2.weight": (1, 1, 1, 1)}, "is an SDXL refiner"),
        (SD1 | {"input_blocks.1.1.proj_in.weight": (1, 1), "label_emb.0.0.weight": (1, 1)}, "is an unCLIP model"),
        (SD1 | {"input_blocks.0.0.weight": (1, 9, 3, 3)}, "9 input channels .an inpainting"),
        (SD1 | {"input_blocks.1.1.time_stack.0.norm1.weight": (1,)}, "a video model .Stable Video"),
        (XL | {"edm_mean": (4,)}, "a model of EDM's noise"),
        (XL, "has no first text encoder and no second text encoder and no VAE; pass --components"),
        (SD1, "has no text encoder and no VAE; pass --components"),
        ({"joint_blocks.0.x_block.attn.qkv.weight": (1, 1)}, "seems to be Stable Diffusion 3"),
        ({"transformer_blocks.0.attn1.to_q.weight": (1, 1), "adaln_single.linear.weight": (1, 1)}, "be PixArt"),
        ({"control_model.input_blocks.0.0.weight": (1, 4, 1, 1)}, "be a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (1,), "down_blocks.0.attentions.0.norm.weight": (1,)},
         "be a ControlNet"),
        ({"down_blocks.0.attentions.0.norm.weight": (1,)}, "be a UNet in diffusers' layout"),
        ({"encoder.down.0.block.0.conv1.weight": (1,), "decoder.up.0.block.0.conv1.weight": (1,)}, "be a VAE"),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": (1,)}, "be a VAE"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": (1,)}, "be a CLIP text encoder"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (1,)}, "be a T5 text encoder"),
        ({"emb_params": (2, 768)}, "an embedding .textual inversion"),
        ({"clip_l": (4, 768), "clip_g": (4, 1280)}, "an embedding .textual inversion"),
        ({"ip_adapter.1.to_k_ip.weight": (1, 1)}, "is an IP-Adapter"),
        ({"down_blocks.0.motion_modules.0.norm.weight": (1,)}, "is a motion module of AnimateDiff"),
        ({"body.0.in_conv.weight": (1,)}, "be a T2I-Adapter"),
        ({"input_blocks.0.0.weight": (1, 4, 1, 1)}, "a UNet of another build"),
        ({"conv_in.weight": (1,), "conv_out.bias": (1,)}, "not a Stable Diffusion checkpoint: it holds conv_in.weight"),
        ({}, "it holds no tensors"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_refused(save, tensors, text):
    refused(save(tensors), text)


def test_a_truncated_checkpoint_is_refused(save):
    file = save({CHECKPOINT_HEAD: (32, 4, 3, 3)})
    file.write_bytes(file.read_bytes()[:-100])
    refused(file, "truncated")


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
    with pytest.raises(ValueError, match=r"--compile is not available on cpu.*drop --compile") as caught:
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
