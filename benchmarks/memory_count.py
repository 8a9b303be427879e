"""Does it fit onto the card? ``python benchmarks/memory_count.py --family sdxl`` or ``--family flux1 --quantize nf4``

``--training 1 4`` counts a step of `hdb train` for Stable Diffusion 1.5 with that many people: its memory and its
floating-point operations, by torch's own counter, which counts a multiplication and an addition as two.

Counts, without a GPU and without weights, what personalising a full-size base allocates: models and steps run on
torch's fake tensors, which have shapes but no values, and the peak of live memory is recorded. bf16 base, float32 LoRA
of rank 4. Attention counts as flash attention, which stores no scores; overhead of CUDA, cuDNN and the allocator is not
included.

Quantised weights are counted as bitsandbytes stores them, plus the unpacked copy of a step's largest layer.
"""

import argparse
import sys
import weakref
from collections.abc import Callable

import torch
from costs import CLIP_L, SD15_UNET, VAE, table
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    ViTConfig,
)
from transformers.initialization import no_init_weights

from hypernet.base_models.base import BaseModel, Prompts, enable_checkpointing
from hypernet.base_models.flux import TOKENS as T5_TOKENS
from hypernet.base_models.flux import Flux
from hypernet.base_models.stable_diffusion import StableDiffusion
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from lidb_peft import LiDBConfig, LiDBSpace

RANK = 4
TOKENS = 77
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
          "projection_dim": 1280, "hidden_act": "gelu"}  # fmt: skip
T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
          "feed_forward_proj": "gated-gelu"}  # fmt: skip
FLUX_VAE = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
# Bytes per weight: 4 bits plus a float32 per 64 weights; 8 bits plus a float32 per row of thousands.
QUANTIZED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
VIT_H = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120,
         "image_size": 224, "patch_size": 14}  # fmt: skip
UNETS = {
    "sd1": SD15_UNET,
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    },
}  # fmt: skip


class Peak(TorchDispatchMode):
    """A context in which ``bytes`` becomes the peak of live memory, without ``models``."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.bytes = self.alive = 0
        tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.bytes = max(self.bytes, self.alive)
        return result

    def _free(self, size: int) -> None:
        self.alive -= size


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A frozen model of ``dtype``; fake tensors cannot be cast in place."""
    torch.set_default_dtype(dtype)
    try:
        return make().requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def build_vae(size_px: int, dtype: torch.dtype = torch.bfloat16, **config) -> AutoencoderKL:
    return build(lambda: AutoencoderKL(**VAE | config, sample_size=size_px), dtype)


def build_base(family: str) -> BaseModel:
    """A base of a family at full size, without tokenizers and scheduler, and of FLUX.1 without T5."""
    return build_flux() if family == "flux1" else build_stable_diffusion(family)


def build_flux() -> Flux:
    """FLUX.1-dev, whose widths are the class's own."""
    return Flux(
        name="flux1", vae=build_vae(1024, **FLUX_VAE), scheduler=None,
        transformer=build(lambda: FluxTransformer2DModel(guidance_embeds=True)),
        text_encoder=build(lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L))), tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, compute_dtype=torch.bfloat16,
    )  # fmt: skip


def build_stable_diffusion(family: str) -> StableDiffusion:
    unet = build(lambda: UNet2DConditionModel(**UNETS[family]))
    first = build(lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)))
    second = build(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G))) if family == "sdxl" else None
    base = StableDiffusion(
        name=family, vae=build_vae(8 * unet.config.sample_size), scheduler=None, unet=unet, text_encoder=first,
        tokenizer=None, text_encoder_2=second,
    )  # fmt: skip
    base.time_ids = torch.zeros(6, dtype=base.dtype)  # its own would need real tensors
    return base


def count_reading() -> int:
    """Bytes that encoding a prompt with T5 takes, itself included; FLUX.1's transformer is not loaded then."""
    t5 = build(lambda: T5EncoderModel(T5Config(**T5_XXL)))
    with Peak(t5) as peak, torch.no_grad():
        t5(torch.ones(1, T5_TOKENS[True], dtype=torch.long))
    return peak.bytes + model_bytes(t5)


