import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from converters.arithmetic.checkpoint import extract, find_weights, merge_into
from converters.arithmetic.ranks import RankRule
from converters.key_maps import from_checkpoint_name
from converters.layer import LoraLayer
from converters.lora import Lora
from lidb_peft.families import FAMILIES

BLOCK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"
Q, K, PROJ = "attn1.to_q", "attn2.to_k", "proj_in"
OURS = "unet.down_blocks.0.attentions.0"
CLIP = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
OPENCLIP = "text_encoder_2.text_model.encoder.layers.0.self_attn"
SDXL = {
    "cross_attention_dim": 2048, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 2, 3), "attention_head_dim": (2, 4, 4), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48,
}  # fmt: skip


def random_tensors(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def tensors():
    """A single-file checkpoint's tensors: UNet, both kinds of text encoder, and what no LoRA touches."""
    return random_tensors(
        **{
            f"{BLOCK}.{Q}.weight": (12, 12),
            f"{BLOCK}.{K}.weight": (12, 768),
            "model.diffusion_model.input_blocks.1.1.proj_in.weight": (12, 12, 1, 1),
            "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (12, 4, 3, 3),
            "model.diffusion_model.input_blocks.1.1.norm.weight": (12,),
            "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (6, 6),
            "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (24, 8),
            "first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3),
        }
    )


@pytest.fixture
def checkpoint(tensors, tmp_path):
    path = tmp_path / "base.safetensors"
    save_file(tensors, path, {"format": "pt", "modelspec.hash_sha256": "0x12"})
    return path


def random_lora(shapes, rank=2, scale=0.5):
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name, (out, *inner) in shapes.items():
        down = torch.randn(rank, *inner, generator=generator)
        up = torch.randn(out, rank, *(1 for _ in inner[1:]), generator=generator)
        layers[name] = LoraLayer(down, up, scale * rank)
    return Lora(layers, "sdxl")


SHAPES = {
    f"{OURS}.transformer_blocks.0.{Q}": (12, 12),
    f"{OURS}.{PROJ}": (12, 12, 1, 1),
    "unet.down_blocks.0.resnets.0.conv1": (12, 4, 3, 3),
    CLIP: (6, 6),
    f"{OPENCLIP}.k_proj": (8, 8),
}


def update(layer):
    return layer.scale * (layer.lora_B.flatten(1) @ layer.lora_A.flatten(1))


def test_a_lora_is_added_to_its_weights_and_all_else_keeps_its_bits(checkpoint, tensors, tmp_path):
    lora = random_lora(SHAPES)
    merge_into(checkpoint, lora, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    for layer, name in [
        (f"{OURS}.transformer_blocks.0.{Q}", f"{BLOCK}.{Q}.weight"),
        (f"{OURS}.{PROJ}", "model.diffusion_model.input_blocks.1.1.proj_in.weight"),
        ("unet.down_blocks.0.resnets.0.conv1", "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"),
        (CLIP, "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"),
    ]:
        expected[name] += update(lora.layers[layer]).view(expected[name].shape)
    fused = expected["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"]
    fused[8:16] += update(lora.layers[f"{OPENCLIP}.k_proj"])
    assert merged.keys() == tensors.keys()
    changed = {name for name in tensors if not torch.equal(merged[name], tensors[name])}
    assert len(changed) == 5
    assert all(torch.allclose(merged[name], expected[name], atol=1e-5) for name in changed)
    assert torch.equal(merged[next(name for name in changed if "in_proj" in name)][:8], fused[:8])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_checkpoint_keeps_its_dtype_and_is_rounded_once(tensors, tmp_path, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(stored, tmp_path / "base.safetensors")
    lora = random_lora({CLIP: (6, 6)})
    merge_into(tmp_path / "base.safetensors", lora, tmp_path / "out.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    found = load_file(tmp_path / "out.safetensors")[name]
    assert torch.equal(found.float(), (stored[name].float() + update(lora.layers[CLIP])).to(dtype).float())


def test_dora_is_merged_as_its_paper_says(checkpoint, tensors, tmp_path):
    plain, magnitude = random_lora({CLIP: (6, 6)}).layers[CLIP], torch.rand(6) + 0.5
    merge_into(
        checkpoint, Lora({CLIP: LoraLayer(*plain.tensors(), plain.alpha, magnitude)}), tmp_path / "out.safetensors"
    )
    name = next(name for name in tensors if "q_proj" in name)
    direction = tensors[name] + update(plain)
    expected = torch.diag(magnitude) @ torch.nn.functional.normalize(direction, dim=1)
    assert torch.allclose(load_file(tmp_path / "out.safetensors")[name], expected, atol=1e-5)


@pytest.mark.parametrize("layer", [CLIP, "unet.down_blocks.0.resnets.0.conv1"])
def test_dora_by_inputs_is_merged_as_lycoris_has_it(checkpoint, tensors, tmp_path, layer):
    """LyCORIS without wd_on_out: the norm of everything that reads an input, over outputs and kernel."""
    name = {CLIP: "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"}.get(
        layer, "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    )
    out, width, *kernel = tensors[name].shape
    plain = LoraLayer(torch.randn(2, width, *kernel), torch.randn(out, 2, *(1 for _ in kernel)), 3.0)
    magnitude = torch.rand(1, width) + 0.5
    merge_into(
        checkpoint, Lora({layer: LoraLayer(*plain.tensors(), plain.alpha, magnitude)}), tmp_path / "out.safetensors"
    )
    direction = tensors[name] + update(plain).view(tensors[name].shape)
    norms = direction.transpose(0, 1).reshape(width, -1).norm(dim=1)
    shape = (1, width, *(1 for _ in kernel))
    expected = magnitude.view(shape) * direction / norms.view(shape)
    assert torch.allclose(load_file(tmp_path / "out.safetensors")[name], expected, atol=1e-5)


def test_a_folder_becomes_a_folder_whose_other_files_are_copied(tmp_path):
    folder = tmp_path / "base"
    for part in ("unet", "text_encoder", "vae"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
    layer = "encoder.layers.0.self_attn.q_proj.weight"  # transformers 5 leaves text_model. out
    save_file(random_tensors(**{layer: (6, 6)}), folder / "text_encoder/model.safetensors")
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    save_file(random_tensors(**{path: (12, 12)}), folder / "unet/a-00001-of-00002.safetensors")
    save_file(random_tensors(**{"conv_in.weight": (4, 4, 3, 3)}), folder / "unet/a-00002-of-00002.safetensors")
    lora = random_lora({f"{OURS}.transformer_blocks.0.{Q}": (12, 12), CLIP: (6, 6)})
    merge_into(folder, lora, tmp_path / "out")
    assert {str(file.relative_to(folder)) for file in folder.rglob("*")} == {
        str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*")
    }
    found = load_file(tmp_path / "out/text_encoder/model.safetensors")[layer]
    before = load_file(folder / "text_encoder/model.safetensors")[layer]
    assert torch.allclose(found, before + update(lora.layers[CLIP]), atol=1e-5)
    with pytest.raises(FileExistsError, match="name a new folder"):
        merge_into(folder, lora, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_what_was_merged_is_extracted(checkpoint, tmp_path):
    lora = random_lora({name: shape for name, shape in SHAPES.items() if "conv1" not in name})
    merge_into(checkpoint, lora, tmp_path / "tuned.safetensors")
    found = extract(tmp_path / "tuned.safetensors", checkpoint, rank=2, dtype=torch.float32)
    assert found.lora.layers.keys() == lora.layers.keys()
    assert (found.lora.family, found.left_out) == ("sd1", ())
    for name, layer in lora.layers.items():
        assert (update(found.lora.layers[name]) - update(layer)).norm() < 1e-5 * update(layer).norm()
        assert found.errors[name] < 1e-5


@pytest.mark.parametrize("shape", [(12, 768), (12, 12)])
def test_an_extracted_layer_is_the_nearest_of_its_rank(tensors, tmp_path, shape):
    name = f"{BLOCK}.{K if shape[1] == 768 else Q}.weight"
    difference = 0.01 * random_tensors(x=shape)["x"]
    tuned = tensors | {name: tensors[name] + difference}
    save_file(tensors, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    found = extract(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", rank=3, dtype=torch.float32)
    (layer,) = found.lora.layers.values()
    left, singular, right = torch.linalg.svd((tuned[name] - tensors[name]).double(), full_matrices=False)
    expected = left[:, :3] * singular[:3] @ right[:3]
    assert (update(layer) - expected).norm() < 1e-5 * expected.norm()
    assert list(found.errors.values()) == pytest.approx([(singular[3:].norm() / singular.norm()).item()], rel=1e-6)


def test_what_differs_and_is_not_extracted_is_listed(checkpoint, tensors, tmp_path):
    tuned = {name: tensor + 0.1 for name, tensor in tensors.items() if "resblocks" not in name}
    save_file(tuned, tmp_path / "tuned.safetensors")
    found = extract(tmp_path / "tuned.safetensors", checkpoint, rank=1)
    assert {*found.left_out, *found.in_one_model} == {
        "unet.down_blocks.0.resnets.0.conv1",
        f"{OURS}.norm",
        *(f"{OPENCLIP}.{part}_proj" for part in "qkv"),
    }


@pytest.mark.parametrize(("config", "family"), [({"cross_attention_dim": 768}, "sd1"), (SDXL, "sdxl")])
def test_unet_names_are_those_of_diffusers_own_converter(config, family):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    names = [name for name in unet.state_dict() if name.endswith(".weight")]
    stored = {}
    for number, name in enumerate(names):
        ours, sgm = next(
            (ours, sgm) for ours, sgm in FAMILIES[family].denoiser.originals if name.startswith(ours + ".")
        )
        stored[f"model.diffusion_model.{sgm}{name.removeprefix(ours)}"] = torch.tensor(number)
    bias = {name.removesuffix("weight") + "bias": tensor for name, tensor in stored.items()}
    converted = convert_ldm_unet_checkpoint(stored | bias, unet.config)
    theirs = {int(number): name for name, number in converted.items() if name.endswith(".weight")}
    assert len(theirs) == len(names)
    for name, number in stored.items():
        assert from_checkpoint_name(name) == ("unet." + theirs[int(number)].removesuffix(".weight"),)


def test_openclip_names_are_those_of_diffusers_own_converter(tmp_path):
    config = CLIPTextConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPTextModelWithProjection(config)
    prefix = "conditioner.embedders.1.model."
    parts = {"attn.in_proj_weight": (24, 8), "attn.in_proj_bias": (24,), "attn.out_proj.weight": (8, 8),
             "mlp.c_fc.weight": (12, 8), "mlp.c_proj.weight": (8, 12)}  # fmt: skip
    shapes = {f"{prefix}transformer.resblocks.{i}.{part}": shape for i in range(2) for part, shape in parts.items()}
    stored = random_tensors(**shapes, **{f"{prefix}text_projection": (8, 8)})
    converted = convert_open_clip_checkpoint(model, stored, prefix=prefix)
    theirs = {
        f"text_encoder_2.text_model.{name[name.index('encoder.layers') :].removesuffix('.weight')}": tensor
        for name, tensor in converted.items()
        if name.endswith(".weight") and "encoder.layers" in name
    }
    theirs["text_encoder_2.text_projection"] = converted["text_projection.weight"]
    save_file(stored | random_tensors(**{f"{BLOCK}.{Q}.weight": (2, 2)}), tmp_path / "a.safetensors")
    ours = {name: weight for name, weight in find_weights(tmp_path / "a.safetensors").items() if "text" in name}
    assert ours.keys() == theirs.keys()
    assert len(ours) == 13
    assert all(torch.equal(ours[name].load(), theirs[name]) for name in ours)


def test_the_projection_of_sdxls_second_encoder_is_merged_as_each_layout_keeps_it(tmp_path):
    projection, block = torch.randn(8, 8), f"{BLOCK}.{Q}.weight"
    layer = LoraLayer(torch.randn(2, 8), torch.randn(8, 2), 1.0)
    lora = Lora({"text_encoder_2.text_projection": layer}, "sdxl")
    # OpenCLIP multiplies by the matrix from the right, transformers keeps a linear layer's weight.
    stored = {"conditioner.embedders.1.model.text_projection": projection.T.contiguous()}
    save_file(stored | random_tensors(**{block: (2, 2)}), tmp_path / "a.safetensors")
    merge_into(tmp_path / "a.safetensors", lora, tmp_path / "b.safetensors")
    found = load_file(tmp_path / "b.safetensors")["conditioner.embedders.1.model.text_projection"]
    assert torch.allclose(found.T, projection + update(layer), atol=1e-5)
    for component in ("unet", "text_encoder_2"):
        (tmp_path / "model" / component).mkdir(parents=True)
    save_file(random_tensors(**{"conv_in.weight": (2, 2, 3, 3)}), tmp_path / "model/unet/a.safetensors")
    save_file({"text_projection.weight": projection}, tmp_path / "model/text_encoder_2/a.safetensors")
    merge_into(tmp_path / "model", lora, tmp_path / "out")
    found = load_file(tmp_path / "out/text_encoder_2/a.safetensors")["text_projection.weight"]
    assert torch.allclose(found, projection + update(layer), atol=1e-5)


def test_what_does_not_fit_is_refused(checkpoint, tensors, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"lacks 1 of the LoRA.s 1 layers, e\.g\. unet\.mid_block\.x"):
        merge_into(checkpoint, random_lora({"unet.mid_block.x": (2, 2)}), out)
    with pytest.raises(ValueError, match=r"maps 5 to 6, but its weight has shape \(6, 6\)"):
        merge_into(checkpoint, random_lora({CLIP: (6, 5)}), out)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        merge_into(tmp_path / "half.safetensors", random_lora({CLIP: (6, 6)}, scale=1e6), out)
    with pytest.raises(ValueError, match="do not differ"):
        extract(checkpoint, checkpoint, rank=2)
    with pytest.raises(ValueError, match="rank is 0"):
        extract(checkpoint, checkpoint, rank=0)
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="holds no UNet"):
        merge_into(tmp_path / "lora.safetensors", random_lora({CLIP: (6, 6)}), out)
    assert not out.exists()


def test_a_folder_with_two_copies_of_a_layer_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    for name in ("a.safetensors", "a.fp16.safetensors"):
        save_file({"conv_in.weight": torch.ones(1, 1)}, tmp_path / "unet" / name)
    with pytest.raises(ValueError, match=r"holds unet.conv_in twice, in a.fp16.safetensors and a.safetensors"):
        find_weights(tmp_path)


TOKENS = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"


def save_pair(tmp_path, base, tuned):
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors", tmp_path / "base.safetensors"


def test_an_inpainting_model_or_one_with_added_tokens_gives_its_attention_and_lists_the_rest(tensors, tmp_path):
    conv_in = "model.diffusion_model.input_blocks.0.0.weight"
    base = tensors | random_tensors(**{conv_in: (12, 4, 3, 3), TOKENS: (20, 6)})
    tuned = tensors | random_tensors(**{conv_in: (12, 9, 3, 3), TOKENS: (23, 6)})
    tuned[f"{BLOCK}.{Q}.weight"] = tensors[f"{BLOCK}.{Q}.weight"] + 0.1
    found = extract(*save_pair(tmp_path, base, tuned), rank=4)
    assert list(found.lora.layers) == [f"{OURS}.transformer_blocks.0.{Q}"]
    assert set(found.left_out) == {"unet.conv_in", "text_encoder.text_model.embeddings.token_embedding"}


@pytest.mark.parametrize("side", ["tuned", "base", "both, widened again"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_alone_is_no_difference(tensors, tmp_path, dtype, side):
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    rounded = {name: tensor.float() for name, tensor in rounded.items()} if "widened" in side else rounded
    changed = f"{BLOCK}.{Q}.weight"
    base, tuned = (dict(tensors), dict(rounded)) if side != "base" else (rounded, dict(tensors))
    tuned[changed] = (tuned[changed].float() * 1.1).to(tuned[changed].dtype)
    found = extract(*save_pair(tmp_path, base, tuned), rank=2)
    assert list(found.lora.layers) == [f"{OURS}.transformer_blocks.0.{Q}"]
    assert CLIP in found.rounded
    with pytest.raises(ValueError, match="do not differ by more than the rounding of 7 layers"):
        extract(*save_pair(tmp_path, dict(tensors), rounded), rank=2)


def test_convolutions_are_extracted_with_a_rank_of_their_own(tensors, tmp_path):
    tuned = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in tensors.items()}
    found = extract(*save_pair(tmp_path, tensors, tuned), RankRule(4, conv_rank=2), torch.float32)
    ranks = {name: layer.rank for name, layer in found.lora.layers.items()}
    conv = "unet.down_blocks.0.resnets.0.conv1"
    assert ranks == dict.fromkeys(set(ranks) - {conv}, 4) | {conv: 2}
    assert len({layer.alpha for layer in found.lora.layers.values()}) == 1
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    left, singular, right = torch.linalg.svd((tuned[name] - tensors[name]).double().flatten(1), full_matrices=False)
    expected = left[:, :2] * singular[:2] @ right[:2]
    assert (update(found.lora.layers[conv]) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", ["ComfyUI's file", "diffusers' file", "diffusers' folder"])
def test_a_unet_alone_is_a_model_too(tmp_path, kind):
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    name = path if kind != "ComfyUI's file" else f"diffusion_model.input_blocks.1.1.transformer_blocks.0.{K}.weight"
    base = random_tensors(**{name: (12, 768)})
    file, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    if kind == "diffusers' folder":
        file, out = tmp_path / "unet", tmp_path / "out"
        file.mkdir()
    save_file(base, file / "diffusion_pytorch_model.safetensors" if file.is_dir() else file)
    lora = Lora(random_lora({f"{OURS}.transformer_blocks.0.{K}": (12, 768)}).layers, "sd1")
    merge_into(file, lora, out)
    found = extract(out, file, rank=2, dtype=torch.float32)
    (layer,), (expected,) = found.lora.layers.values(), lora.layers.values()
    assert (update(layer) - update(expected)).norm() < 1e-5 * update(expected).norm()
    assert found.lora.family == "sd1"
    with pytest.raises(ValueError, match="holds no text_encoder, which 1 layer of the LoRA change; take a whole model"):
        merge_into(
            file, random_lora({CLIP: (6, 6)}), tmp_path / "other.safetensors" if file.is_file() else tmp_path / "o"
        )
