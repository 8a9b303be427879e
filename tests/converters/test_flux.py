"""LoRAs of FLUX.1, in kohya's names and diffusers': the same updates by independent arithmetic, and in diffusers."""

import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from converters import KohyaMetadata, describe, read_lora, save_kohya
from converters.arithmetic.algebra import merge, resize
from converters.arithmetic.checkpoint import extract, find_family, find_weights, merge_into
from converters.convert import prepare_conversion
from converters.key_maps import from_checkpoint_name, read_kohya_name, to_kohya_name
from lidb_peft import LiDBConfig, LiDBSpace

WIDTH = 32
NARROW = {
    "attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2, "in_channels": 16,
    "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True,
}  # fmt: skip
# kohya's module -> diffusers' layers of it, and their rows: written by hand, one block of each kind.
FUSED = {
    "double_blocks_{}_img_attn_qkv": ("transformer_blocks.{}.attn.", ("to_q", "to_k", "to_v"), (1, 1, 1)),
    "double_blocks_{}_txt_attn_qkv": (
        "transformer_blocks.{}.attn.", ("add_q_proj", "add_k_proj", "add_v_proj"), (1, 1, 1)
    ),
    "single_blocks_{}_linear1": (
        "single_transformer_blocks.{}.", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), (1, 1, 1, 4)
    ),
    "double_blocks_{}_img_attn_proj": ("transformer_blocks.{}.attn.", ("to_out.0",), (1,)),
    "double_blocks_{}_txt_attn_proj": ("transformer_blocks.{}.attn.", ("to_add_out",), (1,)),
    "double_blocks_{}_img_mlp_0": ("transformer_blocks.{}.ff.", ("net.0.proj",), (4,)),
    "double_blocks_{}_txt_mlp_2": ("transformer_blocks.{}.ff_context.", ("net.2",), (1,)),
    "double_blocks_{}_img_mod_lin": ("transformer_blocks.{}.norm1.", ("linear",), (6,)),
    "double_blocks_{}_txt_mod_lin": ("transformer_blocks.{}.norm1_context.", ("linear",), (6,)),
    "single_blocks_{}_linear2": ("single_transformer_blocks.{}.", ("proj_out",), (1,)),
    "single_blocks_{}_modulation_lin": ("single_transformer_blocks.{}.norm.", ("linear",), (3,)),
}  # fmt: skip
IN_WIDTHS = {"double_blocks_{}_txt_mlp_2": 4, "single_blocks_{}_linear2": 5}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kohya_file(path, rank=4, alpha=2.0, width=WIDTH, modules=FUSED, block=1):
    """A file as sd-scripts' lora_flux writes it: one lora_down of rank ``rank`` for each fused module."""
    state = {}
    for seed, module in enumerate(modules):
        name = f"lora_unet_{module.format(block)}"
        rows = width * sum(FUSED[module][2])
        state[f"{name}.lora_down.weight"] = random(rank, width * IN_WIDTHS.get(module, 1), seed=seed)
        state[f"{name}.lora_up.weight"] = random(rows, rank, seed=seed + 100)
        state[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(state, path)
    return state


def kohya_deltas(state):
    """kohya's module -> its update, in float64 numpy."""
    arrays = {name: tensor.double().numpy() for name, tensor in state.items()}
    names = [name.removesuffix(".lora_down.weight") for name in arrays if name.endswith(".lora_down.weight")]
    return {
        name: arrays[f"{name}.lora_up.weight"] @ arrays[f"{name}.lora_down.weight"]
        * (arrays[f"{name}.alpha"] / len(arrays[f"{name}.lora_down.weight"]))
        for name in names
    }  # fmt: skip


def expected_deltas(state):
    """diffusers' layer -> its rows of kohya's update."""
    expected = {}
    for name, delta in kohya_deltas(state).items():
        block = next(piece for piece in name.split("_") if piece.isdecimal())
        module = name.removeprefix("lora_unet_").replace(f"_{block}_", "_{}_", 1)
        path, layers, widths = FUSED[module]
        ends = np.cumsum(widths) * (len(delta) // sum(widths))
        for layer, rows in zip(layers, np.split(delta, ends[:-1]), strict=True):
            expected[f"transformer.{path.format(block)}{layer}"] = rows
    return expected


def diffusers_deltas(state):
    arrays = {name: tensor.double().numpy() for name, tensor in state.items()}
    return {
        name.removesuffix(".lora_A.weight"): arrays[name.replace("lora_A", "lora_B")] @ array
        for name, array in arrays.items()
        if ".lora_A." in name
    }


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name], delta, **({"rtol": 1e-5, "atol": 1e-5} | tolerance), err_msg=name)


