"""Every format to every other, judged by arithmetic on raw bytes, diffusers' loader and PEFT's; never by our own."""

import copy
import itertools
import json
import weakref

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from converters import FORMATS, KohyaMetadata, detect_format, prepare_conversion, read_lora, write_lora
from converters.convert import LIDB_FORMATS, prepare_writing
from converters.layer import LoraLayer
from lidb_peft import LiDBConfig, LiDBSpace, load_theta, save_theta
from lidb_peft.bases import get_basis

RANK, ALPHA = 4, 2
LORA_FORMATS = [name for name in FORMATS if name not in LIDB_FORMATS]


@pytest.fixture(scope="module")
def models():
    """A UNet and a text encoder with Stable Diffusion 1's module names, fewer of them, and 32 channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
        clip = CLIPTextConfig(
            hidden_size=16, intermediate_size=17, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
            max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        return {"unet": unet, "text_encoder": CLIPTextModel(clip).eval()}


@pytest.fixture(scope="module")
def modules(models, attentions):
    """Classic layer name -> the real module."""
    found = attentions(models)
    assert len(found) == 4 * 8 + 2 * 4
    return found


@pytest.fixture(scope="module")
def factors(modules):
    generator = torch.Generator().manual_seed(1)
    return {
        name: (
            torch.randn(RANK, module.in_features, generator=generator).half(),
            (1e-3 * torch.randn(module.out_features, RANK, generator=generator)).half(),  # some are subnormal
        )
        for name, module in modules.items()
    }


def old_name(layer):
    """A layer's name before ``.down.weight`` in diffusers 0.18 and 0.19, by the words of their source."""
    if layer.startswith("unet."):
        *path, last = layer.removesuffix(".0").split(".")
        return ".".join([*path, "processor", last]) + "_lora"
    return layer + ".lora_linear_layer"


def kohya_name(layer):
    return layer.replace("unet.", "lora_unet_").replace("text_encoder.", "lora_te_").replace(".", "_")


def write_kohya(path, factors, alpha=ALPHA):
    state = {}
    for layer, (down, up) in factors.items():
        name = kohya_name(layer)
        state |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha, dtype=up.dtype),
        }
    save_file(state, path, metadata={"ss_base_model_version": "sd_v1", "ss_network_dim": str(RANK),
                                     "ss_network_alpha": str(float(alpha)), "ss_training_comment": "kept"})  # fmt: skip


def own_paths(models, component, layers):
    """Classic layer name -> the path that the installed library gives the module."""
    classic = not hasattr(models[component], "text_model")
    return {
        name: name.removeprefix(f"{component}.").removeprefix("text_model." if classic else "")
        for name in layers
        if name.startswith(f"{component}.")
    }


def write_diffusers(path, models, factors):
    """Let diffusers write, with the metadata in which it keeps alpha."""
    layers, metadata = {}, {}
    for component in models:
        state = {}
        for name in own_paths(models, component, factors):
            state[name.removeprefix(f"{component}.") + ".lora_A.weight"] = factors[name][0]
            state[name.removeprefix(f"{component}.") + ".lora_B.weight"] = factors[name][1]
        layers[f"{component}_lora_layers"] = state
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q"])
        metadata[f"{component}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(path, **layers, **metadata)


def write_peft(path, models, factors):
    for component, model in models.items():
        paths = own_paths(models, component, factors)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(paths.values()))
        adapter = get_peft_model(copy.deepcopy(model), config).half()
        for name, module_path in paths.items():
            module = adapter.base_model.model.get_submodule(module_path)
            module.lora_A.default.weight.data = factors[name][0].clone()
            module.lora_B.default.weight.data = factors[name][1].clone()
        adapter.save_pretrained(path / component)


