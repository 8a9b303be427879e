"""Trains the measuring network, on portraits of people that the base never saw."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from lidb_peft.files import atomic_path
from testbed.drawing import draw
from testbed.measuring import CHOICES, CONTINUOUS, MeasuringNetwork, labels, to_pixels
from testbed.portraits import SPLITS, identity, random_scene
from testbed.trainer import Run, Trainer, fixed_initialisation, step_generator

BATCH = 64  # identities, two portraits of each
SHOTS = 4  # portraits of each identity; the last two as the autoencoder gives them back
CONTRAST_TEMPERATURE = 0.1


def draw_measuring_corpus(run: Run, vae: AutoencoderKL, count: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """Portraits of ``count`` identities of the measuring split, ``SHOTS`` each, drawn once and kept.

    Returns:
        Images ``(count, shots, 32, 32, 3)`` uint8, continuous labels ``(count, CONTINUOUS)`` and indices of choices
        ``(count, shots, CHOICES)``.
    """
    images_file, labels_file = run.out / "measuring-images.npy", run.out / "measuring-labels.safetensors"
    if not labels_file.exists():
        images = np.empty((count, SHOTS, 32, 32, 3), np.uint8)
        continuous = np.empty((count, len(CONTINUOUS)), np.float32)
        choices = np.empty((count, SHOTS, len(CHOICES)), np.int64)
        for row, seed in enumerate(SPLITS["measuring"][:count]):
            who, rng = identity(seed), np.random.default_rng((seed, 0x3E))
            for shot in range(SHOTS):
                scene = random_scene(rng)
                images[row, shot] = draw(who, scene)
                continuous[row], choices[row, shot] = labels(who, scene)
        for start in range(0, count, 100):
            rows = slice(start, start + 100)
            images[rows, 2:] = _through_autoencoder(vae, images[rows, 2:])
        with atomic_path(images_file) as temporary, open(temporary, "wb") as file:
            np.save(file, images, allow_pickle=False)
        with atomic_path(labels_file) as temporary:
            save_file({"continuous": torch.from_numpy(continuous), "choices": torch.from_numpy(choices)}, temporary)
    answers = load_file(labels_file)
    return np.load(images_file, mmap_mode="r"), answers["continuous"], answers["choices"]


@torch.no_grad()
def _through_autoencoder(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    pixels = to_pixels(images.reshape(-1, *images.shape[-3:]))
    output = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return ((output + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy().reshape(images.shape)


def train_measuring(run: Run, vae: AutoencoderKL, count: int, num_steps: int) -> MeasuringNetwork:
    """Attributes by regression and classification; the embedding by contrast between two portraits of each identity.

    The contrast is the symmetric cross entropy of Radford et al. 2021 (CLIP) over the identities of a batch.
    """
    images, continuous, choices = draw_measuring_corpus(run, vae, count)
    with fixed_initialisation():
        network = MeasuringNetwork()

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(4, step)
        rows = torch.randint(0, len(images), (BATCH,), generator=generator)
        shots = torch.rand(BATCH, SHOTS, generator=generator).argsort(dim=1)[:, :2].T  # (2, batch)
        pixels = to_pixels(np.concatenate([images[rows.numpy(), shot.numpy()] for shot in shots]))
        strength = 0.05 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
        found = network(pixels + strength * torch.randn(pixels.shape, generator=generator))
        right = torch.cat([choices[rows, shot] for shot in shots])
        loss = torch.zeros(())
        for index, name in enumerate(CONTINUOUS):
            loss = loss + 10 * F.mse_loss(found.continuous[name], continuous[rows, index].repeat(2))
        for index, name in enumerate(CHOICES):
            loss = loss + F.cross_entropy(found.logits[name], right[:, index])
        first, second = found.embedding.chunk(2)
        similarity = first @ second.T / CONTRAST_TEMPERATURE
        own = torch.arange(BATCH)
        return loss + (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2

    return Trainer("measuring", run, network, num_steps, lr=1.5e-3).run(loss_of_step)
