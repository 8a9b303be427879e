import hashlib
import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file

from converters.convert import prepare_conversion
from converters.formats.kohya import save_kohya, write_lora
from converters.inspection.describe import describe
from converters.key_maps import from_kohya_name
from converters.metadata import KohyaMetadata
from lidb_peft import LiDBConfig
from lidb_peft.space import LiDBSpace
from lidb_peft.theta import save_theta

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CLIP = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def lora(name, width_in=768, width_out=8, rank=2, alpha=2.0, down="lora_down.weight", up="lora_up.weight"):
    state = {f"{name}.{down}": torch.ones(rank, width_in), f"{name}.{up}": torch.ones(width_out, rank)}
    return state if alpha is None else state | {f"{name}.alpha": torch.tensor(alpha)}


def described(tmp_path, state, metadata=None, name="a.safetensors"):
    save_file(state, tmp_path / name, metadata)
    return describe(tmp_path / name)


def test_a_file_of_ours_is_described_in_full_and_without_warnings(tmp_path, random_factors, sd1_shapes):
    path = tmp_path / "anna.safetensors"
    metadata = KohyaMetadata(trigger="a sks face", base_model_name="stable-diffusion-v1-5")
    write_lora(path, random_factors(sd1_shapes, rank=5), metadata)
    found = describe(path)
    assert (found.kind, found.base, found.base_model_name) == ("kohya LoRA", "SD1", "stable-diffusion-v1-5")
    assert (found.ranks, found.alphas, found.dtypes) == ((5,), (5.0,), ("float16",))
    assert found.layers == {"unet": 4, "text_encoder": 2}
    assert (found.title, found.trigger_words) == ("anna", ("a sks face",))
    assert found.warnings == ()
    blob = path.read_bytes()
    tensors = hashlib.sha256(blob[8 + int.from_bytes(blob[:8], "little") :]).hexdigest()
    assert found.hashes == {
        "sha256": hashlib.sha256(blob).hexdigest(),
        "sshs_model_hash": tensors,
        "a1111": tensors[:12],
        "sshs_legacy_hash": hashlib.sha256(b"").hexdigest()[:8],  # of what lies beyond 1 MB
    }
    assert found.hashes["sshs_model_hash"] == found.metadata["sshs_model_hash"]
    assert found.size_bytes == len(blob)
    assert found.num_parameters == sum(5 * (a + b) + 1 for a, b in sd1_shapes.values())
    assert json.loads(json.dumps(found.to_dict()))["ranks"] == [5]


def test_kohyas_older_hash_is_of_the_file_without_what_is_no_ss_key(tmp_path):
    state = {f"{UNET}.lora_down.weight": torch.randn(400, 768), f"{UNET}.lora_up.weight": torch.randn(8, 400)}
    state[f"{UNET}.alpha"] = torch.tensor(400.0)
    blob = save(state, {"ss_base_model_version": "sd_v1", "ss_title": "é\n"})
    stated = {"sshs_legacy_hash": hashlib.sha256(blob[0x100000:0x110000]).hexdigest()[:8], "modelspec.title": "a"}
    metadata = {"ss_base_model_version": "sd_v1", "ss_title": "é\n"} | stated
    found = described(tmp_path, state, metadata)
    assert found.hashes["sshs_legacy_hash"] == stated["sshs_legacy_hash"]
    assert found.warnings == ()
    long = described(tmp_path, state, metadata | {"ss_tags": "x" * 2**20})
    assert "sshs_legacy_hash" not in long.hashes
    changed = described(tmp_path, {name: tensor * 2 for name, tensor in state.items()}, metadata)
    assert "sshs_legacy_hash in its metadata is not the hash" in " ".join(changed.warnings)