def count_encoding(base: BaseModel) -> int:
    """Bytes that encoding a photo takes on top of denoiser and text encoders, the float32 VAE included."""
    vae = build(lambda: AutoencoderKL.from_config(base.vae.config), torch.float32)
    with Peak(vae) as peak, torch.no_grad():
        vae.encode(torch.zeros(1, 3, base.size_px, base.size_px))
    return peak.bytes + model_bytes(vae)


def count_drawing(base: BaseModel) -> int:
    """Bytes that decoding a picture takes on top of denoiser and text encoders, the VAE included."""
    with Peak(base.vae) as peak, torch.no_grad():
        base.vae.decode(torch.zeros(1, *base.latent_shape, dtype=base.dtype))
    return peak.bytes + model_bytes(base.vae)


def count_step(base: BaseModel, latents: int, checkpointing: bool) -> int:
    """Bytes that a finetuning step takes on top of denoiser and text encoders, with a prompt for each noisy latent."""
    space = LiDBSpace(base.adapted, LiDBConfig())
    values = torch.zeros_like(space.init_lora(RANK, torch.Generator()))[None].requires_grad_()
    prompts = fake_prompts(base, latents)
    with Peak(*weighed(base)) as peak, base.checkpointed(checkpointing):
        optimizer = torch.optim.AdamW([values])
        with space.apply(space.split_lora(values, RANK)):
            noisy, timesteps = torch.zeros(latents, *base.latent_shape), torch.zeros(latents, dtype=torch.long)
            loss = base.denoise(noisy, timesteps, base.encode_prompts(prompts)).square().mean()
        loss.backward()
        optimizer.step()
    return peak.bytes + values.untyped_storage().nbytes()


def hypernetwork_config(train_encoder: bool) -> HyperNetworkConfig:
    """Stable Diffusion 1.5's default hypernetwork: a ViT-H/14 at 224 px, a decoder of 2 layers and width 1024, k = 4.

    Built from models without weights; the record of the bases needs real tensors.
    """
    with torch.device("meta"):
        models = {"unet": UNet2DConditionModel(**SD15_UNET), "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L))}
    space = LiDBSpace(models, LiDBConfig())
    return HyperNetworkConfig.for_space(space, ViTConfig(**VIT_H), "counted", train_encoder=train_encoder)


def count_training(base: BaseModel, config: HyperNetworkConfig, people: int, checkpointing: bool) -> dict[str, float]:
    """GB on the GPU and TFLOP of a step of `hdb train` with ``people``, for the denoising loss."""
    space = LiDBSpace(base.adapted, LiDBConfig())
    with no_init_weights():  # which needs values
        network = HyperNetwork(config).train()
    if checkpointing:
        enable_checkpointing(network)
    parameters = [each for each in network.parameters() if each.requires_grad]
    prompts, pixels = fake_prompts(base, people), torch.zeros(people, 3, base.size_px, base.size_px)

    def step() -> None:
        with base.checkpointed(checkpointing):
            theta = network(pixels)
            with space.apply(space.expand(theta, network.bases)):
                noisy, timesteps = torch.zeros(people, *base.latent_shape), torch.zeros(people, dtype=torch.long)
                loss = base.denoise(noisy, timesteps, base.encode_prompts(prompts)).square().mean()
            loss.backward()

    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):  # others are counted on CUDA only
        step()
    for each in parameters:
        each.grad = None
    models = [*weighed(base), network]
    with Peak(*models) as peak:
        optimizer = torch.optim.AdamW(parameters)
        step()
        optimizer.step()
    held = model_bytes(*models)
    return {"trained, million": sum(each.numel() for each in parameters) / 1e6, "weights, GB": held / 1e9,
            "at most, GB": (held + peak.bytes) / 1e9, "TFLOP": flops.get_total_flops() / 1e12}  # fmt: skip


