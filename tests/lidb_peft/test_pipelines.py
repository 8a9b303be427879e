"""LiDB adapters on whole pipelines: every way to draw with them against one whose weights hold W + weight * dW."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lidb_peft import LiDBConfig, LiDBSpace, load_adapter, save_adapter, save_theta
from lidb_peft.bases import BasisKey, get_basis

CONFIG = LiDBConfig(r=2, down_dim=12, up_dim=6, scale=0.7, seed=3)
ENCODERS = {False: ["text_encoder"], True: ["text_encoder", "text_encoder_2"]}
WEIGHTS = "adapter_model.safetensors"


def models_of(pipeline, *names):
    names = names or [name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipeline, name)]
    return {name: getattr(pipeline, name) for name in names}


def random_theta(space, seed=0):
    return torch.randn(space.theta_0.shape, generator=torch.Generator().manual_seed(seed)) * space.mask


@torch.no_grad()
def draw(pipeline, **options):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"} | options
    return pipeline("a sks face", generator=generator, **options).images


@torch.no_grad()
def add_dense(pipeline, theta, weight=1.0, only=""):
    """Add weight * dW to the weights of the layers whose names start with ``only``, written out from the paper."""
    space = LiDBSpace(models_of(pipeline), CONFIG)
    r, a, b = CONFIG.r, CONFIG.down_dim, CONFIG.up_dim
    for row, name, layer in zip(theta, space.layer_names, space.layers, strict=True):
        if name.startswith(only):
            down, up = row[: r * a].view(r, a).double(), row[r * a :].view(b, r).double()
            down_aux = get_basis(BasisKey("down", layer.in_features, a, CONFIG.seed), torch.device("cpu")).double()
            up_aux = get_basis(BasisKey("up", layer.out_features, b, CONFIG.seed), torch.device("cpu")).double()
            layer.weight += (weight * CONFIG.scale * up_aux @ up @ down @ down_aux).float()
    return pipeline


@pytest.fixture
def theta_file(new_pipeline, tmp_path):
    """A function: (sdxl, seed, components) -> the path of a theta file for that pipeline, and the theta."""

    def make(sdxl=False, seed=0, components=(), **options):
        space = LiDBSpace(models_of(new_pipeline(sdxl), *components), CONFIG)
        theta, path = random_theta(space, seed), tmp_path / f"{seed}.theta.safetensors"
        save_theta(path, theta, space, dtype=torch.float32, **options)
        return path, theta

    return make


@pytest.fixture
def folder(new_pipeline, theta_file, tmp_path):
    """A saved adapter."""
    pipeline = new_pipeline()
    load_adapter(pipeline, theta_file()[0], "me")
    save_adapter(pipeline, tmp_path / "me", "me")
    return tmp_path / "me"


def same(first, second):
    return torch.allclose(first, second, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("sdxl", [False, True])
def test_a_theta_file_goes_onto_the_unet_and_all_text_encoders(sdxl, new_pipeline, theta_file):
    path, theta = theta_file(sdxl)
    pipeline = new_pipeline(sdxl)
    base = draw(pipeline)
    load_adapter(pipeline, path, "me", weight=0.8)
    assert pipeline.get_list_adapters() == {name: ["me"] for name in ["unet", *ENCODERS[sdxl]]}
    expected = draw(add_dense(new_pipeline(sdxl), theta, 0.8))
    assert same(draw(pipeline), expected)
    assert not same(base, expected)
    parts = [draw(add_dense(new_pipeline(sdxl), theta, 0.8, only=f"{name}.")) for name in ["unet", *ENCODERS[sdxl]]]
    assert not any(same(part, expected) for part in parts)
    assert not any(module._forward_hooks for module in pipeline.unet.modules())


@pytest.mark.parametrize("sdxl", [False, True])
def test_a_folder_brings_an_adapter_back_bit_exactly(sdxl, new_pipeline, theta_file, tmp_path):
    pipeline, other = new_pipeline(sdxl), new_pipeline(sdxl)
    load_adapter(pipeline, theta_file(sdxl)[0], "me")
    save_adapter(pipeline, tmp_path / "me", "me")
    parts = {part.name for part in (tmp_path / "me").iterdir()}
    assert parts == {"unet", *ENCODERS[sdxl]}
    load_adapter(other, tmp_path / "me", "again")
    assert torch.equal(draw(other), draw(pipeline))
    alone = new_pipeline(sdxl)
    for name in parts:  # PEFT by itself reads them too
        setattr(alone, name, PeftModel.from_pretrained(getattr(alone, name), tmp_path / "me" / name))
    assert torch.equal(draw(alone), draw(pipeline))


def test_several_are_active_at_once_and_the_pipeline_weighs_them(new_pipeline, theta_file):
    (first, one), (second, two) = theta_file(seed=0), theta_file(seed=1)
    pipeline = new_pipeline()
    load_adapter(pipeline, first, "one", weight=0.7)
    load_adapter(pipeline, second, "two", weight=0.3)
    assert same(draw(pipeline), draw(add_dense(add_dense(new_pipeline(), one, 0.7), two, 0.3)))
    pipeline.set_adapters(["one", "two"], [0.2, 0.9])
    assert same(draw(pipeline), draw(add_dense(add_dense(new_pipeline(), one, 0.2), two, 0.9)))
    pipeline.set_adapters("two")
    assert same(draw(pipeline), draw(add_dense(new_pipeline(), two)))
    pipeline.delete_adapters("two")
    pipeline.set_adapters("one", 0.5)
    assert same(draw(pipeline), draw(add_dense(new_pipeline(), one, 0.5)))


def test_weights_may_differ_by_component_and_block(new_pipeline, theta_file):
    path, theta = theta_file()
    pipeline, expected = new_pipeline(), new_pipeline()
    load_adapter(pipeline, path, "me")
    weights = {"unet": {"down": 0.3, "mid": 0.5, "up": 0.9}, "text_encoder": 0.6}
    pipeline.set_adapters("me", weights)
    for block, weight in {"down_blocks": 0.3, "mid_block": 0.5, "up_blocks": 0.9}.items():
        add_dense(expected, theta, weight, only=f"unet.{block}")
    add_dense(expected, theta, 0.6, only="text_encoder.")
    assert same(draw(pipeline), draw(expected))


@pytest.mark.parametrize("scale", [0.0, 0.4, 2.0])
def test_cross_attention_kwargs_scale_the_unet_and_the_text_encoders(scale, new_pipeline, theta_file):
    path, theta = theta_file()
    pipeline = new_pipeline()
    load_adapter(pipeline, path, "me", weight=0.5)
    found = draw(pipeline, cross_attention_kwargs={"scale": scale})
    assert same(found, draw(add_dense(new_pipeline(), theta, 0.5 * scale)))


@pytest.mark.parametrize("sdxl", [False, True])
def test_fusing_adds_to_the_weights_and_unfusing_takes_away(sdxl, new_pipeline, theta_file):
    path, theta = theta_file(sdxl)
    pipeline, components = new_pipeline(sdxl), ["unet", *ENCODERS[sdxl]]
    originals = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    load_adapter(pipeline, path, "me")
    pipeline.fuse_lora(components=components, lora_scale=0.5, safe_fusing=True)
    expected = draw(add_dense(new_pipeline(sdxl), theta, 0.5))
    assert pipeline.num_fused_loras == 1
    assert same(draw(pipeline), expected)
    pipeline.disable_lora()  # nothing is left beside the weights
    pipeline.enable_lora()
    pipeline.unfuse_lora(components=components)
    for name, value in pipeline.unet.state_dict().items():
        if "lidb_" not in name:
            assert torch.allclose(value, originals[name.replace(".base_layer", "")], atol=1e-5)
    pipeline.unload_lora_weights()
    assert same(draw(pipeline), draw(new_pipeline(sdxl)))
    assert pipeline.get_list_adapters() == {}


def test_disabling_gives_the_base_and_enabling_the_adapter(new_pipeline, folder):
    pipeline = new_pipeline()
    base = draw(pipeline)
    load_adapter(pipeline, folder, "me")
    adapted = draw(pipeline)
    pipeline.disable_lora()
    assert torch.equal(draw(pipeline), base)
    pipeline.enable_lora()
    assert torch.equal(draw(pipeline), adapted)
    assert not same(base, adapted)


def test_a_lora_and_a_lidb_adapter_add_up(new_pipeline, theta_file, tmp_path):
    path, theta = theta_file()
    pipeline, expected = new_pipeline(), add_dense(new_pipeline(), theta, 0.5)
    without = draw(expected)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_v"])
    for lora in (pipeline, expected):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            lora.unet.add_adapter(config, "style")
    load_adapter(pipeline, path, "me", weight=0.5)
    assert not same(draw(expected), without)
    assert same(draw(pipeline), draw(expected))
    expected.unet.save_lora_adapter(tmp_path, "style")
    late = new_pipeline()
    load_adapter(late, path, "me")
    late.unet.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)  # diffusers counts to find a name
    name = next(name for name in late.unet.peft_config if name != "me")
    late.set_adapters(["me", name], [0.5, 1.0])
    assert same(draw(late), draw(expected))


def test_a_lora_and_a_lidb_adapter_fuse_and_unfuse_on_one_layer(new_pipeline, theta_file):
    path, _ = theta_file(components=["unet"])
    for lora_first in (False, True):
        pipeline, plain = new_pipeline(), new_pipeline()
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_v"])
        if lora_first:
            pipeline.unet.add_adapter(config, "style")
        load_adapter(pipeline, path, "me")
        if not lora_first:
            pipeline.unet.add_adapter(config, "style")
        pipeline.set_adapters(["me", "style"], [0.5, 0.5])
        expected = draw(pipeline)
        pipeline.unet.fuse_lora()
        assert same(draw(pipeline), expected)
        pipeline.unet.unfuse_lora()
        assert same(draw(pipeline), expected)
        pipeline.unload_lora_weights()
        for name, value in pipeline.unet.state_dict().items():
            assert torch.allclose(value, plain.unet.state_dict()[name], atol=1e-6), name


def test_what_save_lora_adapter_writes_loads(new_pipeline, theta_file, tmp_path):
    pipeline, other = new_pipeline(), new_pipeline()
    load_adapter(pipeline, theta_file(components=["unet"])[0], "me")
    assert pipeline.get_list_adapters() == {"unet": ["me"]}
    pipeline.unet.save_lora_adapter(tmp_path / "me" / "unet", "me")
    with safe_open(tmp_path / "me/unet/pytorch_lora_weights.safetensors", framework="pt") as file:
        has_config = "lora_adapter_metadata" in file.metadata()
    if has_config:
        load_adapter(other, tmp_path / "me", "me")
        assert torch.equal(draw(other), draw(pipeline))
    else:  # diffusers before 0.34
        with pytest.raises(ValueError, match=r"has no adapter_config.json; save the adapter again"):
            load_adapter(other, tmp_path / "me", "me")


def test_adapters_stay_float32_beside_a_half_precision_pipeline(new_pipeline, folder):
    pipeline, exact = new_pipeline().to(torch.bfloat16), new_pipeline()
    for each in (pipeline, exact):
        load_adapter(each, folder, "me")
    ours, theirs = (LiDBSpace(models_of(each), CONFIG).theta_from_adapters("me") for each in (pipeline, exact))
    assert torch.equal(ours, theirs)
    assert {p.dtype for name, p in pipeline.unet.named_parameters() if "lidb_" in name} == {torch.float32}
    assert draw(pipeline).dtype == torch.bfloat16


def test_models_that_peft_has_wrapped_are_saved_and_not_loaded_onto(new_pipeline, folder, tmp_path):
    pipeline, other = new_pipeline(), new_pipeline()
    for name in ("unet", "text_encoder"):
        setattr(pipeline, name, PeftModel.from_pretrained(getattr(pipeline, name), folder / name))
    with pytest.raises(ValueError, match="text_encoder is a PeftModel; give the pipeline the model inside"):
        load_adapter(pipeline, folder, "more")
    save_adapter(pipeline, tmp_path / "again")
    load_adapter(other, tmp_path / "again")
    assert torch.equal(draw(other), draw(pipeline))


def test_diffusers_own_loaders_refuse_it(new_pipeline, folder, tmp_path):
    pipeline = new_pipeline()
    load_adapter(pipeline, folder, "me")
    pipeline.unet.save_lora_adapter(tmp_path, "me")
    other = new_pipeline()
    before = draw(other)
    with pytest.raises((TypeError, IndexError)):
        other.unet.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        other.load_lora_weights(folder / "unet", weight_name=WEIGHTS)
    assert torch.equal(draw(other), before)
    assert other.get_list_adapters() == {}


def test_any_component_with_adapters_is_saved_and_loaded(tmp_path):
    from diffusers import DiffusionPipeline, SD3Transformer2DModel

    class Pipeline(DiffusionPipeline):
        def __init__(self, transformer):
            super().__init__()
            self.register_modules(transformer=transformer)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SD3Transformer2DModel(
            sample_size=8, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
            joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4,
        )  # fmt: skip
    model.add_adapter(LiDBConfig(down_dim=4, up_dim=2, target_modules=["ff.net.2"], init_weights=False), "me")
    expected = model.transformer_blocks[0].ff.net[2].get_delta_weight("me")
    save_adapter(Pipeline(model), tmp_path / "me", "me")
    model.delete_adapters("me")
    load_adapter(Pipeline(model), tmp_path / "me", "you", weight=0.5)
    assert torch.equal(model.transformer_blocks[0].ff.net[2].get_delta_weight("you"), 0.5 * expected)


def test_a_loaded_adapter_may_be_trained_on(new_pipeline, folder):
    pipeline = new_pipeline()
    load_adapter(pipeline, folder, "me")
    trainable = {name for name, parameter in pipeline.unet.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in pipeline.unet.named_parameters() if "lidb_" in name}


def test_the_other_naming_of_clips_modules_loads_too(new_pipeline, folder):
    file = folder / "text_encoder" / WEIGHTS
    tensors, level = load_file(file), "base_model.model.text_model."
    has_level = any(key.startswith(level) for key in tensors)
    old, new = (level, "base_model.model.") if has_level else ("base_model.model.encoder", f"{level}encoder")
    save_file({key.replace(old, new, 1): value for key, value in tensors.items()}, file)
    pipeline, plain = new_pipeline(), new_pipeline()
    load_adapter(pipeline, folder)
    save_file(tensors, file)
    load_adapter(plain, folder)
    assert torch.equal(draw(pipeline), draw(plain))


def test_a_theta_without_fingerprint_is_taken_for_one_of_all_components(new_pipeline, theta_file):
    pipeline = new_pipeline()
    load_adapter(pipeline, theta_file(base_fingerprint="")[0], "me")
    assert pipeline.get_list_adapters() == {"unet": ["me"], "text_encoder": ["me"]}
    refused(new_pipeline(), theta_file(components=["unet"], base_fingerprint="")[0], "another list of 32 layers")
    refused(new_pipeline(), theta_file(base_fingerprint="?")[0], "has a base fingerprint that names no components")


def test_a_theta_of_another_checkpoint_is_a_warning(new_pipeline, theta_file):
    path, _ = theta_file()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_adapter(new_pipeline(), path)
    other = new_pipeline()
    other.unet.requires_grad_(False)
    for parameter in other.unet.parameters():
        parameter.mul_(2.0)
    with pytest.warns(UserWarning, match="whose weights differ from this model's"):
        load_adapter(other, path)


# ---- what is refused, and leaves nothing behind ----


def refused(pipeline, path, text, kind=ValueError, name="me"):
    """Loading fails with one sentence and changes nothing."""
    before, adapters = draw(pipeline), pipeline.get_list_adapters()
    with pytest.raises(kind, match=text) as caught:
        load_adapter(pipeline, path, name)
    assert "\n" not in str(caught.value)
    assert pipeline.get_list_adapters() == adapters
    assert torch.equal(draw(pipeline), before)


def test_a_theta_file_of_another_architecture_is_refused(new_pipeline, theta_file):
    refused(new_pipeline(sdxl=True), theta_file(sdxl=False)[0], "belongs to another list of 40 layers")
    refused(new_pipeline(sdxl=False), theta_file(sdxl=True)[0], "has a part for text_encoder_2, which this Stable")


# Settings of other kinds than PEFT's, and an expression that takes exponential time.
CONFIGS = {
    "list": {"rank_pattern": ["to_q"]},
    "huge": {"scale": 10**400},
    "slow": {"target_modules": "(a+)+b"},
}


@pytest.mark.parametrize("damage", ["missing", "unexpected", "half", "config", "text", "list", "huge", "slow", "bin"])
def test_a_damaged_part_takes_the_whole_adapter_with_it(damage, new_pipeline, folder, theta_file):
    part = folder / "unet"  # the text encoder's part, which is read first, is whole
    tensors = load_file(part / WEIGHTS)
    name = next(name for name in tensors if name.endswith("lidb_up"))
    if damage == "missing":
        tensors.pop(name)
    elif damage == "unexpected":
        tensors["base_model.model.conv_out.lidb_up"] = torch.zeros(1)
    save_file(tensors, part / WEIGHTS)
    if damage == "half":
        (part / WEIGHTS).write_bytes((part / WEIGHTS).read_bytes()[:1000])
    elif damage == "config":
        (part / "adapter_config.json").write_text("{")
    elif damage == "text":
        (part / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    elif damage in CONFIGS:
        config = json.loads((part / "adapter_config.json").read_text())
        (part / "adapter_config.json").write_text(json.dumps(config | CONFIGS[damage]))
    elif damage == "bin":
        (part / WEIGHTS).rename(part / "adapter_model.bin")
    text = {
        "missing": r"missing keys \['.*lidb_up.me'\], unexpected keys \[\]",
        "unexpected": r"missing keys \[\], unexpected keys \['base_model.model.conv_out.lidb_up'\]",
        "half": "is truncated|is not a safetensors file",
        "config": "adapter_config.json is not valid JSON",
        "text": "adapter_config.json is not valid JSON",
        "list": "the config in .* describes no LiDB this version knows",
        "huge": "the config in .* describes no LiDB this version knows",
        "slow": "describes no LiDB this version knows: its target_modules names layers by .* is repeated",
        "bin": "has no adapter_model.safetensors; save the adapter again, as safetensors",
    }[damage]
    refused(new_pipeline(), folder, text)
    pipeline = new_pipeline()
    load_adapter(pipeline, theta_file(seed=1)[0], "other", weight=0.5)
    refused(pipeline, folder, text)


def test_other_adapters_and_folders_are_refused(new_pipeline, folder, tmp_path):
    pipeline = new_pipeline()
    refused(pipeline, tmp_path / "nothing", "does not exist; name a .safetensors file", FileNotFoundError)
    refused(pipeline, folder / "unet", "holds one model's adapter; move it into a subfolder")
    (tmp_path / "empty").mkdir()
    refused(pipeline, tmp_path / "empty", "holds no LiDB adapter: no subfolder such as unet/")
    shutil.copytree(folder / "unet", folder / "transformer")
    refused(pipeline, folder, "has a part for transformer, which this StableDiffusionPipeline lacks")
    config = folder / "unet" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LORA"}))
    refused(pipeline, folder, "holds a LORA adapter; load that with the pipeline's load_lora_weights")


def test_a_pipeline_that_cannot_take_it_is_refused(new_pipeline, folder):
    pipeline = new_pipeline()
    load_adapter(pipeline, folder, "me")
    refused(pipeline, folder, "the text_encoder has an adapter called 'me'; choose another")
    pipeline.fuse_lora(components=["unet", "text_encoder"])
    refused(pipeline, folder, "has fused adapters, which would hide another one; call unfuse_lora", name="more")
    offloaded = new_pipeline()
    offloaded.unet.to("meta")
    with pytest.raises(ValueError, match="the unet is offloaded to the meta device; load the adapter before"):
        load_adapter(offloaded, folder)


def test_saving_needs_a_new_folder_and_a_lidb_adapter(new_pipeline, folder, tmp_path):
    pipeline = new_pipeline()
    load_adapter(pipeline, folder, "me")
    with pytest.raises(FileExistsError, match="exists; name a new folder"):
        save_adapter(pipeline, folder, "me")
    with pytest.raises(FileNotFoundError, match="does not exist; make the folder first"):
        save_adapter(pipeline, tmp_path / "no" / "where", "me")
    pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]), "style")
    for name in ("you", "style"):
        with pytest.raises(ValueError, match=rf"has no LiDB adapter called '{name}'; it has \['me'\]"):
            save_adapter(pipeline, tmp_path / "new", name)
    assert not list(tmp_path.glob("*new*"))