def test_a_diffusers_folder_of_today_is_described(tmp_path):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    unet = {f"{path}.lora_A.weight": torch.ones(4, 768), f"{path}.lora_B.weight": torch.ones(8, 4)}
    clip = {"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 768)}
    clip["text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(768, 4)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=unet, text_encoder_lora_layers=clip)
    found = describe(tmp_path)
    assert found.path.endswith("pytorch_lora_weights.safetensors")
    assert (found.kind, found.base, found.ranks, found.alphas) == ("diffusers LoRA", "SD1", (4,), ())
    assert found.layers == {"unet": 1, "text_encoder": 1}
    assert found.warnings == ()


def test_alphas_in_diffusers_metadata_are_read(tmp_path):
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = lora(path, rank=4, alpha=None, down="lora_A.weight", up="lora_B.weight")
    text = json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k": 2}})
    found = described(tmp_path, state, {"lora_adapter_metadata": text})
    assert (found.kind, found.alphas) == ("diffusers LoRA", (8.0,))


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_old_diffusers_names_are_known(tmp_path, prefix):
    block = f"{prefix}down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor"
    state = {f"{block}.to_k_lora.down.weight": torch.ones(4, 1024), f"{block}.to_k_lora.up.weight": torch.ones(8, 4)}
    clip = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    state |= {f"{clip}.down.weight": torch.ones(4, 1024), f"{clip}.up.weight": torch.ones(1024, 4)}
    found = described(tmp_path, state)
    assert (found.kind, found.base, found.ranks) == ("diffusers LoRA", "SD2", (4,))
    assert found.layers == {"unet": 1, "text_encoder": 1}


def test_a_peft_folder_is_described_with_its_configs_alpha(tmp_path):
    model = torch.nn.Linear(8, 8)
    for name in reversed(["mid_block", "attentions", "0", "transformer_blocks", "0", "attn1", "to_q"]):
        model = torch.nn.ModuleDict({name: model})
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"]))
    peft_model.save_pretrained(tmp_path)
    found = describe(tmp_path)
    assert (found.kind, found.ranks, found.alphas, found.layers) == ("PEFT LoRA", (4,), (6.0,), {"unet": 1})
    nothing, no_family = found.warnings
    assert "every layer changes nothing" in nothing
    assert no_family.endswith("hdb convert to kohya's format asks for --family sd1 or sd2 or sdxl")
    assert describe(tmp_path / "adapter_model.safetensors") == found


def test_a_folder_of_several_models_is_described_whole(tmp_path):
    for component, layer in (("unet", ATTENTION), ("text_encoder", "encoder.layers.0.self_attn.q_proj")):
        (tmp_path / component).mkdir()
        state = lora(f"base_model.model.{layer}", alpha=None, down="lora_A.weight", up="lora_B.weight")
        save_file(state, tmp_path / component / "adapter_model.safetensors")
        (tmp_path / component / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 3}')
    found = describe(tmp_path)
    assert found.path == str(tmp_path)
    assert found.kind == "PEFT LoRA"
    assert found.layers == {"unet": 1, "text_encoder": 1}
    assert found.hashes.keys() == {f"sha256 {name}/adapter_model.safetensors" for name in ("unet", "text_encoder")}
    assert found.size_bytes == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert found.alphas == describe(tmp_path / "unet").alphas == (3.0,)
    assert found.base == "SD1"
    assert found.warnings == ()
    assert json.loads(json.dumps(found.to_dict()))["blocks"].keys() == {"unet M00", "text_encoder"}


@pytest.mark.parametrize(
    ("config", "alphas", "norm", "message"),
    [
        # Every entry of the 8 x 768 update is the scale times 2.
        ({"r": 2, "lora_alpha": 6}, (6.0,), 3 * 2 * (8 * 768) ** 0.5, ""),
        ({"r": 2, "lora_alpha": 6, "use_rslora": True}, (6 * 2**0.5,), 6 / 2**0.5 * 2 * (8 * 768) ** 0.5, ""),
        ({"r": 4, "lora_alpha": 6}, (), 2 * (8 * 768) ** 0.5, "1 layer at odds with PEFT's config: .*says rank 4"),
    ],
)
def test_pefts_config_scales_an_update_or_is_at_odds_with_it(tmp_path, config, alphas, norm, message):
    name = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    state = lora(name, alpha=None, down="lora_A.weight", up="lora_B.weight")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = described(tmp_path, state, name="adapter_model.safetensors")
    assert found.alphas == pytest.approx(alphas)
    assert norms(found) == pytest.approx({"unet M00": norm})
    assert len(found.warnings) == 2 * bool(message)  # the second says that our commands refuse it for that
    assert re.search(message, " ".join(found.warnings))


def test_a_text_encoder_alone_is_of_the_model_that_the_metadata_names(tmp_path):
    found = described(tmp_path, lora(CLIP.replace("te_", "te1_", 1)), {"ss_base_model_version": "sdxl_base_v1-0"})
    assert (found.base, found.warnings) == ("SDXL", ())
    assert described(tmp_path, lora(CLIP)).base == "SD1"


def test_a_theta_file_is_described(tmp_path):
    block = torch.nn.ModuleDict({"to_q": torch.nn.Linear(16, 12), "to_k": torch.nn.Linear(8, 12)})
    unet = torch.nn.ModuleDict({"mid_block": block})
    space = LiDBSpace({"unet": unet}, LiDBConfig(r=2, down_dim=6, up_dim=4, target_modules=["to_q", "to_k"]))
    save_theta(tmp_path / "a.theta.safetensors", space.theta_0, space, base_model_name="testbed")
    found = describe(tmp_path / "a.theta.safetensors")
    assert (found.kind, found.base_model_name, found.ranks) == ("LiDB theta", "testbed", (2,))
    assert (sum(found.layers.values()), found.num_parameters, found.dtypes) == (2, 2 * 2 * 10, ("float16",))
    assert found.warnings == ()


def test_a_broken_theta_file_is_warned_about(tmp_path):
    metadata = {"lidb.r": "1", "lidb.num_layers": "175"}
    found = described(tmp_path, {"theta": torch.full((176, 150), torch.nan)}, metadata)
    assert "says 175 layers and theta has 176 rows" in found.warnings[0]
    assert "NaN" in found.warnings[1]


def test_a_lidb_adapter_that_peft_saved_is_described(tmp_path):
    model = torch.nn.ModuleDict({"mid_block": torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8)})})
    config = LiDBConfig(r=2, down_dim=4, up_dim=3, target_modules=["to_q"])
    get_peft_model(model, config).save_pretrained(tmp_path)
    found = describe(tmp_path)
    assert (found.kind, found.ranks, found.layers) == ("PEFT LiDB", (2,), {"unet": 1})
    assert len(found.warnings) == 1
    assert "every layer changes nothing" in found.warnings[0]