def convert(source, target, to, **options):
    conversion = prepare_conversion(source, target, to, **options)
    conversion.write()
    return conversion


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return FluxTransformer2DModel(**NARROW).eval()


@pytest.fixture
def inputs():
    return {
        "hidden_states": random(1, 4, 16), "encoder_hidden_states": random(1, 3, 24, seed=1),
        "pooled_projections": random(1, 20, seed=2), "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5]),
        "img_ids": torch.tensor([[0, y, x] for y in range(2) for x in range(2)]).float(), "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip


def test_a_fused_lora_is_the_same_updates_in_diffusers_names_and_comes_back_bit_by_bit(tmp_path):
    state = kohya_file(tmp_path / "kohya.safetensors")
    convert(tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors", "diffusers")
    split = load_file(tmp_path / "diffusers.safetensors")
    assert_same(diffusers_deltas(split), expected_deltas(state))
    assert split["transformer.transformer_blocks.1.attn.to_k.lora_A.weight"].shape == (4, WIDTH)  # shared, rank kept
    # A scale of 1/2 was folded in on the way, which is exact; with sd-scripts' metadata it is what it was.
    convert(tmp_path / "diffusers.safetensors", tmp_path / "again.safetensors", "kohya")
    assert_same(kohya_deltas(load_file(tmp_path / "again.safetensors")), kohya_deltas(state), rtol=0, atol=0)
    save_file(state, tmp_path / "said.safetensors", {"ss_network_dim": "4", "ss_network_alpha": "2.0"})
    convert(tmp_path / "said.safetensors", tmp_path / "split.safetensors", "diffusers")
    convert(tmp_path / "split.safetensors", tmp_path / "said-again.safetensors", "kohya")
    again = load_file(tmp_path / "said-again.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    convert(tmp_path / "kohya.safetensors", tmp_path / "same.safetensors", "kohya")
    same = load_file(tmp_path / "same.safetensors")
    assert same.keys() == state.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in state.items())


def test_separate_layers_are_fused_block_by_block_and_come_back_bit_by_bit(tmp_path):
    ranks = {"attn.to_q": 2, "attn.to_k": 3, "attn.to_v": 5}  # no mlp: it is not adapted
    state = {}
    for seed, (layer, rank) in enumerate(ranks.items()):
        name = f"transformer.single_transformer_blocks.3.{layer}"
        state[f"{name}.lora_A.weight"] = random(rank, WIDTH, seed=seed)
        state[f"{name}.lora_B.weight"] = random(WIDTH, rank, seed=seed + 10)
    save_file(state, tmp_path / "a.safetensors")
    conversion = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert any("1 module of kohya's" in note and "5 to 10" in note for note in conversion.notes)
    fused = load_file(tmp_path / "b.safetensors")
    name = "lora_unet_single_blocks_3_linear1"
    assert {key: tuple(value.shape) for key, value in fused.items()} == {
        f"{name}.lora_down.weight": (10, WIDTH), f"{name}.lora_up.weight": (7 * WIDTH, 10), f"{name}.alpha": ()
    }  # fmt: skip
    separate = diffusers_deltas(state)
    expected = np.concatenate([*separate.values(), np.zeros((4 * WIDTH, WIDTH))])
    np.testing.assert_allclose(kohya_deltas(fused)[name], expected, atol=1e-5)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers")
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("prefix", ["lora_transformer_", "diffusion_model.", ""])
def test_other_names_in_use_are_read(tmp_path, prefix):
    kohya = kohya_file(tmp_path / "kohya.safetensors", alpha=4.0)
    state = {}
    for name, layer in read_lora(tmp_path / "kohya.safetensors").layers.items():
        path = name.removeprefix("transformer.")
        module = prefix + path.replace(".", "_") if prefix == "lora_transformer_" else name
        ends = ("lora_down", "lora_up") if prefix == "lora_transformer_" else ("lora_A", "lora_B")
        state |= {f"{module}.{end}.weight": factor for end, factor in zip(ends, layer.tensors(), strict=True)}
    if prefix == "diffusion_model.":  # ComfyUI's: the original paths with their dots
        state = {
            f"diffusion_model.{_dotted(name)}": tensor for name, tensor in kohya.items() if not name.endswith("alpha")
        }
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "other.safetensors")
    lora = read_lora(tmp_path / "other.safetensors")
    assert lora.family == "flux1"
    found = {name: (layer.lora_B @ layer.lora_A * layer.scale).double().numpy() for name, layer in lora.layers.items()}
    assert_same(found, expected_deltas(kohya))


def _dotted(name):
    module, end = name.removeprefix("lora_unet_").split(".", 1)
    for word in ("double_blocks", "single_blocks", "img_attn", "txt_attn", "img_mlp", "txt_mlp", "img_mod", "txt_mod"):
        module = module.replace(word, word.replace("_", "-"))
    end = end.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
    return f"{module.replace('_', '.').replace('-', '_')}.{end}"


def test_diffusers_own_loader_finds_the_same_updates_in_our_kohya_file(tmp_path):
    # It knows the published widths only.
    modules = ("double_blocks_{}_img_attn_qkv", "single_blocks_{}_linear1", "double_blocks_{}_txt_attn_proj")
    kohya_file(tmp_path / "kohya.safetensors", rank=2, alpha=1.0, width=3072, modules=modules, block=18)
    convert(tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors", "diffusers")
    convert(tmp_path / "diffusers.safetensors", tmp_path / "ours.safetensors", "kohya")
    expected = load_file(tmp_path / "diffusers.safetensors")
    for source in ("kohya", "ours"):
        read = FluxPipeline.lora_state_dict(load_file(tmp_path / f"{source}.safetensors"))
        read = {name.replace("lora.down", "lora_A").replace("lora.up", "lora_B"): value for name, value in read.items()}
        assert {name: value.shape for name, value in read.items()} == {n: v.shape for n, v in expected.items()}
        for name in expected:
            if name.endswith("lora_A.weight"):
                pairs = [(found[name], found[name.replace("lora_A", "lora_B")]) for found in (read, expected)]
                (theirs, ours) = (lora_B[:64] @ lora_A for lora_A, lora_B in pairs)
                torch.testing.assert_close(theirs, ours)


def test_separate_layers_fused_by_us_are_separated_by_diffusers_too(tmp_path):
    state = {}
    for seed, layer in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer.transformer_blocks.0.attn.{layer}"
        state |= {
            f"{name}.lora_A.weight": random(2, 3072, seed=seed),
            f"{name}.lora_B.weight": random(3072, 2, seed=seed + 5),
        }
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    read = FluxPipeline.lora_state_dict(load_file(tmp_path / "b.safetensors"))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_a_lora_draws_in_diffusers_what_the_merged_weights_draw(tmp_path, transformer, inputs):
    state = kohya_file(tmp_path / "kohya.safetensors")
    convert(tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors", "diffusers")
    merged = FluxTransformer2DModel(**NARROW).eval()
    merged.load_state_dict(transformer.state_dict())
    with torch.no_grad():
        for name, delta in expected_deltas(state).items():
            merged.get_submodule(name.removeprefix("transformer.")).weight += torch.from_numpy(delta).float()
        expected, plain = merged(**inputs).sample, transformer(**inputs).sample
        FluxPipeline.load_lora_into_transformer(
            FluxPipeline.lora_state_dict(load_file(tmp_path / "diffusers.safetensors")), None, transformer
        )
        found = transformer(**inputs).sample
        transformer.delete_adapters("default_0")
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_lora_is_merged_into_the_original_checkpoint_and_taken_out_again(tmp_path):
    state = kohya_file(tmp_path / "lora.safetensors", rank=2)
    base = {}
    for seed, (name, delta) in enumerate(kohya_deltas(state).items()):
        base[f"{_dotted(name + '.weight')}"] = random(*delta.shape, seed=seed)
    base["double_blocks.1.img_attn.norm.query_norm.scale"] = torch.ones(16)
    save_file(base, tmp_path / "base.safetensors")
    merge_into(tmp_path / "base.safetensors", read_lora(tmp_path / "lora.safetensors"), tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for name, delta in kohya_deltas(state).items():
        key = _dotted(name + ".weight")
        np.testing.assert_allclose(merged[key].double().numpy(), base[key].double().numpy() + delta, atol=1e-5)
    weights = find_weights(tmp_path / "base.safetensors")
    assert find_family(weights) == "flux1"
    assert from_checkpoint_name("double_blocks.1.img_attn.norm.query_norm.scale") == ()
    found = extract(tmp_path / "out.safetensors", tmp_path / "base.safetensors", rank=2, dtype=torch.float32)
    assert max(found.errors.values()) < 1e-3
    deltas = {
        name: (layer.lora_B @ layer.lora_A * layer.scale).double().numpy() for name, layer in found.lora.layers.items()
    }
    assert_same(deltas, expected_deltas(state), atol=1e-3)
    assert found.lora.family == "flux1"


def test_loras_of_flux_are_merged_and_resized(tmp_path):
    first = kohya_file(tmp_path / "a.safetensors")
    second = kohya_file(tmp_path / "b.safetensors", rank=3, modules=["double_blocks_{}_img_attn_qkv"])
    merged, errors = merge([(read_lora(tmp_path / "a.safetensors"), 0.5), (read_lora(tmp_path / "b.safetensors"), 2.0)])
    assert max(errors.values()) == 0
    expected = {name: 0.5 * delta for name, delta in expected_deltas(first).items()}
    for name, delta in expected_deltas(second).items():
        expected[name] = expected[name] + 2.0 * delta
    found = {
        name: (layer.lora_B @ layer.lora_A * layer.scale).double().numpy() for name, layer in merged.layers.items()
    }
    assert_same(found, expected, rtol=1e-4, atol=1e-4)
    resized, errors = resize(read_lora(tmp_path / "a.safetensors"), rank=2)
    name = "transformer.transformer_blocks.1.attn.to_k"
    singular = np.linalg.svd(expected_deltas(first)[name], compute_uv=False)
    assert errors[name] == pytest.approx(np.linalg.norm(singular[2:]) / np.linalg.norm(singular), abs=1e-5)
    assert resized.layers[name].rank == 2


def test_dora_of_fused_layers_keeps_each_row_its_magnitude(tmp_path):
    state = kohya_file(tmp_path / "a.safetensors", modules=["double_blocks_{}_img_attn_qkv"])
    name = "lora_unet_double_blocks_1_img_attn_qkv"
    state[f"{name}.dora_scale"] = torch.arange(1.0, 3 * WIDTH + 1)[:, None]
    save_file(state, tmp_path / "a.safetensors")
    layers = read_lora(tmp_path / "a.safetensors").layers
    assert torch.equal(layers["transformer.transformer_blocks.1.attn.to_k"].magnitude, torch.arange(33.0, 65.0))
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert torch.equal(load_file(tmp_path / "b.safetensors")[f"{name}.dora_scale"], state[f"{name}.dora_scale"])


def test_what_kohya_reads_and_writes_of_flux_is_said(tmp_path):
    layer = "transformer.transformer_blocks.0.attn.to_out.0"
    save_kohya(tmp_path / "a.safetensors", {layer: (random(2, WIDTH), random(WIDTH, 2))}, KohyaMetadata(family="flux1"))
    found = describe(tmp_path / "a.safetensors")
    assert (found.kind, found.base, found.layers, found.warnings) == ("kohya LoRA", "Flux", {"transformer": 1}, ())
    assert found.metadata["ss_base_model_version"] == "flux1"
    assert found.metadata["ss_network_module"] == "networks.lora_flux"
    assert found.metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert found.metadata["modelspec.implementation"] == "https://github.com/black-forest-labs/flux"
    assert found.metadata["modelspec.resolution"] == "1024x1024"
    assert "modelspec.prediction_type" not in found.metadata  # kohya writes none for flow matching
    assert list(found.blocks) == ["transformer D00"]


def test_t5_is_carried_between_kohya_files_and_named_where_diffusers_drops_it(tmp_path):
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    state = kohya_file(tmp_path / "a.safetensors", modules=["double_blocks_{}_img_attn_proj"])
    state |= {
        f"{name}.lora_down.weight": random(4, 8),
        f"{name}.lora_up.weight": random(8, 4),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(state, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert load_file(tmp_path / "b.safetensors").keys() == state.keys()
    assert describe(tmp_path / "a.safetensors").warnings == ()
    notes = prepare_conversion(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "diffusers").notes
    assert any("1 layer of a text encoder that diffusers loads no LoRA of" in note for note in notes)


def test_mixed_families_are_refused_with_both_names(tmp_path):
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    state = kohya_file(tmp_path / "a.safetensors", modules=["double_blocks_{}_img_attn_proj"])
    state |= {
        f"{unet}.lora_down.weight": random(4, 768),
        f"{unet}.lora_up.weight": random(320, 4),
        f"{unet}.alpha": torch.tensor(1.0),
    }
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"layers of Stable Diffusion 1 and of FLUX\.1, which no model has both"):
        read_lora(tmp_path / "a.safetensors")
    assert any(
        "layers of Stable Diffusion 1 and of FLUX.1" in text for text in describe(tmp_path / "a.safetensors").warnings
    )
    kohya_file(tmp_path / "flux.safetensors")
    sd1 = {name: tensor for name, tensor in state.items() if name.startswith(unet)}
    save_file(sd1, tmp_path / "sd1.safetensors")
    with pytest.raises(ValueError, match="the LoRAs are for flux1 and sd1; merge those of one family"):
        merge([(read_lora(tmp_path / name), 1.0) for name in ("flux.safetensors", "sd1.safetensors")])


@pytest.mark.parametrize(
    ("to", "message"),
    [("diffusers-old", r"FLUX\.1 is newer than diffusers' old LoRA files"), ("theta", "is a LoRA; LiDB weights only")],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, to, message):
    kohya_file(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        prepare_conversion(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to)


def test_rows_that_no_fused_module_has_and_blocks_beyond_the_last_are_refused(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {f"{name}.lora_down.weight": random(2, 8), f"{name}.lora_up.weight": random(25, 2)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match=f"{name} has 25 rows, which 3 layers"):
        read_lora(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="beyond the 19 transformer_blocks"):
        to_kohya_name("transformer.transformer_blocks.19.attn.to_q", "flux1")
    with pytest.raises(ValueError, match="is not a layer of a"):
        read_kohya_name("lora_unet_single_blocks_38_linear1")


def test_the_real_transformer_is_adapted_on_its_266_attention_projections(real_models, real_layers):
    models = real_models("flux1")
    space = LiDBSpace(models, LiDBConfig())
    assert dict(space.named_shapes) == real_layers("flux1")
    names = [name for name in space.layer_names if name.startswith("transformer.")]
    assert len(names) == 19 * 8 + 38 * 3 == 266
    assert space.num_layers == 266 + 48
    modules = {to_kohya_name(name, "flux1") for name in names}
    assert len(modules) == 19 * 4 + 38
    assert {"lora_unet_double_blocks_18_txt_attn_proj", "lora_unet_single_blocks_37_linear1"} <= modules


def test_peft_adapts_a_flux_transformer_without_being_told_which_layers(inputs):
    torch.manual_seed(0)
    model = get_peft_model(FluxTransformer2DModel(**NARROW), LiDBConfig(r=1, down_dim=8, up_dim=4))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * (2 * 8 + 2 * 3)
    before = model(**inputs).sample
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lidb_up.default"):
                parameter.fill_(0.1)
    assert not torch.allclose(model(**inputs).sample, before)
    config = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=sorted))
    assert {"add_q_proj", "to_add_out", "to_q", "q_proj"} <= set(config["target_modules"])


def test_t5_has_nothing_that_is_adapted_by_default():
    small = T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=10))
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        LiDBSpace({"text_encoder_2": small}, LiDBConfig())


def test_a_theta_of_flux_becomes_a_lora_without_the_base(tmp_path, real_models):
    from lidb_peft import save_theta

    space = LiDBSpace({"transformer": real_models("flux1")["transformer"]}, LiDBConfig(down_dim=4, up_dim=3))
    theta = space.theta_0 + 0.1 * random(*space.theta_0.shape)
    save_theta(tmp_path / "theta.safetensors", theta, space)
    convert(tmp_path / "theta.safetensors", tmp_path / "a.safetensors", "kohya", dtype=torch.float32)
    lora = read_lora(tmp_path / "a.safetensors")
    assert (lora.family, lora.layers.keys()) == ("flux1", set(space.layer_names))
    expected = space.factors(theta)
    for name in (space.layer_names[0], space.layer_names[-1]):
        (lora_A, lora_B), layer = expected[name], lora.layers[name]
        torch.testing.assert_close(layer.lora_B[:64] @ layer.lora_A * layer.scale, lora_B[:64] @ lora_A)


@pytest.mark.parametrize(
    ("width", "block", "base"),
    [(3072, 0, "flux1"), (3072, 18, "flux1"), (64, 0, ""), (1536, 0, ""), (2432, 0, "")],
)
def test_double_blocks_alone_are_flux_if_they_are_as_wide_and_else_stable_diffusion_3s(tmp_path, width, block, base):
    name, path = f"transformer.transformer_blocks.{block}.attn.to_q", tmp_path / "a.safetensors"
    save_file({f"{name}.lora_A.weight": random(2, width), f"{name}.lora_B.weight": random(width, 2)}, path)
    if base:
        assert read_lora(path).family == base
    else:
        with pytest.raises(ValueError, match=r"is a LoRA of stable-diffusion-3, which is none of Stable Diffusion 1"):
            read_lora(path)


def test_double_blocks_of_another_width_are_flux_if_the_metadata_say_so(tmp_path):
    name, path = "transformer.transformer_blocks.0.attn.to_q", tmp_path / "a.safetensors"
    tensors = {f"{name}.lora_A.weight": random(2, 64), f"{name}.lora_B.weight": random(64, 2)}
    save_file(tensors, path, {"modelspec.architecture": "flux-1-dev/lora"})
    assert read_lora(path).family == "flux1"
