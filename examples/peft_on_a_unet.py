"""PEFT on a UNet: train LiDB weights on one picture, save, load and merge them: python peft_on_a_unet.py PICTURE.

The bundled miniature is the base, so that this runs on a CPU; for Stable Diffusion 1.5 `LiDBConfig()` has the paper's
dimensions. Any other UNet of diffusers works too, in a training loop of your own.
"""

import sys

import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import mse_loss

from hypernet import load_base
from hypernet.inputs.photos import load_photo
from lidb_peft import LiDBConfig  # registers LiDB with PEFT

STEPS = 30

base = load_base("testbed", device="cpu")
moments = base.encode_photos(load_photo(sys.argv[1], base.size_px, crop=False).to_tensor()[None])
prompt = base.encode_prompts(base.prepare_prompts(["a sks face"]))
generator = torch.Generator().manual_seed(0)


def denoising_loss(base, noise, position):
    latents = base.sample_latents(moments, torch.zeros_like(noise))
    timesteps = base.timesteps(position, 1000)
    noise_pred = base.denoise(base.add_noise(latents, noise, timesteps), timesteps, prompt)
    return mse_loss(noise_pred, base.target(latents, noise, timesteps))


unet = get_peft_model(base.denoiser, LiDBConfig(down_dim=20, up_dim=10))  # in place: base.denoise has the adapter too
unet.print_trainable_parameters()
optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=0.02)
held_out = torch.randn(1, *base.latent_shape, generator=generator), torch.tensor([0.5])
before = denoising_loss(base, *held_out).item()
for _ in range(STEPS):
    noise = torch.randn(1, *base.latent_shape, generator=generator)
    denoising_loss(base, noise, torch.rand(1, generator=generator)).backward()
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad():
    after = denoising_loss(base, *held_out).item()
print(f"loss {before:.4f} before, {after:.4f} after {STEPS} steps")
unet.save_pretrained("adapter")

again = load_base("testbed", device="cpu")
merged = PeftModel.from_pretrained(again.denoiser, "adapter").merge_and_unload()  # a plain UNet
with torch.no_grad():
    print(f"loss {denoising_loss(again, *held_out).item():.4f} loaded and merged")
merged.save_pretrained("merged")