@pytest.mark.parametrize(
    ("state", "metadata", "message"),
    [
        (
            lora(UNET) | lora(CLIP.replace("text_model_", "")),
            {},
            "without 'text_model_', which kohya, A1111 and ComfyUI",
        ),
        (lora(UNET) | lora(CLIP.replace("lora_te_", "lora_te1_")), {}, "lora_te1_ in a LoRA of SD1, which kohya drops"),
        (lora(UNET, 2048) | lora(CLIP), {"ss_base_model_version": "sdxl_base_v1-0"}, "must be lora_te1_"),
        (
            lora(UNET) | lora(UNET.replace("to_k", "to_v")) | lora(UNET.replace("to_k", "to_q"), alpha=1.0),
            {},
            f"1 layer of the unet without the alpha that most have, 2, .*diffusers.*{UNET.replace('to_k', 'to_q')}",
        ),
        (lora(UNET) | lora(UNET.replace("to_k", "to_v"), rank=4, alpha=None), {}, "the alpha that most have, 2, with"),
        (lora(UNET, alpha=None), {}, "without alpha, which is read as scale 1"),
        (lora(UNET, alpha=0.0), {}, "alpha 0 or not finite"),
        (lora(UNET, alpha=1 + 1j), {}, "alpha 0 or not finite"),
        (lora(UNET, alpha=[2.0]), {}, "alpha is not 0-d, on which kohya fails"),
        (lora(UNET, 2048), {"ss_v2": "False"}, "A1111 takes it for SD1 and hides it"),
        (lora(UNET, 1024), {"ss_base_model_version": "sd_v1"}, "layers are SD2's but its metadata says SD1"),
        (lora(UNET) | lora("lora_unet_input_blocks_4_1_proj_in"), {}, "in both diffusers' and sgm's spelling"),
        (lora(UNET, 2048) | lora(CLIP.replace("te_", "te2_", 1), 1280), {}, "without all of q, k, v and out"),
        (lora(UNET) | {f"{UNET}x.lora_up.weight": torch.ones(2, 2)}, {}, "only one of lora_A and lora_B"),
        (lora(UNET) | {"mystery": torch.ones(1)}, {}, "1 tensor of unknown meaning: mystery"),
        (lora(UNET) | {f"{UNET}.lora_up.weight": torch.zeros(8, 2)}, {}, "every layer changes nothing"),
        (lora(UNET) | {f"{UNET}.lora_up.weight": torch.full((8, 2), torch.inf)}, {}, f"NaN or infinity.*{UNET}"),
        (lora(UNET), {"sshs_model_hash": "0" * 64}, "not the hash of its tensors"),
        (lora(UNET), {"sshs_legacy_hash": "0" * 8}, "not the hash of its tensors and ss_ keys"),
        (lora(UNET), {"ss_output_name": "../../x"}, "ss_output_name is '../../x', which is no name for <lora:name:1>"),
        (lora(UNET), {"ss_output_name": "a\x1b[2J"}, "ss_output_name is"),
    ],
)
def test_what_readers_stumble_over_is_a_warning(tmp_path, state, metadata, message):
    warnings = " | ".join(described(tmp_path, state, metadata).warnings)
    assert re.search(message, warnings), warnings