@pytest.fixture(scope="module")
def sources(models, factors, tmp_path_factory):
    """Format -> an adapter that its own library, or this file's few lines, wrote."""
    folder = tmp_path_factory.mktemp("sources")
    write_kohya(folder / "kohya.safetensors", factors)
    write_diffusers(folder / "diffusers", models, factors)
    old = {f"{old_name(name)}.down.weight": down for name, (down, _) in factors.items()}
    old |= {f"{old_name(name)}.up.weight": up.float() * (ALPHA / RANK) for name, (_, up) in factors.items()}
    save_file(old, folder / "old.safetensors")
    write_peft(folder / "peft", models, factors)
    config = LiDBConfig(r=2, down_dim=6, up_dim=5, scale=0.5, init_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        adapters = {name: get_peft_model(copy.deepcopy(model), copy.copy(config)) for name, model in models.items()}
    for name, adapter in adapters.items():
        adapter.save_pretrained(folder / "lidb" / name)
    space = LiDBSpace(adapters, config)
    save_theta(folder / "theta.safetensors", space.theta_from_adapters(), space, dtype=torch.float32)
    names = ("kohya.safetensors", "diffusers", "old.safetensors", "peft", "theta.safetensors", "lidb")
    return {format_name: folder / name for format_name, name in zip(FORMATS, names, strict=True)}


@pytest.fixture(scope="module")
def expected(models, factors, sources):
    """Format -> the updates that its source stands for, dense and in float64."""
    plain = {name: ALPHA / RANK * (up.double() @ down.double()).numpy() for name, (down, up) in factors.items()}
    lidb = {}
    for component, model in models.items():
        adapter = PeftModel.from_pretrained(copy.deepcopy(model), sources["lidb"] / component)
        for name, path in own_paths(models, component, factors).items():
            layer = adapter.base_model.model.get_submodule(path)
            down_aux, up_aux = (get_basis(key, torch.device("cpu")).double() for key in layer.lidb_keys["default"])
            down, up = layer.lidb_down["default"].double(), layer.lidb_up["default"].double()
            lidb[name] = 0.5 * (up_aux @ up @ down @ down_aux).detach().numpy()
    return {name: lidb if name in LIDB_FORMATS else plain for name in FORMATS}


def raw_updates(path, format_name, layers, read_raw):
    """Layer -> update, from the bytes of a file of ours, by what each format's page says."""
    found, num_tensors = {}, 0
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        arrays, _ = read_raw(file)
        num_tensors += len(arrays)
        config = json.loads((file.parent / "adapter_config.json").read_text()) if format_name == "peft" else {}
        folder, is_classic = file.parent.name, any("text_model" in key for key in arrays)
        for layer in layers:
            path = layer.removeprefix(f"{folder}.").removeprefix("" if is_classic else "text_model.")
            names = {
                "kohya": (kohya_name(layer), ".lora_down.weight", ".lora_up.weight"),
                "diffusers": (layer, ".lora_A.weight", ".lora_B.weight"),
                "diffusers-old": (old_name(layer), ".down.weight", ".up.weight"),
                "peft": (f"base_model.model.{path}", ".lora_A.weight", ".lora_B.weight"),
            }
            name, down, up = names[format_name]
            if name + down in arrays:
                delta = arrays[name + up] @ arrays[name + down]
                if format_name == "kohya":
                    delta *= arrays[f"{name}.alpha"] / len(arrays[name + down])
                elif format_name == "peft":
                    assert not config["rank_pattern"]
                    assert not config["alpha_pattern"]
                    delta *= config["lora_alpha"] / config["r"]
                found[layer] = delta
    assert num_tensors == len(found) * (3 if format_name == "kohya" else 2)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_file_is_is_told_by_its_content(sources, name):
    assert detect_format(sources[name]) == name


@pytest.mark.parametrize(("found", "to"), list(itertools.product(FORMATS, LORA_FORMATS)))
def test_every_format_becomes_every_lora(tmp_path, models, sources, expected, read_raw, found, to):
    target = tmp_path / ("out" if to == "peft" else "out.safetensors")
    prepare_conversion(sources[found], target, to, family="sd1", models=models).write()
    assert detect_format(target) == to
    updates = raw_updates(target, to, expected[found], read_raw)
    assert updates.keys() == expected[found].keys()
    for name, update in expected[found].items():
        # The numbers of a LoRA are moved by powers of two only; those of LiDB are multiplied out in float32.
        tolerance = 1e-6 * np.abs(update).max() if found in LIDB_FORMATS else 0
        np.testing.assert_allclose(updates[name], update, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("found", "to"), list(itertools.product(LIDB_FORMATS, LIDB_FORMATS)))
def test_lidb_weights_go_from_file_to_folder_and_back_to_the_last_bit(tmp_path, models, sources, found, to):
    target = tmp_path / ("out" if to == "lidb" else "out.safetensors")
    prepare_conversion(sources[found], target, to, models=models).write()
    assert detect_format(target) == to
    if to == "theta":
        ours, theirs = load_theta(target), load_theta(sources["theta"])
        assert torch.equal(ours.theta, theirs.theta)
        assert (ours.config, ours.layers_hash) == (theirs.config, theirs.layers_hash)
        return
    for component, model in models.items():
        ours, theirs = (
            PeftModel.from_pretrained(copy.deepcopy(model), folder / component).state_dict()
            for folder in (target, sources["lidb"])
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("found", "to"), list(itertools.product(LORA_FORMATS, LIDB_FORMATS)))
def test_a_lora_never_becomes_lidb_in_silence(tmp_path, sources, found, to):
    with pytest.raises(ValueError, match="by projection, and lose"):
        prepare_conversion(sources[found], tmp_path / ("out" if to == "lidb" else "out.safetensors"), to)


@pytest.fixture
def pipeline(models):
    """What has diffusers' ``load_lora_weights``; the parts that no LoRA touches are not needed."""
    parts = {name: copy.deepcopy(model) for name, model in models.items()}
    rest = dict.fromkeys(("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(**parts, **rest, requires_safety_checker=False)


@pytest.mark.parametrize("to", ["kohya", "diffusers", "diffusers-old"])
def test_diffusers_loads_what_we_write(tmp_path, pipeline, attentions, sources, expected, to):
    prepare_conversion(sources["peft"], tmp_path / "a.safetensors", to, family="sd1", dtype=torch.float32).write()
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
    layers = attentions({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    for name, update in expected["peft"].items():
        found = layers[name].get_delta_weight("a").detach().numpy()
        assert np.abs(found - update).max() < 1e-5 * np.abs(update).max(), name


def test_peft_loads_what_we_write(tmp_path, models, sources, expected):
    prepare_conversion(sources["kohya"], tmp_path / "a", "peft", dtype=torch.float32).write()
    for component, model in models.items():
        adapter = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a" / component)
        for name, path in own_paths(models, component, expected["kohya"]).items():
            update, found = expected["kohya"][name], adapter.base_model.model.get_submodule(path)
            assert (
                np.abs(found.get_delta_weight("default").detach().numpy() - update).max() < 1e-5 * np.abs(update).max()
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by", ["kohya", "diffusers", "diffusers-old", "peft"])
def test_kohyas_bits_come_back_from_every_format(tmp_path, factors, by, dtype):
    write_kohya(tmp_path / "in.safetensors", {name: [x.to(dtype) for x in pair] for name, pair in factors.items()})
    between = tmp_path / ("between" if by == "peft" else "between.safetensors")
    prepare_conversion(tmp_path / "in.safetensors", between, by).write()
    # Half of a float16's subnormals have no half, so that alpha is folded in float32.
    prepare_conversion(between, tmp_path / "out.safetensors", "kohya", dtype=dtype).write()
    first, last = (load_file(tmp_path / f"{name}.safetensors") for name in ("in", "out"))
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        assert torch.equal(last[name], tensor), name
        assert last[name].dtype == dtype


def test_what_a_file_says_of_itself_goes_along(tmp_path, sources, read_raw):
    source, target = sources["kohya"], tmp_path / "out.safetensors"
    prepare_conversion(source, target, "diffusers", trigger="a sks face").write()
    prepare_conversion(target, tmp_path / "back.safetensors", "kohya").write()
    metadata = read_raw(tmp_path / "back.safetensors")[1]
    assert metadata["ss_training_comment"] == "kept"
    assert metadata["modelspec.trigger_phrase"] == "a sks face"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(RANK), str(float(ALPHA)))


@pytest.mark.parametrize(("family", "num_layers"), [("sd1", 176), ("sd2", 220), ("sdxl", 736)])
def test_every_layer_of_the_real_models_passes_through_every_format(
    tmp_path, real_layers, real_models, family, num_layers
):
    factors = {
        layer: (torch.full((1, 1), float(i)), torch.ones(1, 1)) for i, layer in enumerate(real_layers(family), 1)
    }
    assert len(factors) == num_layers
    state = {f"{layer}.lora_A.weight": down for layer, (down, _) in factors.items()}
    save_file(state | {f"{layer}.lora_B.weight": up for layer, (_, up) in factors.items()}, tmp_path / "0.safetensors")
    files = ["0.safetensors", "1.safetensors", "2.safetensors", "3", "4.safetensors", "5.safetensors"]
    steps = ["kohya", "diffusers-old", "peft", "kohya", "diffusers"]
    for source, target, to in zip(files, files[1:], steps, strict=False):
        prepare_conversion(tmp_path / source, tmp_path / target, to, family=family).write()
    first, last = (load_file(tmp_path / name) for name in (files[0], files[-1]))
    assert first.keys() == last.keys()
    assert all(torch.equal(last[name], first[name]) for name in first)
    for component, model in real_models(family).items():
        modules = {f"base_model.model.{name}.lora_A.weight" for name, _ in model.named_modules()}
        names = load_file(tmp_path / f"3/{component}/adapter_model.safetensors").keys()
        assert {name for name in names if "lora_A" in name} <= modules


# ---- what not every format can hold ----

CONV, LINEAR = "unet.down_blocks.0.resnets.0.conv1", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def write_modules(path, **modules):
    """A kohya file of module -> (down, up, alpha, further tensors); names with single underscores."""
    state = {}
    for name, (down, up, alpha, further) in modules.items():
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(alpha)}
        state |= {f"{name}.{part}": tensor for part, tensor in further.items()}
    save_file(state, path, metadata={"ss_base_model_version": "sd_v1"})
    return path


def load_into_unet(tmp_path, models, to):
    """The UNet with the LoRA that we wrote, by diffusers or by PEFT, and how to find its modules."""
    unet = copy.deepcopy(models["unet"])
    if to == "peft":
        return PeftModel.from_pretrained(unet, tmp_path / "out/unet").base_model.model
    rest = dict.fromkeys(("text_encoder", "vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(unet=unet, **rest, requires_safety_checker=False)
    pipeline.load_lora_weights(tmp_path, weight_name="out.safetensors", adapter_name="default")
    return unet


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_convolutions_are_carried(tmp_path, models, to):
    conv = models["unet"].get_submodule(CONV.removeprefix("unet."))
    down, up = torch.randn(4, conv.in_channels, 3, 3), torch.randn(conv.out_channels, 4, 1, 1)
    linear = torch.randn(4, 32), torch.randn(32, 4)
    source = write_modules(
        tmp_path / "in.safetensors",
        **{kohya_name(CONV): (down, up, 2.0, {}), kohya_name(LINEAR): (*linear, 2.0, {})},
    )
    prepare_conversion(source, tmp_path / ("out" if to == "peft" else "out.safetensors"), to).write()
    unet = load_into_unet(tmp_path, models, to)
    expected = torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down) / 2
    torch.testing.assert_close(
        unet.get_submodule(CONV.removeprefix("unet.")).get_delta_weight("default"), expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        unet.get_submodule(LINEAR.removeprefix("unet.")).get_delta_weight("default"), linear[1] @ linear[0] / 2
    )


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_dora_is_carried(tmp_path, models, to):
    modules = {}
    for layer in (LINEAR, CONV):
        weight = models["unet"].get_submodule(layer.removeprefix("unet.")).weight
        out, *rest = weight.shape
        shapes = (3, *rest), (out, 3, *(1 for _ in rest[1:])), (out, *(1 for _ in rest))
        down, up, magnitude = (torch.rand(shape) for shape in shapes)
        modules[kohya_name(layer)] = (down, up, 3.0, {"dora_scale": magnitude})
    source = write_modules(tmp_path / "in.safetensors", **modules)
    conversion = prepare_conversion(source, tmp_path / ("out" if to == "peft" else "out.safetensors"), to)
    assert any("DoRA" in note for note in conversion.notes) == (to == "kohya")
    conversion.write()
    if to == "kohya":
        assert torch.equal(
            load_file(tmp_path / "out.safetensors")[f"{kohya_name(CONV)}.dora_scale"],
            modules[kohya_name(CONV)][3]["dora_scale"],
        )
        return
    unet = load_into_unet(tmp_path, models, to)
    for layer in (LINEAR, CONV):
        down, up, _, further = modules[kohya_name(layer)]
        module = unet.get_submodule(layer.removeprefix("unet."))
        updated = module.get_base_layer().weight + torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view_as(
            module.get_base_layer().weight
        )
        norms = torch.linalg.vector_norm(updated.flatten(1), dim=1).view_as(further["dora_scale"])
        module.merge()
        torch.testing.assert_close(module.get_base_layer().weight, further["dora_scale"] * updated / norms)


def test_dora_by_inputs_stays_in_kohyas_files_and_is_refused_by_name_elsewhere(tmp_path):
    modules = {
        kohya_name(LINEAR): (torch.randn(2, 8), torch.randn(8, 2), 2.0, {"dora_scale": torch.rand(1, 8) + 0.5}),
        kohya_name(CONV): (
            torch.randn(2, 8, 3, 3),
            torch.randn(8, 2, 1, 1),
            2.0,
            {"dora_scale": torch.rand(1, 8, 1, 1)},
        ),
    }
    source = write_modules(tmp_path / "in.safetensors", **modules)
    conversion = prepare_conversion(source, tmp_path / "out.safetensors", "kohya", family="sd1")
    assert conversion.notes == ()  # A1111 and ComfyUI apply this kind as it was trained
    conversion.write()
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    for name in (f"{module}.dora_scale" for module in modules):
        assert torch.equal(before[name], after[name])
    for to in ("diffusers", "peft"):
        with pytest.raises(ValueError, match="is DoRA with a magnitude for each input, as LyCORIS trains it"):
            prepare_conversion(source, tmp_path / f"out-{to}.safetensors" if to != "peft" else tmp_path / "out", to)


def test_old_diffusers_files_refuse_what_they_never_held(tmp_path):
    conv = torch.randn(2, 8, 3, 3), torch.randn(8, 2, 1, 1), 2.0, {}
    dora = torch.randn(2, 8), torch.randn(8, 2), 2.0, {"dora_scale": torch.rand(8, 1)}
    for name, module, words in ((CONV, conv, "is not an attention projection"), (LINEAR, dora, "is DoRA")):
        source = write_modules(tmp_path / "in.safetensors", **{kohya_name(name): module})
        with pytest.raises(ValueError, match=f"layer {name} {words}"):
            prepare_conversion(source, tmp_path / "out.safetensors", "diffusers-old")


def test_one_peft_config_cannot_hold_dora_and_plain_lora(tmp_path):
    plain = torch.randn(2, 8), torch.randn(8, 2), 2.0, {}
    dora = torch.randn(2, 8), torch.randn(8, 2), 2.0, {"dora_scale": torch.rand(8, 1)}
    modules = {kohya_name(LINEAR): plain, kohya_name(LINEAR.replace("to_q", "to_k")): dora}
    source = write_modules(tmp_path / "in.safetensors", **modules)
    with pytest.raises(ValueError, match=r"to_k is DoRA and .*to_q is not"):
        prepare_conversion(source, tmp_path / "out", "peft")


def test_ranks_and_alphas_of_their_own_stay_in_peft_and_are_folded_elsewhere(tmp_path, read_raw, raw_deltas):
    names = [LINEAR.replace("to_q", name) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    modules = {
        kohya_name(name): (torch.randn(rank, 8).half(), torch.randn(8, rank).half(), alpha, {})
        for name, rank, alpha in zip(names, (4, 2, 4, 4), (2.0, 4.0, 1.0, 2.0), strict=True)
    }
    source = write_modules(tmp_path / "in.safetensors", **modules)
    first = raw_deltas(source)
    conversion = prepare_conversion(source, tmp_path / "out.safetensors", "kohya")
    assert conversion.notes[-1] == "the alphas of 2 layers are folded into lora_up, which is exact"
    assert (
        "1 layers are padded with zeros to rank 4"
        in prepare_conversion(source, tmp_path / "other.safetensors", "diffusers").notes
    )
    conversion.write()
    assert [len(array) for name, array in read_raw(tmp_path / "out.safetensors")[0].items() if "down" in name] == [
        len(array) for name, array in read_raw(source)[0].items() if "down" in name
    ]
    found = raw_deltas(tmp_path / "out.safetensors")
    assert all(np.array_equal(found[name], first[name]) for name in first)
    assert {array.item() for name, array in read_raw(tmp_path / "out.safetensors")[0].items() if "alpha" in name} == {2}

    assert not prepare_conversion(source, tmp_path / "out", "peft").notes
    prepare_conversion(source, tmp_path / "out", "peft").write()
    config = json.loads((tmp_path / "out/unet/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 2)
    to_k, to_v = (name.removeprefix("unet.") for name in names[1:3])
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({to_k: 2}, {to_k: 4, to_v: 1})
    layers = read_lora(tmp_path / "out").layers
    for name in names:
        down, up, alpha, _ = modules[kohya_name(name)]
        assert torch.equal(layers[name].lora_A, down)
        assert torch.equal(layers[name].lora_B, up)
        assert layers[name].alpha == alpha


def test_what_cannot_be_folded_exactly_is_rounded_and_said(tmp_path, raw_deltas):
    down, up = torch.randn(4, 8).half(), torch.randn(8, 4).half()
    modules = {
        kohya_name(LINEAR): (down, up, 1.0, {}),
        kohya_name(LINEAR[:-1] + "k"): (down.clone(), up.clone(), 3.0, {}),
    }
    source = write_modules(tmp_path / "in.safetensors", **modules)
    for dtype, bound in ((None, 2**-24), (torch.float16, 2**-11)):
        conversion = prepare_conversion(source, tmp_path / "out.safetensors", "kohya", dtype=dtype, overwrite=True)
        assert ("become float32" in conversion.notes[0]) == (dtype is None)  # float16 is what is written otherwise
        assert "the alphas of 1 layer are folded into lora_up, rounded by up to" in conversion.notes[-1]
        conversion.write()
        first, last = raw_deltas(source), raw_deltas(tmp_path / "out.safetensors")
        errors = [np.abs(last[name] - first[name]).max() / np.abs(first[name]).max() for name in first]
        assert 0 < max(errors) < 4 * bound


def test_layers_of_zeros_and_negative_alphas_are_folded_exactly(tmp_path, raw_deltas):
    zeros = torch.randn(4, 8).half(), torch.zeros(8, 4).half(), 3.0, {}
    negative = torch.randn(4, 8).half(), torch.randn(8, 4).half(), -8.0, {}
    names = [kohya_name(LINEAR.replace("to_q", name)) for name in ("to_q", "to_v", "to_k")]
    modules = dict(
        zip(names, (zeros, negative, (torch.randn(4, 8).half(), torch.randn(8, 4).half(), 4.0, {})), strict=True)
    )
    source = write_modules(tmp_path / "in.safetensors", **modules)
    conversion = prepare_conversion(source, tmp_path / "out.safetensors", "kohya")
    assert conversion.notes == ("the alphas of 2 layers are folded into lora_up, which is exact",)
    conversion.write()
    first, last = raw_deltas(source), raw_deltas(tmp_path / "out.safetensors")
    assert all(np.array_equal(first[name], last[name]) for name in first)


def test_half_precision_overflows_in_words(tmp_path):
    module = torch.full((1, 8), 1e38), torch.full((8, 1), 1e38), 1.0, {}
    source = write_modules(tmp_path / "in.safetensors", **{kohya_name(LINEAR): module})
    with pytest.raises(ValueError, match=r"beyond 6\.55e\+04, the largest float16; write it as float32"):
        prepare_conversion(source, tmp_path / "out.safetensors", "kohya", dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "a1111"}, "the format is 'a1111'; choose one of kohya"),
        ({"to": "kohya", "dtype": torch.int8}, "choose one of torch.float16"),
        ({"to": "kohya", "family": "sd3"}, "choose one of sd1, sd2, sdxl"),
        ({"to": "kohya", "target": "out.ckpt"}, "does not end in .safetensors"),
        ({"to": "kohya"}, "do not show its model family; pass --family sd1, sd2"),
    ],
)
def test_a_wrong_choice_is_named(tmp_path, sources, arguments, message):
    arguments = {"target": "out.safetensors"} | arguments
    with pytest.raises(ValueError, match=message):
        prepare_conversion(sources["peft"], tmp_path / arguments.pop("target"), **arguments)


def test_sidecar_and_preview_come_along_to_kohya_and_the_trigger_to_all(tmp_path, read_raw):
    source, out = tmp_path / "anna.safetensors", tmp_path / "out"
    out.mkdir()
    factors = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (torch.ones(2, 4), torch.ones(4, 2))}
    write_lora(source, factors, KohyaMetadata(), preview=Image.new("RGB", (8, 8), "red"))
    sidecar = {"activation text": "a sks face", "negative text": "blurry", "preferred weight": 0.8, "notes": "mine"}
    source.with_suffix(".json").write_text(json.dumps(sidecar))

    written = prepare_conversion(source, out / "b.safetensors", "kohya").write()
    assert written == [out / name for name in ("b.safetensors", "b.json", "b.png")]
    copied = json.loads((out / "b.json").read_text())
    assert {key: copied[key] for key in sidecar} == sidecar
    assert (out / "b.png").read_bytes() == source.with_suffix(".png").read_bytes()
    assert read_raw(out / "b.safetensors")[1]["modelspec.trigger_phrase"] == "a sks face"

    prepare_conversion(source, out / "c.safetensors", "kohya", trigger="zwx").write()
    assert json.loads((out / "c.json").read_text()) == copied | {"activation text": "zwx"}
    (out / "d.png").write_bytes(b"a photo")
    assert prepare_conversion(source, out / "d.safetensors", "kohya").write()[1:] == [out / "d.json"]
    assert (out / "d.png").read_bytes() == b"a photo"
    assert prepare_conversion(source, out / "e.safetensors", "diffusers").write() == [out / "e.safetensors"]
    assert read_raw(out / "e.safetensors")[1]["modelspec.trigger_phrase"] == "a sks face"


def test_what_stands_beside_a_lora_comes_along_to_what_is_computed_from_it(tmp_path):
    anna, ink = tmp_path / "anna.safetensors", tmp_path / "ink.safetensors"
    factors = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (torch.ones(2, 4), torch.ones(4, 2))}
    for path in (anna, ink):
        write_lora(path, factors, KohyaMetadata(), preview=Image.new("RGB", (8, 8), "red"))
    sidecar = {"activation text": "a sks face", "negative text": "blurry", "preferred weight": 0.8}
    anna.with_suffix(".json").write_text(json.dumps(sidecar))
    ink.with_suffix(".json").write_text(json.dumps(sidecar | {"activation text": "ink", "notes": "mine"}))

    small, both = tmp_path / "small.safetensors", tmp_path / "both.safetensors"
    written = prepare_writing(read_lora(anna), [anna], small).write()
    assert written == [small, small.with_suffix(".json"), small.with_suffix(".png")]
    copied = json.loads(small.with_suffix(".json").read_text())
    assert {key: copied[key] for key in sidecar} == sidecar
    assert read_lora(small).metadata["modelspec.trigger_phrase"] == "a sks face"
    assert prepare_writing(read_lora(anna), [anna, ink], both).write() == [both, both.with_suffix(".json")]
    merged = json.loads(both.with_suffix(".json").read_text())
    assert {key: merged[key] for key in sidecar} == sidecar | {"activation text": ""}
    assert merged["notes"] == ""


def test_a_layer_that_the_family_lacks_is_refused_before_anything_is_written(tmp_path):
    layer = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    save_file({f"{layer}.lora_A.weight": torch.ones(1, 8), f"{layer}.lora_B.weight": torch.ones(8, 1)},
              tmp_path / "in.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="'text_encoder_2', which sd1 does not have"):
        prepare_conversion(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "kohya", family="sd1")


def test_a_sidecar_does_not_change_what_the_file_says_of_itself(tmp_path, read_raw):
    source = tmp_path / "anna.safetensors"
    factors = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (torch.ones(2, 4), torch.ones(4, 2))}
    write_lora(source, factors, KohyaMetadata(trigger="a sks face"))
    source.with_suffix(".json").write_text('{"activation text": "sks, smiling"}')
    prepare_conversion(source, tmp_path / "b.safetensors", "kohya").write()
    metadata = read_raw(tmp_path / "b.safetensors")[1]
    assert metadata["modelspec.trigger_phrase"] == "a sks face"
    assert json.loads(metadata["ss_tag_frequency"]) == {"1_a sks face": {"a sks face": 1}}
    assert json.loads((tmp_path / "b.json").read_text())["activation text"] == "sks, smiling"


def test_stable_diffusion_2s_projections_are_written_as_each_reader_has_them_and_said(tmp_path, read_raw):
    block = "lora_unet_down_blocks_0_attentions_0"
    name, cross = f"{block}_proj_in", f"{block}_transformer_blocks_0"
    state = {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8, 2),
             f"{cross}_attn2_to_k.lora_down.weight": torch.randn(2, 1024),
             f"{cross}_attn2_to_k.lora_up.weight": torch.randn(8, 2)}  # fmt: skip
    save_file(state, tmp_path / "a.safetensors")
    conversion = prepare_conversion(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert conversion.notes[-1].startswith("1 layer written as the convolution that sd-scripts has there")
    conversion.write()
    arrays, metadata = read_raw(tmp_path / "b.safetensors")
    assert arrays[f"{name}.lora_down.weight"].shape == (2, 8, 1, 1)
    assert "ss_base_model_version" not in metadata  # which of Stable Diffusion 2's it is, the file did not say
    prepare_conversion(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers").write()
    path = "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"
    assert read_raw(tmp_path / "c.safetensors")[0][path].shape == (2, 8)


def test_one_layer_is_in_memory_while_many_are_changed(tmp_path, monkeypatch, read_raw):
    """A LoRA of gigabytes is mapped from the disk, and what is changed of it is computed when it is written."""
    names = [f"unet.down_blocks.{i}.attentions.{j}.transformer_blocks.0.attn2.{to}"
             for i in range(3) for j in range(2) for to in ("to_k", "to_v")]  # fmt: skip
    modules = {kohya_name(name): (torch.randn(4, 768), torch.randn(8, 4), 3.0, {}) for name in names}
    source = write_modules(tmp_path / "in.safetensors", **modules)
    conversion = prepare_conversion(source, tmp_path / "out.safetensors", "diffusers", torch.float16)
    loaded, alive, most = LoraLayer.loaded, weakref.WeakSet(), []

    def counted(layer):
        found = loaded(layer)
        if layer.compute is not None:
            alive.add(found)
        most.append(len(alive))
        return found

    monkeypatch.setattr(LoraLayer, "loaded", counted)
    monkeypatch.setattr(LoraLayer, "__hash__", object.__hash__)
    conversion.write()
    assert len(most) >= len(names)
    assert max(most) <= 3  # of one layer: widened, folded, rounded
    arrays, _ = read_raw(tmp_path / "out.safetensors")
    for name in names:
        down, up, alpha, _ = modules[kohya_name(name)]
        update = arrays[f"{name}.lora_B.weight"] @ arrays[f"{name}.lora_A.weight"]
        expected = (alpha / 4 * up.double() @ down.double()).numpy()
        np.testing.assert_allclose(update, expected, atol=2e-3 * np.abs(expected).max())
