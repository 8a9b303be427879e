"""The pictures beside a person's LoRA, drawn when it is written: the weights are worth hours, a picture is not."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from converters import describe, read_lora
from converters.sidecar import has_preview, write_our_picture, write_preview
from hypernet.base_models.base import BaseModel
from hypernet.errors import first_sentence
from hypernet.recipe import PersonalizeConfig, StageProgress
from hypernet.request import sheet_path, steps_sheet_path
from hypernet.sampling import generate
from hypernet.sheets import DrawConfig, contact_sheet, draw_sheet, infotext_of
from hypernet.timing import timed
from lidb_peft import LiDBSpace, LoraFactors
from lidb_peft.safe_read import read_header


class Pictures:
    """What is drawn with LoRAs that are written: the weights are those of the file, so that a later run draws the same.

    A picture that cannot be drawn costs that picture and a warning.
    """

    def __init__(
        self, base: BaseModel, space: LiDBSpace, config: PersonalizeConfig, previews: Sequence[str] | None
    ) -> None:
        """Draw the prompts ``previews`` beside the trigger prompt; None draws nothing at all."""
        self.base, self.space, self.config, self.previews = base, space, config, previews
        self._base_pictures: list[Image.Image] | None = None

    def are_missing(self, lora: Path) -> bool:
        """Tell whether a LoRA that an earlier run made lacks pictures, because that run was stopped."""
        if self.previews is None or (has_preview(lora) and (not self.previews or sheet_path(lora).exists())):
            return False
        try:
            return read_header(lora).metadata.get("modelspec.trigger_phrase") == self.config.trigger
        except ValueError:
            return False

    def draw(self, lora: Path, seconds: dict[str, float], progress: StageProgress | None = None) -> list[Path]:
        """Draw and write a LoRA's preview picture and sheet; returns what was written."""
        if self.previews is None:
            return []
        try:
            with timed(seconds, "draw"):
                return self._draw(lora, progress)
        except (RuntimeError, ValueError, MemoryError) as error:  # no memory, or numbers that are not finite
            warnings.warn(f"{lora} is written, but its pictures are not: {first_sentence(error)}", stacklevel=2)
            return []

    def _draw(self, lora: Path, progress: StageProgress | None) -> list[Path]:
        factors = read_lora(lora).factors()
        if set(factors) != set(self.space.layer_names):
            raise ValueError("it has other layers than this base")
        prompts = [self.config.trigger, *(self.previews or ())]
        pictures = self._generate(prompts, factors, progress, "draw preview")
        text = infotext_of(self.base, prompts[0], self.config.seed, DrawConfig(guidance=self.config.guidance),
                           lora.stem, digest=describe(lora).hashes["a1111"])  # fmt: skip
        written = [write_preview(lora, pictures[0], str(text))]
        if self.previews:
            if self._base_pictures is None:
                self._base_pictures = self._generate(prompts, None, progress, "draw base")
            sheet = contact_sheet([("LoRA", pictures), ("base", self._base_pictures)], prompts)
            write_our_picture(sheet, sheet_path(lora))
            written.append(sheet_path(lora))
        return [file for file in written if file is not None]

    def draw_steps(
        self,
        out: Path,
        loras: Sequence[Path],
        weights: Sequence[float],
        seconds: dict[str, float],
        progress: StageProgress | None = None,
    ) -> list[Path]:
        """Draw and write the sheet of intermediate LoRAs x weights x prompts of the LoRA ``out``."""
        if self.previews is None:
            return []
        try:
            with timed(seconds, "draw sheet"):
                named = {lora.stem: read_lora(lora).factors() for lora in loras}
                sheet = draw_sheet(
                    self.base, [self.config.trigger, *self.previews], named, weights, [self.config.seed],
                    DrawConfig(guidance=self.config.guidance), self.space,
                    progress=None if progress is None else partial(progress, "draw sheet"),
                )  # fmt: skip
                write_our_picture(sheet.image, steps_sheet_path(out), str(sheet.infotext))
                return [steps_sheet_path(out)]
        except (RuntimeError, ValueError, MemoryError) as error:
            warnings.warn(f"{out} is written, but its sheet is not: {first_sentence(error)}", stacklevel=2)
            return []

    def _generate(
        self, prompts: Sequence[str], factors: LoraFactors | None, progress: StageProgress | None, stage: str
    ) -> list[Image.Image]:
        return generate(
            self.base, prompts, self.space, factors,
            seed=self.config.seed, guidance=self.config.guidance,
            progress=None if progress is None else partial(progress, stage),
        )  # fmt: skip