def test_a_plain_lora_of_another_tool_has_no_warnings(tmp_path):
    state = lora(UNET) | lora(CLIP)
    tags = '{"1_x": {"sks": 3, "a": 4, " sks": 2}}'
    found = described(tmp_path, state, {"ss_base_model_version": "sd_v1", "ss_tag_frequency": tags})
    assert found.warnings == ()
    assert found.trigger_words == ("sks", "a")


def norms(description):
    return {name: block.norm for name, block in description.blocks.items()}


def to_name(tensor):
    return tensor.partition(".")[0]


def test_norms_are_those_of_the_blocks_updates(tmp_path, random_factors, sd1_shapes):
    factors = random_factors(sd1_shapes, up_scale=0.1)
    save_kohya(tmp_path / "a.safetensors", factors, KohyaMetadata(), torch.float32)
    found = describe(tmp_path / "a.safetensors")

    def norm(start):
        updates = [up.double() @ down.double() for name, (down, up) in factors.items() if name.startswith(start)]
        return torch.cat([update.flatten() for update in updates]).norm().item()

    assert norms(found) == pytest.approx(
        {
            "unet IN01": norm("unet.down_blocks.0"),
            "unet M00": norm("unet.mid_block"),
            "text_encoder": norm("text_encoder"),
        }
    )
    assert [layer.name for layer in found.statistics] == list(
        dict.fromkeys(map(to_name, load_file(tmp_path / "a.safetensors")))
    )
    for layer in found.statistics:
        down, up = factors[from_kohya_name(layer.name)]
        update = up.double() @ down.double()
        assert (layer.norm, layer.rms) == pytest.approx((update.norm().item(), update.square().mean().sqrt().item()))
        assert (layer.rank, layer.alpha) == (3, 3.0)
        assert layer.block in found.blocks
    block = found.blocks["unet IN01"]
    assert (block.num_layers, block.ranks) == (3, (3,))
    assert block.rms == pytest.approx(block.norm / (32 * 32 * 2 + 768 * 32) ** 0.5)