def count_passes(base: BaseModel) -> dict[str, float]:
    """TFLOP of one noisy latent's passes through the base; preservation and pre-optimisation are multiples of it."""
    prompts, noisy = fake_prompts(base, 1), torch.zeros(1, *base.latent_shape)
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        base.denoise(noisy, torch.zeros(1, dtype=torch.long), base.encode_prompts(prompts))
    return {"a forward pass of the base, TFLOP": flops.get_total_flops() / 1e12}


def fake_prompts(base: BaseModel, count: int) -> Prompts:
    if isinstance(base, Flux):
        embeds = torch.zeros(count, T5_TOKENS[True], T5_XXL["d_model"], dtype=base.dtype)
        return Prompts(torch.ones(count, 1, TOKENS, dtype=torch.long), embeds)
    return Prompts(torch.ones(count, len(base.text_encoders), TOKENS, dtype=torch.long))


def weighed(base: BaseModel) -> list[nn.Module]:
    """The models on the GPU while fitting."""
    return [base.denoiser, *(getattr(base, name) for name in ("text_encoder", "text_encoder_2")
                             if getattr(base, name) is not None)]  # fmt: skip


def quantized_bytes(denoiser: nn.Module, kind: str) -> int:
    """Bytes of a transformer whose blocks' linear layers are quantised, and of its largest layer in bf16."""
    blocks = [child for child in denoiser.children() if isinstance(child, nn.ModuleList)]
    weights = [m.weight for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    rest = model_bytes(denoiser) - sum(weight.nbytes for weight in weights)
    return round(rest + QUANTIZED[kind] * sum(w.numel() for w in weights) + max(w.nbytes for w in weights))


def model_bytes(*models: nn.Module) -> int:
    return sum(parameter.nbytes for model in models for parameter in model.parameters())


def print_training(people: list[int], train_encoder: bool) -> None:
    config, rows = hypernetwork_config(train_encoder), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = build_base("sd1")
        for count in people:
            for checkpointing in (False, True):
                name = f"{count} people{', gradient checkpointing' * checkpointing}"
                rows.append({"": name, **count_training(base, config, count, checkpointing)})
                print(rows[-1], file=sys.stderr, flush=True)  # each takes minutes
        passes = count_passes(base)
    print(f"a step of hdb train on {base.name} at {base.size_px} px; {passes}")
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", choices=[*UNETS, "flux1"], default="sdxl")
    parser.add_argument("--quantize", choices=list(QUANTIZED), help="the transformer's blocks")
    parser.add_argument("--training", type=int, nargs="+", metavar="PEOPLE", help="count hdb train's step instead")
    parser.add_argument("--train-encoder", action="store_true", help="with --training: the ViT-H is trained along")
    parser.add_argument("--latents", type=int, nargs="+", default=[1, 2], help="noisy latents in a step")
    options = parser.parse_args()
    if options.training:
        print_training(options.training, options.train_encoder)
        return
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = build_base(options.family)
        denoiser, *text_encoders = weighed(base)
        in_bits = model_bytes(denoiser) if options.quantize is None else quantized_bytes(denoiser, options.quantize)
        weights = in_bits + model_bytes(*text_encoders)
        reading = count_reading() if isinstance(base, Flux) else 0
        rows = {"encode a photo": count_encoding(base), "decode a picture": count_drawing(base)}
        for latents in options.latents:
            for checkpointing in (False, True):
                name = f"a step of {latents} noisy latents{', gradient checkpointing' * checkpointing}"
                rows[name] = count_step(base, latents, checkpointing)
    print(f"{options.family} at {base.size_px} px, GB; denoiser and text encoders {weights / 1e9:.2f}")
    print(f"T5, which reads prompts alone, {reading / 1e9:.2f}\n" if reading else "")
    print(
        table(
            [{"": name, "beside them": size / 1e9, "together": (weights + size) / 1e9} for name, size in rows.items()]
        )
    )


if __name__ == "__main__":
    main()
