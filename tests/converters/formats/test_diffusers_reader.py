"""diffusers as a real reader of our files, on a tiny pipeline with a text encoder."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from converters.formats.kohya import kohya_tensors, save_kohya
from converters.layer import LoraLayer
from converters.lora import Lora, with_shared_alphas
from converters.metadata import KohyaMetadata
from lidb_peft.files import write_safetensors


def tiny_tokenizer(folder):
    words = ["<|startoftext|>", "<|endoftext|>", "a", "c", "e", "f", "a</w>", "e</w>", "fa", "fac", "face</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nf a\nfa c\nfac e</w>\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=8)


@pytest.fixture
def pipeline(tmp_path_factory):
    """A Stable Diffusion 1 of 32 channels with SD1.5's block structure, so with all its attention names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 32, 32, 32), cross_attention_dim=32, attention_head_dim=2
        )
        clip = CLIPTextConfig(
            hidden_size=32, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4, vocab_size=64,
            max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        text_encoder = CLIPTextModel(clip).eval()
        vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def layers_of(attentions):
    return lambda pipe: attentions({"unet": pipe.unet, "text_encoder": pipe.text_encoder})


def shapes_of(layers):
    return {name: (module.in_features, module.out_features) for name, module in layers.items()}


def embed(pipe, prompt):
    tokens = pipe.tokenizer(prompt, padding="max_length", truncation=True, max_length=8, return_tensors="pt")
    return pipe.text_encoder(tokens.input_ids)[0]


@torch.no_grad()
def test_diffusers_loads_every_modules_delta_of_unet_and_text_encoder(tmp_path, pipeline, layers_of, random_factors):
    layers = layers_of(pipeline)
    shapes = shapes_of(layers)
    assert len(shapes) == 128 + 3 * 4
    factors = random_factors(shapes, rank=3, down_scale=0.5, up_scale=0.05)
    save_kohya(tmp_path / "a.safetensors", factors, KohyaMetadata(), torch.float32)
    plain = {layer: layers[layer].weight.clone() for layer in factors}
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
    loaded_layers = layers_of(pipeline)
    for layer, (lora_A, lora_B) in factors.items():
        module = loaded_layers[layer]
        expected = lora_B @ lora_A
        error = torch.linalg.norm(module.get_delta_weight("a") - expected) / torch.linalg.norm(expected)
        assert error < 1e-6, layer

    latents, timestep = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16), torch.tensor([500])
    with_lora = embed(pipeline, "a face")
    loaded = pipeline.unet(latents, timestep, with_lora).sample
    pipeline.unload_lora_weights()
    base = pipeline.unet(latents, timestep, embed(pipeline, "a face")).sample
    for layer, (lora_A, lora_B) in factors.items():
        layers[layer].weight.copy_(plain[layer] + lora_B @ lora_A)
    merged = pipeline.unet(latents, timestep, embed(pipeline, "a face")).sample
    torch.testing.assert_close(embed(pipeline, "a face"), with_lora, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded, merged, rtol=1e-4, atol=1e-5)
    assert torch.linalg.norm(merged - base) > 100 * torch.linalg.norm(merged - loaded)


@torch.no_grad()
def test_diffusers_loads_a_float16_file_within_rounding(tmp_path, pipeline, layers_of, random_factors):
    factors = random_factors(shapes_of(layers_of(pipeline)), rank=2)
    save_kohya(tmp_path / "a.safetensors", factors, KohyaMetadata())
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    layers = layers_of(pipeline)
    for layer, (lora_A, lora_B) in factors.items():
        expected = lora_B @ lora_A
        error = torch.linalg.norm(layers[layer].get_delta_weight("a") - expected)
        assert error < 2**-10 * torch.linalg.norm(expected), layer


@torch.no_grad()
def test_diffusers_applies_ranks_of_their_own_with_the_alphas_that_we_write(tmp_path, pipeline, layers_of):
    """Attentions with ranks 2 to 5 and alphas of their own, and a convolution with others."""
    generator, layers = torch.Generator().manual_seed(0), {}
    modules = layers_of(pipeline) | {
        "unet.down_blocks.0.resnets.0.conv1": pipeline.unet.down_blocks[0].resnets[0].conv1
    }
    for index, (name, module) in enumerate(modules.items()):
        shape, rank = module.weight.shape, 2 + index % 4
        lora_B = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
        layers[name] = LoraLayer(torch.randn(rank, *shape[1:], generator=generator), lora_B, float(1 + index % 3))
    lora, _ = with_shared_alphas(Lora(layers, "sd1"))
    write_safetensors(tmp_path / "a.safetensors", kohya_tensors(lora, "sd1"), {})
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="a")
    found = layers_of(pipeline) | {"unet.down_blocks.0.resnets.0.conv1": pipeline.unet.down_blocks[0].resnets[0].conv1}
    for name, layer in layers.items():
        expected = layer.scale * (layer.lora_B.flatten(1) @ layer.lora_A.flatten(1))
        error = torch.linalg.norm(found[name].get_delta_weight("a").flatten(1) - expected)
        assert error < 1e-5 * torch.linalg.norm(expected), name