def test_alpha_scales_a_norm_and_a_kernel_counts(tmp_path):
    state = {
        "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.ones(2, 4, 3, 3),
        "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.ones(5, 2, 1, 1),
        "lora_unet_mid_block_resnets_0_conv1.alpha": torch.tensor(6.0),
    }
    # every entry of the 5 x 36 update is 6 / 2 * 2
    assert norms(described(tmp_path, state)) == pytest.approx({"unet M00": 6 * (5 * 36) ** 0.5})
    odd = lora(UNET) | {f"{UNET}.lora_up.weight": torch.ones(8, 3)}
    assert described(tmp_path, odd).blocks == {}


@pytest.mark.parametrize(
    ("metadata", "program"),
    [
        ({"ss_sd_scripts_commit_hash": "ab", "ss_network_module": "networks.lora"}, "kohya sd-scripts"),
        ({"ss_sd_scripts_commit_hash": "ab", "ss_network_module": "lycoris.kohya"}, "LyCORIS"),
        ({"lora_adapter_metadata": "{}"}, "diffusers"),
        ({}, ""),
    ],
)
def test_the_program_that_made_it_is_named_where_it_left_a_mark(tmp_path, metadata, program):
    assert described(tmp_path, lora(UNET), metadata).made_by == program


@pytest.mark.parametrize(
    "state",
    [
        lora(UNET) | lora(CLIP, alpha=1.0),
        lora(UNET) | lora(UNET.replace("to_k", "to_v"), rank=4),
        lora(UNET) | lora(UNET.replace("attn2_to_k", "ff_net_2"), rank=4, alpha=4.0),
        lora(UNET, alpha=None) | lora(UNET.replace("to_k", "to_v"), rank=4, alpha=None),
    ],
)
def test_ranks_and_alphas_that_diffusers_applies_rightly_are_no_warning(tmp_path, state):
    assert "diffusers" not in " ".join(described(tmp_path, state).warnings)


@pytest.mark.parametrize(
    ("width", "metadata", "sidecar", "hidden"),
    [
        (2048, None, None, ""),  # A1111 shows what says nothing at all
        (2048, {"format": "pt"}, None, "takes it for SD1 and hides it from SDXL"),
        (2048, {"ss_base_model_version": "sdxl_base_v1-0"}, None, ""),
        (1024, {"ss_network_dim": "2"}, None, "takes it for SD1 and hides it from SD2"),
        (1024, {"ss_v2": "True"}, None, ""),
        (768, {"ss_v2": "True"}, None, "takes it for SD2 and hides it from SD1"),
        (2048, {"format": "pt"}, "SDXL", ""),  # the user's choice counts more
        (768, None, "SDXL", "takes it for SDXL and hides it from SD1"),
    ],
)
def test_what_a1111_hides_is_what_its_metadata_and_its_user_say(tmp_path, width, metadata, sidecar, hidden):
    if sidecar:
        (tmp_path / "a.json").write_text(json.dumps({"sd version": sidecar}))
    name = UNET.replace("down_blocks_0", "down_blocks_1")
    warnings = " ".join(described(tmp_path, lora(name, width), metadata).warnings)
    assert ("A1111" in warnings) == bool(hidden)
    assert hidden in warnings


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lora(UNET) | {f"{UNET}.lora_down.weight": torch.ones(2, 768).char()}, "convert, resize, merge and project"),
        (lora("lora_unet_joint_blocks_0_x_block_attn_qkv"), "project refuse it: is a LoRA of Stable Diffusion 3"),
        (lora("transformer.transformer_blocks.0.attn.add_k_proj", 1536), "a LoRA of stable-diffusion-3, which"),
        (lora(UNET.replace("attn2", "attn1"), 320), "do not show its model family.* --family sd1 or sd2$"),
        ({f"{UNET}.lokr_w{i}": torch.ones(2, 2**i) for i in (1, 2)}, "hdb convert --rank makes one of it"),
        (lora(UNET) | {f"{UNET}.dora_scale": torch.ones(8, 1)}, "it is DoRA, .* hdb merge --into applies it"),
        ({name: tensor.double() for name, tensor in lora(UNET).items()}, "float64: hdb convert, resize and merge ask"),
        (lora(UNET, 2048), "hdb convert refuses it: down_blocks.0.attentions.0.* is not a module of SDXL's UNet"),
        (lora(UNET, 1280), "is a LoRA of stable-diffusion-xl-v1-refiner"),
    ],
)  # fmt: skip
def test_what_a_command_refuses_is_not_called_sound(tmp_path, state, message):
    assert re.search(message, " ".join(described(tmp_path, state).warnings))


