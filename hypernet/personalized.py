"""What became of a person: theta, the LoRA, and how they are described, drawn with and saved."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from torch import Tensor

from converters import KohyaMetadata, prepare_conversion, write_lora
from converters.sidecar import check_companions, write_our_picture
from hypernet.base_models.base import BaseModel
from hypernet.inputs.photos import Photo
from hypernet.loss_curve import loss_curve
from hypernet.recipe import PersonalizeConfig, Progress
from hypernet.request import NO_THETA_FILE, loss_path
from hypernet.sampling import generate
from lidb_peft import LiDBSpace, LoraFactors, base_fingerprint, save_theta
from lidb_peft.outputs import check_output

_FEWEST_STEPS = 10  # of a fit whose loss tells more than its noise


@dataclass(repr=False)
class Personalization:
    """A person's weights.

    Attributes:
        theta: ``(L, row)``.
        photos: the prepared photos, at least one.
        bases: the learned bases of ``theta``, by label; None if they are the frozen ones.
        finetuned: theta and the finetuned LoRA combined into one set of factors; None without finetuning and start.
        start_source: the file of the LoRA that the finetuning started from; "" if it was a fresh one.
        seconds: time of each stage; people fitted together share it.
        losses: mean denoising loss of each step, ``(steps, 1)``, by stage.
        files: the files written.
        left_out: unusable photos, a sentence for each.
        snapshots: the factors after intermediate steps of the last stage, by step, in order.
        stopped_at: the stage and step after which the fit was stopped; None if it was not.
    """

    base: BaseModel
    space: LiDBSpace
    config: PersonalizeConfig
    theta: Tensor
    photos: Sequence[Photo]
    bases: dict[str, Tensor] | None = None
    finetuned: LoraFactors | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    start_source: str = ""
    left_out: Sequence[str] = ()
    snapshots: dict[int, LoraFactors] = field(default_factory=dict)
    stopped_at: tuple[str, int] | None = None

    @cached_property
    def theta_factors(self) -> LoraFactors:
        """theta as LoRA factors."""
        return self.space.factors(self.theta, self.bases)

    @property
    def factors(self) -> LoraFactors:
        """The factors for the LoRA file: theta, and the finetuned LoRA if there is one."""
        return self.theta_factors if self.finetuned is None else self.finetuned

    def __repr__(self) -> str:
        rank = next(iter(self.factors.values()))[0].shape[0]
        lines = [
            f"{type(self).__name__} of {len(self.photos)} photo{'s'[: len(self.photos) != 1]} on {self.base.name}",
            f'  a LoRA of rank {rank} on {len(self.factors)} layers that answers to "{self.config.trigger}"',
            f"  made in {sum(self.seconds.values()):.1f} s: {', '.join(self.seconds)}",
            f"  written: {', '.join(map(str, self.files)) or 'nothing yet; save(FILE.safetensors) writes it'}",
        ]
        return "\n".join(lines)

    @property
    def loss_notes(self) -> list[str]:
        """Where the loss of each stage began and ended, and a warning where it rose, in sentences."""
        notes = []
        for stage, values in self.losses.items():
            count = max(1, len(values) // 4)
            first, last = (float(part.mean()) for part in (values[:count], values[-count:]))
            rose = ""
            if last > first and len(values) >= _FEWEST_STEPS:
                rose = "; it rose, so the weights are overcooked: lower the learning rate, or take fewer steps"
            if len(values):
                notes.append(f"{stage}: loss {first:.3f} at first, {last:.3f} at the end{rose}")
        return notes

    def draw(
        self,
        prompts: str | Sequence[str],
        factors: LoraFactors | None,
        num_steps: int = 30,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Draw prompts with ``factors``, this person's or None for the base, from the noise of the config's seed."""
        return generate(
            self.base, prompts, self.space, factors,
            seed=self.config.seed, num_steps=num_steps, guidance=self.config.guidance, progress=progress,
        )  # fmt: skip

    def save(
        self,
        path: str | Path,
        preview: Image.Image | None = None,
        dtype: torch.dtype = torch.float16,
        to: str = "kohya",
        step: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the LoRA: kohya safetensors with A1111's sidecar and, if given, a preview picture, or another format.

        Args:
            to: one of `converters.FORMATS` that hold a LoRA, such as ``diffusers``, or ``peft``, which is a folder.
            step: write the one after this step, which must be among the snapshots.
            overwrite: what is at ``path``, and a sidecar or pictures of somebody else's beside it, may be replaced.

        Raises:
            FileExistsError: something is there, and is not to be replaced.
            ValueError: there is no snapshot of ``step``.
            ValueError, OSError: as `check_output`.
        """
        metadata = lora_metadata(self.base, self.config.trigger, num_photos=len(self.photos))
        factors = self.factors if step is None else self.snapshots.get(step)
        if factors is None:
            kept = ", ".join(map(str, self.snapshots)) or "none; pass save_every"
            raise ValueError(f"there is no LoRA of step {step}; kept are those of {kept}")
        if to == "kohya":
            check_output(path, overwrite=overwrite)
            check_companions(Path(path), self.config.trigger, preview=preview is not None, overwrite=overwrite)
            self.files += write_lora(path, factors, metadata, dtype=dtype, preview=preview)
            return
        with TemporaryDirectory() as folder:
            kohya, *_ = write_lora(Path(folder) / "lora.safetensors", factors, metadata, dtype=dtype)
            self.files += prepare_conversion(kohya, path, to, overwrite=overwrite).write()

    def save_losses(self, lora: Path) -> None:
        """Draw the loss of a fit that took a step beside its LoRA, ``<lora>-loss.png``."""
        if any(map(len, self.losses.values())):
            write_our_picture(loss_curve(self.losses), loss_path(lora))
            self.files.append(loss_path(lora))

    def save_theta(self, path: str | Path, overwrite: bool = False) -> None:
        """Write theta alone, 53 KB for Stable Diffusion 1.5.

        Args:
            overwrite: a file at ``path`` may be replaced.

        Raises:
            ValueError: its bases are learned.
            ValueError, OSError: as `check_output`.
        """
        if self.bases is not None:
            raise ValueError(NO_THETA_FILE)
        check_output(path, overwrite=overwrite)
        save_theta(
            path,
            self.theta,
            self.space,
            base_model_name=Path(self.base.name).name,
            base_fingerprint=base_fingerprint(self.space.models),
        )
        self.files.append(Path(path))


def lora_metadata(base: BaseModel, trigger: str, num_photos: int = 0) -> KohyaMetadata:
    """The metadata of a LoRA file for this base."""
    return KohyaMetadata(
        family=base.family,
        v_prediction=base.prediction_type == "v_prediction",
        trigger=trigger,
        base_model_name=Path(base.name).name,
        resolution_px=base.size_px,
        num_photos=num_photos,
    )
