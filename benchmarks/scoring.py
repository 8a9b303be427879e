"""Shared by the benchmarks on the miniature's people: people, their scores, stored line by line, and tables.

A method fits each person on one photo and is judged by pictures of a split's prompts (`testbed.protocol`).
"""

import time
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hypernet.base_models.loading import load_base
from hypernet.evaluation import harness
from hypernet.fitting.engine import Subject
from lidb_peft import LiDBSpace, LoraFactors
from testbed import MINIATURE_RECIPE, miniature_lidb_config, miniature_path
from testbed.measuring import load_attribute_network, load_measuring_network, to_pixels
from testbed.portraits import SPLITS
from testbed.prompts import PROMPTS
from testbed.protocol import (
    CALIBRATION_PEOPLE,
    LIKENESSES,
    SAMPLES,
    Judge,
    draw_prompts,
    own_and_others,
    shown_photos,
    shown_subjects,
    spread,
    true_picture,
)

CLASS_PICTURES = 200
CLASS_SEED, SAMPLES_SEED = 1000, 1001  # different from the seeds that people are drawn with
TWICE = ("identity", "identity_prompted", "found", "both")
"""Columns that the second measuring network, which reads only attributes, has too, as ``identity_2`` and so on."""
COLUMNS = (
    "identity", "identity_prompted", "found", "both", *(f"{name}_2" for name in TWICE), "seen", "unseen", "spread",
    "features", "background", "seconds",
)  # fmt: skip
DETAILS = LIKENESSES[1:]
"""Likeness by attribute in plain pictures; with ``_prompted`` in the others."""


class World:
    """The miniature, and the people of one split of it.

    Attributes:
        split: ``validation`` for choosing settings, ``test`` for reports.
        space, denoiser_space: of all layers, and of the denoiser's layers.
    """

    clock = staticmethod(time.process_time)

    def __init__(self, split: str, folder: str | None = None) -> None:
        """Load the bundled miniature, or another one."""
        self.split = split
        self.base = load_base(folder or str(miniature_path()), device="cpu")
        self.space = LiDBSpace(self.base.adapted, miniature_lidb_config())
        self.denoiser_space = LiDBSpace({"unet": self.base.denoiser}, miniature_lidb_config())
        self.judge, self.second = Judge(load_measuring_network(), split), Judge(load_attribute_network(), split)
        self._same, self._stranger = self._calibrate_features()

    def space_of_layers(self, names: Iterable[str]) -> LiDBSpace:
        """Return the space of these layers."""
        return self.denoiser_space if set(names) == set(self.denoiser_space.layer_names) else self.space

    def space_of(self, factors: Sequence[LoraFactors] | None) -> LiDBSpace:
        """Return the space of these factors."""
        return self.space if factors is None else self.space_of_layers(factors[0])

    def subjects(self, people: Sequence[int]) -> list[Subject]:
        return shown_subjects(self.base, people)

    @cached_property
    def class_moments(self) -> Tensor:
        """VAE moments ``(CLASS_PICTURES, 8, h, w)`` of class pictures drawn by the base, for prior preservation."""
        pictures = draw_prompts(
            self.base, None, None, CLASS_PICTURES, seed=CLASS_SEED, guidance=MINIATURE_RECIPE.guidance,
            prompts=[MINIATURE_RECIPE.class_prompt],
        )  # fmt: skip
        return self.base.encode_photos(pictures[:, 0])

    def draw(self, factors: Sequence[LoraFactors] | None, people: Sequence[int], seed: int, first: int) -> Tensor:
        """Draw the judge's prompts for each person and, with the first seed, samples of the plain prompt.

        Returns:
            Pixels ``(n, prompts, 3, 32, 32)`` in [-1, 1], or ``(n, prompts + SAMPLES, 3, 32, 32)``.
        """
        draw = partial(
            draw_prompts, self.base, self.space_of(factors), factors, len(people), MINIATURE_RECIPE.token,
            guidance=MINIATURE_RECIPE.guidance, first=first,
        )  # fmt: skip
        pictures = draw(prompts=[PROMPTS[name][0] for name in self.judge.prompts], seed=seed)
        if seed:
            return pictures
        return torch.cat([pictures, draw(prompts=[PROMPTS["plain"][0]] * SAMPLES, seed=SAMPLES_SEED)], dim=1)

    def score(self, pictures: Tensor, people: Sequence[int]) -> list[dict]:
        """Score the pictures of `draw` in all `COLUMNS` but seconds, and by prompt; *spread* if there are samples."""
        pictures, samples = pictures.tensor_split([len(self.judge.prompts)], dim=1)
        scores = self.judge.score(pictures, people)
        second = self.second.score(pictures, people).by_person()
        columns = {**scores.by_person(), "features": self.feature_similarity(pictures[:, 0], people)}
        columns |= {f"{name}_2": second[name] for name in TWICE}
        if samples.shape[1]:
            varied = spread(samples, people, self.second.network)
            columns["spread"] = torch.stack(list(varied.values())).mean(dim=0)
        return [
            {
                "person": person,
                **{name: float(values[i]) for name, values in columns.items()},
                **{name: float(values[i]) for name, values in scores.attributes().items()},
                **{f"{name}_prompted": float(values[i]) for name, values in scores.attributes(prompted=True).items()},
                "right": {name: float(values[i]) for name, values in scores.right.items()},
            }
            for i, person in enumerate(people)
        ]

    def feature_similarity(self, pictures: Tensor, people: Sequence[int]) -> Tensor:
        """How similar pictures of the plain prompt ``(n, 3, 32, 32)`` are to the input photos, ``(n,)``.

        By the cosine of the measuring network's features before its heads, which depend on pose, light and background
        too, like DINO's; 0 is another person's plain photo, 1 another plain photo of the same person. A copy exceeds 1.
        """
        similarity = (self._features(pictures) * self._features(shown_photos(people))).sum(dim=1)
        return (similarity - self._stranger) / (self._same - self._stranger)

    def _calibrate_features(self) -> tuple[float, float]:
        people = SPLITS[self.split][-CALIBRATION_PEOPLE:]
        others = self._features(to_pixels([true_picture(person, "plain") for person in people]))
        return own_and_others(others @ self._features(shown_photos(people)).T)

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        return normalize(self.judge.network.trunk(pixels), dim=1)


class Results(harness.Results):
    """The scores of the miniature's people, in `COLUMNS`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, COLUMNS)


def equal_steps(reached: float, plain: Sequence[float], all_steps: Sequence[int]) -> str:
    """How many steps reach the same value, interpolating the running maximum of ``plain`` over ``all_steps``."""
    best_so_far = np.maximum.accumulate(plain)
    if reached > best_so_far[-1]:
        return f"more than {all_steps[-1]}"
    return f"{np.interp(reached, best_so_far, all_steps):.0f}"