def test_a_refiner_whose_metadata_say_so_is_in_no_contradiction(tmp_path):
    found = described(tmp_path, lora(UNET, 1280), {"ss_base_model_version": "sdxl_refiner_v1-0"})
    assert found.base == "stable-diffusion-xl-v1-refiner"
    assert len(found.warnings) == 1  # that the commands refuse it


def test_the_norm_is_that_of_the_update_whatever_the_algorithm(tmp_path):
    conv, generator = "lora_unet_down_blocks_0_resnets_0_conv1", torch.Generator().manual_seed(0)
    down, core, up = (torch.randn(shape, generator=generator) for shape in ((4, 8, 1, 1), (4, 4, 3, 3), (6, 4, 1, 1)))
    state = {f"{conv}.lora_down.weight": down, f"{conv}.lora_mid.weight": core, f"{conv}.lora_up.weight": up,
             f"{conv}.alpha": torch.tensor(2.0)}  # fmt: skip
    update = 2 / 4 * torch.einsum("om,mnhw,ni->oihw", up[:, :, 0, 0], core, down[:, :, 0, 0])
    assert norms(described(tmp_path, state)) == pytest.approx({"unet IN01": update.norm().item()}, rel=1e-5)
    w1, w2 = torch.randn(2, 4, generator=generator), torch.randn(3, 2, generator=generator)
    found = norms(described(tmp_path, {f"{UNET}.lokr_w1": w1, f"{UNET}.lokr_w2": w2}))
    assert found == pytest.approx({"unet IN01": torch.kron(w1, w2).norm().item()}, rel=1e-5)


def test_other_algorithms_and_other_models_are_named(tmp_path):
    state = {f"{UNET}.hada_{part}": torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    assert described(tmp_path, state).kind == "kohya LoHa"
    assert described(tmp_path, lora(UNET) | {f"{UNET}.dora_scale": torch.ones(8, 1)}).kind == "kohya DoRA"
    lumina = described(tmp_path, lora("lora_unet_layers_0_attention_qkv"), {"modelspec.architecture": "lumina-2/lora"})
    assert (lumina.kind, lumina.base, lumina.layers) == ("kohya LoRA", "lumina-2", {"unet": 1})


def test_float8_and_bfloat16_are_read(tmp_path):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in lora(UNET, alpha=None).items()}
    found = described(tmp_path, state | {f"{UNET}.alpha": torch.tensor(2.0, dtype=torch.bfloat16)})
    assert (found.dtypes, found.alphas, found.warnings) == (("bfloat16", "f8_e4m3"), (2.0,), ())


