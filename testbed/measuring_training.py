"""Trains networks that tell people apart: the measuring network, on people that the base never saw, and encoders."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lidb_peft.files import atomic_path
from testbed.drawing import draw
from testbed.measuring import (
    CHOICES,
    CONTINUOUS,
    POSE,
    AttributeNetwork,
    Measurement,
    MeasuringNetwork,
    labels,
    pose,
    to_images,
    to_pixels,
)
from testbed.portraits import SPLITS, Scene, identity, random_scene
from testbed.trainer import Run, Trainer, fixed_initialisation, step_generator

BATCH = 64  # identities, two portraits of each
SHOTS = 4  # portraits of each identity; for the measuring network, the last two are passed through the autoencoder
CONTRAST_TEMPERATURE = 0.1
LR = 1.5e-3


class Labelled(NamedTuple):
    """Portraits of ``n`` identities, ``SHOTS`` of each, with labels.

    Attributes:
        images: ``(n, shots, 32, 32, 3)`` uint8.
        continuous: labels of `CONTINUOUS`, ``(n, CONTINUOUS)`` float32.
        choices: indices of `CHOICES`, ``(n, shots, CHOICES)`` int64.
        pose: labels of `POSE`, ``(n, shots, POSE)`` float32.
    """

    images: np.ndarray
    continuous: Tensor
    choices: Tensor
    pose: Tensor


def draw_labelled(
    folder: Path,
    name: str,
    seeds: Sequence[int],
    scenes_of: Callable[[int], Sequence[Scene]],
    finish: Callable[[np.ndarray], np.ndarray] = lambda images: images,
) -> Labelled:
    """Draw each identity of ``seeds`` in its ``SHOTS`` scenes; cached in ``folder`` under ``name``.

    Args:
        finish: changes the images of up to 100 people, ``(people, shots, 32, 32, 3)``.
    """
    images_file, labels_file = folder / f"{name}-images.npy", folder / f"{name}-labels.safetensors"
    if not labels_file.exists():
        images = np.empty((len(seeds), SHOTS, 32, 32, 3), np.uint8)
        continuous = np.empty((len(seeds), len(CONTINUOUS)), np.float32)
        choices = np.empty((len(seeds), SHOTS, len(CHOICES)), np.int64)
        poses = np.empty((len(seeds), SHOTS, len(POSE)), np.float32)
        for row, seed in enumerate(seeds):
            who = identity(seed)
            for shot, scene in enumerate(scenes_of(seed)):
                images[row, shot] = draw(who, scene)
                continuous[row], choices[row, shot] = labels(who, scene)
                poses[row, shot] = pose(scene)
        for start in range(0, len(seeds), 100):
            images[start : start + 100] = finish(images[start : start + 100])
        with atomic_path(images_file) as temporary, open(temporary, "wb") as file:
            np.save(file, images, allow_pickle=False)
        with atomic_path(labels_file) as temporary:
            answers = {"continuous": continuous, "choices": choices, "pose": poses}
            save_file({name: torch.from_numpy(values) for name, values in answers.items()}, temporary)
    return Labelled(np.load(images_file, mmap_mode="r"), **load_file(labels_file))


def attribute_loss(found: Measurement, continuous: Tensor, choices: Tensor, weight: float = 10.0) -> Tensor:
    """The loss on attributes: ``weight`` times the squared errors, plus the cross entropies, summed over attributes.

    Args:
        continuous, choices: labels of ``n`` pictures, as in `Labelled`.
    """
    loss = torch.zeros(())
    for index, name in enumerate(CONTINUOUS):
        loss = loss + weight * F.mse_loss(found.continuous[name], continuous[:, index])
    for index, name in enumerate(CHOICES):
        loss = loss + F.cross_entropy(found.logits[name], choices[:, index])
    return loss


def train_to_tell_people(
    name: str, run: Run, network: nn.Module, people: Labelled, num_steps: int, noise: float = 0.05
) -> None:
    """Attributes by regression and classification; an embedding by contrasting two portraits of each identity.

    The contrastive loss is the symmetric cross entropy of Radford et al. 2021 (CLIP) over the identities of a batch.

    Args:
        network: `MeasuringNetwork`, or `AttributeNetwork`, which has no embedding to learn.
        noise: largest standard deviation of noise added to pixels.
    """
    contrasts = isinstance(network, MeasuringNetwork)

    def loss_of_step(step: int) -> Tensor:
        generator = step_generator(4, step)
        rows = torch.randint(0, len(people.images), (BATCH,), generator=generator)
        shots = torch.rand(BATCH, SHOTS, generator=generator).argsort(dim=1)[:, :2].T  # (2, batch)
        pixels = to_pixels(np.concatenate([people.images[rows.numpy(), shot.numpy()] for shot in shots]))
        strength = noise * torch.rand(len(pixels), 1, 1, 1, generator=generator)
        found = network(pixels + strength * torch.randn(pixels.shape, generator=generator))
        right = torch.cat([people.choices[rows, shot] for shot in shots])
        loss = attribute_loss(found, people.continuous[rows].repeat(2, 1), right)
        if not contrasts:
            read, right = (
                torch.stack(list(found.pose.values()), dim=1),
                torch.cat([people.pose[rows, s] for s in shots]),
            )
            return loss + F.mse_loss(read, right) * len(POSE)
        first, second = found.embedding.chunk(2)
        similarity = first @ second.T / CONTRAST_TEMPERATURE
        own = torch.arange(BATCH)
        return loss + (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2

    Trainer(name, run, network, num_steps, LR).run(loss_of_step)


def train_measuring(run: Run, vae: AutoencoderKL, count: int, num_steps: int) -> MeasuringNetwork:
    """Train the measuring network on ``count`` people of its split; half of the portraits pass through ``vae``."""
    people = _draw_measuring(run, "measuring", SPLITS["measuring"][:count], vae)
    with fixed_initialisation():
        network = MeasuringNetwork()
    train_to_tell_people("measuring", run, network, people, num_steps)
    return network


def train_attributes(run: Run, vae: AutoencoderKL, count: int, num_steps: int) -> AttributeNetwork:
    """Train the second measuring network on ``count`` people of the same split that the first one never saw."""
    people = _draw_measuring(run, "attribute-training", SPLITS["measuring"][-count:], vae)
    with fixed_initialisation():
        network = AttributeNetwork()
    train_to_tell_people("attribute-training", run, network, people, num_steps)
    return network


def _draw_measuring(run: Run, name: str, seeds: Sequence[int], vae: AutoencoderKL) -> Labelled:
    """People in all styles, places and attires, half of the portraits pass through ``vae``."""

    def scenes_of(seed: int) -> list[Scene]:
        rng = np.random.default_rng((seed, 0x3E))
        return [random_scene(rng) for _ in range(SHOTS)]

    @torch.no_grad()
    def half_through_autoencoder(images: np.ndarray) -> np.ndarray:
        pixels = to_pixels(images[:, 2:].reshape(-1, *images.shape[-3:]))
        output = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        return np.concatenate([images[:, :2], to_images(output).reshape(-1, 2, *images.shape[-3:])], axis=1)

    return draw_labelled(run.out, name, seeds, scenes_of, half_through_autoencoder)
