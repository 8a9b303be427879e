"""Make the miniature Stable Diffusion from nothing: ``python -m testbed.train --out runs/miniature``.

Stages: draw the corpus, train the autoencoder, cache latents, train the decoder on, train the tokenizer, train UNet and
text encoder together, pack. Every stage resumes where it was stopped; the learning rate follows the step, not the
clock, and the randomness of a step is keyed by its number, so that a resumed run equals an unbroken one.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lidb_peft.files import atomic_path
from testbed.corpus import MAX_TOKENS, portrait, train_tokenizer

SIZE_PX = 32
BATCH = 64
AUTOENCODER_BATCH = 16
EMA_DECAY = 0.9995
DECODER_NOISE = 0.03  # of the latents' standard deviation
UNCONDITIONAL = 0.1  # share of empty captions, for classifier-free guidance


def build_autoencoder() -> AutoencoderKL:
    """Factor 4, four channels: 32 x 32 pixels are 8 x 8 x 4 latents.

    Eight norm groups, not 32: with one channel a group, normalising removes every channel's mean, and flat colours
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
    """SD1.5's UNet and text encoder by name and block structure, narrow; 32 norm groups, as other readers fix them."""
    unet = UNet2DConditionModel(
        sample_size=SIZE_PX // 4,
        block_out_channels=(64, 64, 96, 96),
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


def draw_corpus(out: Path, count: int) -> tuple[np.ndarray, list[str]]:
    """``count`` portraits ``(count, 32, 32, 3)`` uint8 with captions, drawn once and kept under ``out``."""
    images_file, captions_file = out / "images.npy", out / "captions.json"
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


class Trainer:
    """A step-numbered training loop: optimiser, linear warm-up and decay, EMA weights, whole checkpoints, a log."""

    def __init__(self, name: str, out: Path, modules: torch.nn.Module, num_steps: int, lr: float):
        self.name, self.file, self.log = name, out / f"{name}.pt", out / f"{name}.jsonl"
        self.modules, self.num_steps, self.lr, self.step = modules, num_steps, lr, 0
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
        self.ema = {name: value.detach().clone() for name, value in modules.state_dict().items()}
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step = state["ema"], state["step"]

    def run(self, loss_of_step, save_every_s: float = 120.0) -> torch.nn.Module:
        """Train to ``num_steps`` with ``loss_of_step(step)``; returns the modules with EMA weights loaded."""
        last_save, started, first, running = time.monotonic(), time.monotonic(), self.step, 0.0
        while self.step < self.num_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, (self.step + 1) / 100) * (1 - self.step / self.num_steps) ** 0.8
            loss = loss_of_step(self.step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self._update_ema()
            running += loss.item()
            if self.step % 100 == 0:
                rate = (self.step - first) / (time.monotonic() - started)
                line = {"step": self.step, "loss": round(running / 100, 5), "steps_per_s": round(rate, 3)}
                left = (self.num_steps - self.step) / rate / 60
                click.echo(f"{self.name} {line} {left:.0f} min left", err=True)
                with open(self.log, "a") as file:
                    file.write(json.dumps(line) + "\n")
                running = 0.0
            if time.monotonic() - last_save > save_every_s or self.step == self.num_steps:
                self.save()
                last_save = time.monotonic()
        self.modules.load_state_dict(self.ema)
        return self.modules

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        for name, value in self.modules.state_dict().items():
            if value.is_floating_point():
                self.ema[name].lerp_(value, 1 - decay)

    def save(self) -> None:
        state = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema}
        with atomic_path(self.file) as temporary:
            torch.save({**state, "step": self.step}, temporary)


def _generator(stage: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((stage << 40) + step)


@contextmanager
def _fixed_initialisation() -> Iterator[None]:
    """Module constructors draw from torch's global generator: seed it here, and give its state back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _pixels(images: np.ndarray) -> Tensor:
    """uint8 ``(n, h, w, 3)`` -> float ``(n, 3, h, w)`` in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr_db(first: Tensor, second: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(first, second)))


def _reconstruction_loss(output: Tensor, pixels: Tensor) -> Tensor:
    return F.l1_loss(output, pixels) + F.mse_loss(output, pixels)


def train_autoencoder(out: Path, images: np.ndarray, num_steps: int) -> AutoencoderKL:
    """L1 + L2 reconstruction with a very small KL term."""
    with _fixed_initialisation():
        vae = build_autoencoder()

    def loss_of_step(step: int) -> Tensor:
        generator = _generator(1, step)
        pixels = _pixels(images[torch.randint(0, len(images), (AUTOENCODER_BATCH,), generator=generator).numpy()])
        posterior = vae.encode(pixels).latent_dist
        output = vae.decode(posterior.sample(generator)).sample
        return _reconstruction_loss(output, pixels) + 1e-6 * posterior.kl().mean()

    return Trainer("autoencoder", out, vae, num_steps, lr=2e-3).run(loss_of_step)