def test_the_sidecars_activation_text_comes_first(tmp_path):
    (tmp_path / "a.json").write_text('{"activation text": "sks person"}')
    found = described(tmp_path, lora(UNET), {"modelspec.trigger_phrase": "sks"})
    assert found.trigger_words == ("sks person", "sks")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model.diffusion_model.x": torch.ones(1)}, "a whole model, not an adapter"),
        ({"emb_params": torch.ones(1)}, "textual inversion"),
        ({"weight": torch.ones(1)}, "no adapter that is known here: it holds weight"),
        ({}, "holds no tensors"),
    ],
)
def test_what_is_no_adapter_is_refused_and_says_what_it_is(tmp_path, state, message):
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        describe(tmp_path / "a.safetensors")


def test_folders_and_pickles_are_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without adapter_config\.json or"):
        describe(tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is pickled and not read"):
        describe(tmp_path)
    with pytest.raises(ValueError, match="is a pickled file"):
        describe(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        describe(tmp_path / "none.safetensors")


def test_a_broken_adapter_config_is_one_sentence(tmp_path):
    save_file(
        lora("base_model.model.mid_block.to_q", down="lora_A.weight", up="lora_B.weight"),
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not valid JSON"):
        describe(tmp_path)


def test_an_sdxl_file_of_ours_has_no_warnings(tmp_path, random_factors):
    block = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
    shapes = {f"{block}.to_k": (2048, 64)}
    clip = "text_model.encoder.layers.0.self_attn"
    shapes |= {f"text_encoder_2.{clip}.{name}": (1280, 1280) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    shapes |= {f"text_encoder.{clip}.q_proj": (768, 768)}
    save_kohya(tmp_path / "a.safetensors", random_factors(shapes), KohyaMetadata(family="sdxl"))
    found = describe(tmp_path / "a.safetensors")
    assert (found.base, found.warnings) == ("SDXL", ())
    assert found.layers == {"unet": 1, "text_encoder": 1, "text_encoder_2": 4}


def test_formats_that_cannot_hold_a_lora_are_notes_with_the_reason(tmp_path):
    feed_forward = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2"
    found = described(tmp_path, lora(UNET) | lora(feed_forward))
    assert found.warnings == ()
    (note,) = found.notes
    assert note.startswith("hdb convert --to diffusers-old refuses it: layer unet.down_blocks.0")
    assert "not an attention projection" in note
    dora = lora(UNET) | lora(UNET[:-1] + "v") | {f"{UNET}.dora_scale": torch.ones(8, 1)}
    old, peft = described(tmp_path, dora).notes
    assert "diffusers-old refuses it: layer" in old
    assert re.search("--to peft refuses it: of the unet, .* is DoRA and .* is not", peft)
    assert described(tmp_path, lora(UNET)).notes == ()
    save_file(dora, tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match="is DoRA and"):
        prepare_conversion(tmp_path / "dora.safetensors", tmp_path / "out", "peft")


@pytest.mark.parametrize(
    ("width", "sides", "warned"), [(1024, 1, True), (1024, 0, False), (768, 1, False), (768, 0, True)]
)
def test_projections_that_diffusers_does_not_load_from_a_kohya_file_are_a_warning(tmp_path, width, sides, warned):
    """SD1's are convolutions; SD2's are linear layers in diffusers and convolutions in sd-scripts (run)."""
    name, ones = "lora_unet_down_blocks_0_attentions_0_proj_in", (1, 1) * sides
    projection = {f"{name}.lora_down.weight": torch.ones(2, 320, *ones), f"{name}.alpha": torch.tensor(2.0),
                  f"{name}.lora_up.weight": torch.ones(320, 2, *ones)}  # fmt: skip
    metadata = {"ss_base_model_version": "sd_v2" if width == 1024 else "sd_v1", "ss_v2": str(width == 1024)}
    found = described(tmp_path, lora(UNET, width) | projection, metadata)
    assert (
        any("which it does not load: hdb convert --to diffusers: lora_unet" in text for text in found.warnings)
        == warned
    )
    assert len(found.warnings) == warned
