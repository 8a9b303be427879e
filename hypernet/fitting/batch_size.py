"""How many people to fit at once, by the memory at hand."""

from dataclasses import replace

import torch

from hypernet.base_models.base import BaseModel
from hypernet.devices import OUT_OF_MEMORY, free_bytes, release_memory
from hypernet.errors import is_out_of_memory
from hypernet.fitting.engine import Subject, fit_flat_lora, fit_theta
from hypernet.inputs.recognition import Recogniser
from hypernet.recipe import FitConfig
from lidb_peft import LiDBSpace

LARGEST_BATCH = 64  # more would gain little, and a killed run loses the batch it is at
_CPU_PIXELS = 16 * 32 * 32  # on a processor a batch gains only where pictures are small: 16 of 32 x 32, 1 of 512 x 512
_PROMPT = "a face"
_MEMORY_SHARE = 0.85  # of what is free; the rest is for fragments and for what others take meanwhile


def choose_batch(
    base: BaseModel, space: LiDBSpace, fit: FitConfig, rank: int | None = None, recogniser: Recogniser | None = None
) -> int:
    """How many people to fit at once: on CUDA as many as the free memory holds, by the peaks of one and two people.

    Gradient checkpointing ``auto`` does without as long as one person fits.

    Args:
        rank: of the LoRA that is fitted, which takes more than theta, beside theta; None fits theta.
        recogniser: as for `hypernet.fitting.engine.fit_lora`.

    Raises:
        ValueError: not even one fits.
    """
    if base.device.type != "cuda":
        return max(1, _CPU_PIXELS // base.size_px**2)
    templates = fit.preserved if fit.preservation else ()
    base.prepare_prompts([_PROMPT, *(template.format(_PROMPT) for template in templates)])
    base.settle()  # else its own arrival would be counted
    free = free_bytes(base.device)
    for checkpointing in ("off", "on") if fit.gradient_checkpointing == "auto" else (fit.gradient_checkpointing,):
        peaks = _peaks(base, space, replace(fit, steps=1, gradient_checkpointing=checkpointing), rank, recogniser)
        if peaks:
            return _largest_batch(free, peaks)
    raise ValueError(f"fitting one person does not fit into the {free / 1e9:.1f} GB that are free on {base.device}; "
                     f"{OUT_OF_MEMORY}")  # fmt: skip


def _peaks(
    base: BaseModel, space: LiDBSpace, fit: FitConfig, rank: int | None, recogniser: Recogniser | None = None
) -> list[int]:
    """The most memory that a step of one and of two people takes on top of the base, as far as they fit."""
    channels, *size = base.latent_shape
    moments = torch.zeros(1, 2 * channels, *size)
    embedding = None
    if recogniser is not None:
        with torch.no_grad():
            (embedding,) = recogniser.embed(torch.zeros(1, 3, base.size_px, base.size_px, device=base.device))
    subjects = [Subject(str(i), moments, _PROMPT, _PROMPT, embedding) for i in range(2)]
    peaks: list[int] = []
    for count in (1, 2):
        before = torch.cuda.memory_allocated(base.device)
        torch.cuda.reset_peak_memory_stats(base.device)
        try:
            if rank is None:
                fit_theta(base, space, subjects[:count], fit)
            else:
                fit_flat_lora(base, space, subjects[:count], fit, rank, space.theta_0, recogniser=recogniser)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            is_full = True
        else:
            is_full = False
        if is_full:
            release_memory(base.device)
            break
        peaks.append(torch.cuda.max_memory_allocated(base.device) - before)
    return peaks


def _largest_batch(free: int, peaks: list[int]) -> int:
    """Extrapolate the peaks of one and two people, in bytes; the second is missing if two did not fit."""
    if len(peaks) < 2:
        return 1
    one, two = peaks
    return max(1, min(LARGEST_BATCH, 1 + int((_MEMORY_SHARE * free - one) / max(two - one, 1))))