@torch.no_grad()
def cache_latents(out: Path, vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Latent means ``(n, 4, 8, 8)``, scaled to unit standard deviation; sets the autoencoder's scaling factor."""
    file = out / "latents.npy"
    if not file.exists():
        means = [vae.encode(_pixels(images[i : i + 250])).latent_dist.mean for i in range(0, len(images), 250)]
        with atomic_path(file) as temporary, open(temporary, "wb") as handle:
            np.save(handle, torch.cat(means).numpy(), allow_pickle=False)
    latents = torch.from_numpy(np.load(file))
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    return latents * vae.config.scaling_factor


def train_decoder(out: Path, vae: AutoencoderKL, latents: Tensor, images: np.ndarray, num_steps: int) -> None:
    """Train the decoder on, with the latents as they are: the denoiser may be trained on them meanwhile."""
    decoder = torch.nn.ModuleList([vae.decoder, vae.post_quant_conv])

    def loss_of_step(step: int) -> Tensor:
        generator = _generator(3, step)
        rows = torch.randint(0, len(images), (AUTOENCODER_BATCH,), generator=generator)
        pixels = _pixels(images[rows.numpy()])
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = latents[rows] + DECODER_NOISE * noise  # what a denoiser leaves, and more than the posterior's own
        output = vae.decode(noisy / vae.config.scaling_factor).sample
        return _reconstruction_loss(output, pixels)

    Trainer("decoder", out, decoder, num_steps, lr=1.5e-3).run(loss_of_step)


class Denoiser(torch.nn.Module):
    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


def train_denoiser(out: Path, latents: Tensor, tokens: Tensor, empty: Tensor, model: Denoiser, num_steps: int):
    """v-prediction at uniform timesteps (Salimans & Ho 2022), one caption in ten empty."""
    scheduler = build_scheduler()

    def loss_of_step(step: int) -> Tensor:
        generator = _generator(2, step)
        rows = torch.randint(0, len(latents), (BATCH,), generator=generator)
        clean, ids = latents[rows], tokens[rows].clone()
        ids[torch.rand(BATCH, generator=generator) < UNCONDITIONAL] = empty
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = scheduler.get_velocity(clean, noise, timesteps)
        prediction = model.unet(noisy, timesteps, model.text_encoder(ids)[0]).sample
        return F.mse_loss(prediction, target)

    return Trainer("denoiser", out, model, num_steps, lr=1.5e-3).run(loss_of_step)


def pack(folder: Path, vae, tokenizer, model: Denoiser, dtype: torch.dtype = torch.float16) -> None:
    """Save the pipeline in diffusers' layout, with what transformers 4 needs besides.

    That is the tokenizer's two classic files, and the classic names of the text encoder's weights: transformers 4 would
    not find those without ``text_model.`` and draw them at random.
    """
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
@click.option("--steps", default=4_800, show_default=True, help="Denoiser steps of 64 portraits.")
@click.option("--threads", default=2, show_default=True, help="Processor threads.")
def main(out: Path, portraits: int, vae_steps: int, decoder_steps: int, steps: int, threads: int) -> None:
    """Make the miniature's weights from nothing, or go on where a run was stopped."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    images, captions = draw_corpus(out, portraits)
    vae = train_autoencoder(out, images, vae_steps)
    latents = cache_latents(out, vae, images)
    train_decoder(out, vae, latents, images, decoder_steps)
    with torch.no_grad():
        held_out = _pixels(np.stack([portrait(i, "test")[0] for i in range(500)]))
        score = psnr_db(vae.decode(vae.encode(held_out).latent_dist.mean).sample.clamp(-1, 1), held_out)
    click.echo(f"autoencoder: {score:.2f} dB on 500 test portraits")
    tokenizer = train_tokenizer(captions[:20_000], out / "tokenizer")
    with _fixed_initialisation():
        model = Denoiser(*build_denoiser(tokenizer))
    tokens = tokenizer([*captions, ""], padding="max_length", max_length=MAX_TOKENS, truncation=True)["input_ids"]
    ids = torch.tensor(tokens)
    train_denoiser(out, latents, ids[:-1], ids[-1], model, steps)
    pack(out / "miniature", vae, tokenizer, model)
    click.echo(f"wrote {out / 'miniature'}")


if __name__ == "__main__":
    main()
