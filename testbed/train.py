"""Make the miniature Stable Diffusion from scratch: ``python -m testbed.train --out runs/miniature``.

Stages: draw the corpus, train the autoencoder, cache latents, continue training the decoder, train the measuring
networks on portraits of their own, train the tokenizer, train UNet and text encoder together, pack. Each stage resumes
where it was stopped; the learning rate and the randomness of a step depend only on its number, so a resumed run equals
an uninterrupted one.
"""

import json
import shutil
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hypernet.quiet import quiet_libraries
from lidb_peft.files import atomic_path
from testbed.corpus import MAX_TOKENS, portrait, train_tokenizer
from testbed.measuring import save_measuring_network, to_pixels
from testbed.measuring_training import train_attributes, train_measuring
from testbed.trainer import Run, Trainer, fixed_initialisation, step_generator

SIZE_PX = 32
BATCH = 32
AUTOENCODER_BATCH = 16
DECODER_NOISE = 0.03  # of the latents' standard deviation
UNCONDITIONAL = 0.1  # fraction of empty captions, for classifier-free guidance


def build_autoencoder() -> AutoencoderKL:
    """Factor 4, four channels: 32 x 32 pixels are 8 x 8 x 4 latents.

    Eight norm groups, not 32: with one channel per group, normalisation removes each channel's mean, and flat colours
    with it.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE_PX,
        mid_block_add_attention=False,
    )


def build_denoiser(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Narrow versions of SD1.5's UNet and text encoder; 32 norm groups, which other programs hard-code."""
    unet = UNet2DConditionModel(
        sample_size=SIZE_PX // 4,
        block_out_channels=(64, 64, 96, 64),
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return unet, CLIPTextModel(text_config)


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def draw_corpus(run: Run, count: int) -> tuple[np.ndarray, list[str]]:
    """``count`` portraits ``(count, 32, 32, 3)`` uint8 with captions, drawn once and cached in the working folder."""
    images_file, captions_file = run.out / "images.npy", run.out / "captions.json"
    if not captions_file.exists():
        images, captions = np.empty((count, SIZE_PX, SIZE_PX, 3), np.uint8), []
        for index in range(count):
            images[index], text = portrait(index)
            captions.append(text)
        with atomic_path(images_file) as temporary, open(temporary, "wb") as file:
            np.save(file, images, allow_pickle=False)
        with atomic_path(captions_file) as temporary:
            temporary.write_text(json.dumps(captions))
    return np.load(images_file, mmap_mode="r"), json.loads(captions_file.read_text())


def psnr_db(first: Tensor, second: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(first, second)))


def _reconstruction_loss(output: Tensor, pixels: Tensor) -> Tensor:
    return F.l1_loss(output, pixels) + F.mse_loss(output, pixels)


def train_autoencoder(run: Run, images: np.ndarray, num_steps: int) -> AutoencoderKL:
    """L1 + L2 reconstruction with a very small KL term."""
    with fixed_initialisation():
        vae = build_autoencoder()

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(1, step)
        pixels = to_pixels(images[torch.randint(0, len(images), (AUTOENCODER_BATCH,), generator=generator).numpy()])
        posterior = vae.encode(pixels).latent_dist
        output = vae.decode(posterior.sample(generator)).sample
        return _reconstruction_loss(output, pixels) + 1e-6 * posterior.kl().mean()

    return Trainer("autoencoder", run, vae, num_steps, lr=2e-3).run(loss_of_step)


