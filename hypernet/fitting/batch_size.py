"""How many people to fit at once, by the memory at hand."""

from dataclasses import replace

import torch

from hypernet.base_models import BaseModel
from hypernet.fitting.engine import Subject, fit_theta
from hypernet.recipe import FitConfig
from lidb_peft import LiDBSpace

LARGEST_BATCH = 64  # more would gain little, and a killed run loses the batch it is at
_CPU_PIXELS = 16 * 32 * 32  # on a processor a batch gains only where pictures are small: 16 of 32 x 32, 1 of 512 x 512
_MEMORY_SHARE = 0.85  # of what is free; the rest is for fragments and for what others take meanwhile


def choose_batch(base: BaseModel, space: LiDBSpace, fit: FitConfig) -> int:
    """How many people to fit at once: on CUDA as many as the free memory holds, by the peaks of one and two people.

    Raises:
        ValueError: not even one fits.
    """
    device = base.device
    if device.type != "cuda":
        return max(1, _CPU_PIXELS // base.size_px**2)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free -= torch.cuda.memory_allocated(device)
    peaks: list[int] = []
    for count in (1, 2):
        try:
            peaks.append(_peak_bytes(base, space, fit, count))
        except torch.cuda.OutOfMemoryError:
            break
    if not peaks:
        raise ValueError(
            f"fitting one person does not fit into the {free / 1e9:.1f} GB that are free on {device}; pass "
            f"--gradient-checkpointing, or another --device"
        )
    return _largest_batch(free, peaks)


def _peak_bytes(base: BaseModel, space: LiDBSpace, fit: FitConfig, num_people: int) -> int:
    """The most memory that a step takes on top of the base."""
    side = base.unet.config.sample_size
    moments = torch.zeros(1, 2 * base.vae.config.latent_channels, side, side)
    subjects = [Subject(str(i), moments, "a face", "a face") for i in range(num_people)]
    before = torch.cuda.memory_allocated(base.device)
    torch.cuda.reset_peak_memory_stats(base.device)
    fit_theta(base, space, subjects, replace(fit, steps=1))
    return torch.cuda.max_memory_allocated(base.device) - before


def _largest_batch(free: int, peaks: list[int]) -> int:
    """Extrapolate the peaks of one and two people, in bytes; the second is missing if two did not fit."""
    if len(peaks) < 2:
        return 1
    one, two = peaks
    return max(1, min(LARGEST_BATCH, 1 + int((_MEMORY_SHARE * free - one) / max(two - one, 1))))