@torch.no_grad()
def cache_latents(run: Run, vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Latent means ``(n, 4, 8, 8)``, scaled to unit standard deviation; sets the autoencoder's scaling factor."""
    file = run.out / "latents.npy"
    if not file.exists():
        means = [vae.encode(to_pixels(images[i : i + 250])).latent_dist.mean for i in range(0, len(images), 250)]
        with atomic_path(file) as temporary, open(temporary, "wb") as handle:
            np.save(handle, torch.cat(means).numpy(), allow_pickle=False)
    latents = torch.from_numpy(np.load(file))
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    return latents * vae.config.scaling_factor


def train_decoder(run: Run, vae: AutoencoderKL, latents: Tensor, images: np.ndarray, num_steps: int) -> None:
    """Continue training the decoder on unchanged latents, on which the denoiser can be trained at the same time."""
    decoder = torch.nn.ModuleList([vae.decoder, vae.post_quant_conv])

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(3, step)
        rows = torch.randint(0, len(images), (AUTOENCODER_BATCH,), generator=generator)
        pixels = to_pixels(images[rows.numpy()])
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = latents[rows] + DECODER_NOISE * noise  # like a denoiser's errors, and larger than the posterior's own
        output = vae.decode(noisy / vae.config.scaling_factor).sample
        return 0.25 * F.l1_loss(output, pixels) + F.mse_loss(output, pixels)

    Trainer("decoder", run, decoder, num_steps, lr=1.5e-3).run(loss_of_step)


class Denoiser(torch.nn.Module):
    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


def train_denoiser(run: Run, latents: Tensor, tokens: Tensor, empty: Tensor, model: Denoiser, num_steps: int):
    """v-prediction (Salimans & Ho 2022) at timesteps spread evenly over each batch, one caption in ten empty."""
    scheduler = build_scheduler()

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(2, step)
        rows = torch.randint(0, len(latents), (BATCH,), generator=generator)
        clean, ids = latents[rows], tokens[rows].clone()
        ids[torch.rand(BATCH, generator=generator) < UNCONDITIONAL] = empty
        noise = torch.randn(clean.shape, generator=generator)
        position = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        timesteps = (position * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        prediction = model.unet(noisy, timesteps, model.text_encoder(ids)[0]).sample
        return F.mse_loss(prediction, target)

    return Trainer("denoiser", run, model, num_steps, lr=1.2e-3).run(loss_of_step)


def pack(folder: Path, vae, tokenizer, model: Denoiser, dtype: torch.dtype = torch.float16) -> None:
    """Save the pipeline in diffusers' layout, readable by transformers 4 too.

    It needs the tokenizer's two older files and the older names of the text encoder's weights: it would not find those
    without ``text_model.`` and would initialise them at random.
    """
    with quiet_libraries():
        from diffusers import StableDiffusionPipeline  # warns when it is imported

        pipeline = StableDiffusionPipeline(
            vae=vae, text_encoder=model.text_encoder, tokenizer=tokenizer, unet=model.unet, scheduler=build_scheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.to(dtype).save_pretrained(folder)
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(Path(tokenizer.name_or_path) / name, folder / "tokenizer" / name)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Working folder; resumes what it holds.")
@click.option("--portraits", default=100_000, show_default=True, help="Portraits to draw.")
@click.option("--vae-steps", default=10_000, show_default=True, help="Autoencoder steps of 16 portraits.")
@click.option("--decoder-steps", default=9_000, show_default=True, help="Steps of 16 portraits for the decoder alone.")
@click.option("--measured-people", default=25_000, show_default=True, help="Identities for the measuring network.")
@click.option("--measuring-steps", default=4_000, show_default=True, help="Measuring network steps of 128 portraits.")
@click.option("--attribute-people", default=15_000, show_default=True, help="Other ones, for the second network.")
@click.option("--attribute-steps", default=1_400, show_default=True, help="Its steps of 128 portraits.")
@click.option("--steps", default=8_000, show_default=True, help="Denoiser steps of 32 portraits.")
@click.option("--fraction", default=1.0, show_default=True, help="Stop each training here, at the whole's schedule.")
@click.option("--threads", default=2, show_default=True, help="Processor threads.")
def main(
    out: Path, portraits: int, vae_steps: int, decoder_steps: int, measured_people: int, measuring_steps: int,
    attribute_people: int, attribute_steps: int, steps: int, fraction: float, threads: int,
) -> None:  # fmt: skip
    """Make the miniature's weights from scratch, or resume a run that was stopped."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, fraction)
    images, captions = draw_corpus(run, portraits)
    vae = train_autoencoder(run, images, vae_steps)
    latents = cache_latents(run, vae, images)
    train_decoder(run, vae, latents, images, decoder_steps)
    with torch.no_grad():
        held_out = to_pixels(np.stack([portrait(i, "test")[0] for i in range(500)]))
        score = psnr_db(vae.decode(vae.encode(held_out).latent_dist.mean).sample.clamp(-1, 1), held_out)
    click.echo(f"autoencoder: {score:.2f} dB on 500 test portraits")
    network = train_measuring(run, vae, measured_people, measuring_steps)
    save_measuring_network(network, out / "measuring.safetensors")
    second = train_attributes(run, vae, attribute_people, attribute_steps)
    save_measuring_network(second, out / "attributes.safetensors")
    tokenizer = train_tokenizer(captions[:20_000], out / "tokenizer")
    with fixed_initialisation():
        model = Denoiser(*build_denoiser(tokenizer))
    tokens = tokenizer([*captions, ""], padding="max_length", max_length=MAX_TOKENS, truncation=True)["input_ids"]
    ids = torch.tensor(tokens)
    train_denoiser(run, latents, ids[:-1], ids[-1], model, steps)
    pack(out / "miniature", vae, tokenizer, model)
    click.echo(f"wrote {out / 'miniature'}, {out / 'measuring.safetensors'} and {out / 'attributes.safetensors'}")


if __name__ == "__main__":
    main()
