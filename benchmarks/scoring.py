"""What the benchmarks on the miniature's people share: people, their scores, kept line by line, and tables.

A method fits people, each on the one shown photo, and is judged by pictures of a split's prompts (`testbed.protocol`).
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hypernet.bases.loading import load_base
from hypernet.fitting.engine import Subject
from lidb_peft import LiDBSpace, LoraFactors
from testbed import MINIATURE_RECIPE, miniature_lidb_config, miniature_path
from testbed.measuring import load_measuring_network, to_pixels
from testbed.portraits import SPLITS
from testbed.prompts import PROMPTS
from testbed.protocol import (
    CALIBRATION_PEOPLE,
    LIKENESSES,
    Judge,
    draw_prompts,
    own_and_others,
    shown_photos,
    shown_subjects,
    true_picture,
)

CLASS_PICTURES = 200
CLASS_SEED = 1000  # not a seed that people are drawn with
COLUMNS = (
    "identity", "identity_prompted", "found", "seen", "unseen", "both", "features", "background", "seconds",
)  # fmt: skip
DETAILS = LIKENESSES[1:]
"""Likeness by attribute on plain pictures; with ``_prompted`` on the others."""


class World:
    """The miniature, and the people of one split of it.

    Attributes:
        split: ``validation`` to choose settings on, ``test`` to report.
        space, denoiser_space: of all layers, and of those of the denoiser.
    """

    def __init__(self, split: str, folder: str | None = None) -> None:
        """Load the bundled miniature, or another one."""
        self.split = split
        self.base = load_base(folder or str(miniature_path()), device="cpu")
        self.space = LiDBSpace(self.base.adapted, miniature_lidb_config())
        self.denoiser_space = LiDBSpace({"unet": self.base.denoiser}, miniature_lidb_config())
        self.judge = Judge(load_measuring_network(), split)
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
        """VAE moments ``(CLASS_PICTURES, 8, h, w)`` of the base's own pictures of the class, for prior preservation."""
        pictures = draw_prompts(
            self.base, None, None, CLASS_PICTURES, seed=CLASS_SEED, guidance=MINIATURE_RECIPE.guidance,
            prompts=[MINIATURE_RECIPE.class_prompt],
        )  # fmt: skip
        return self.base.encode_photos(pictures[:, 0])

    def score(self, pictures: Tensor, people: Sequence[int]) -> list[dict]:
        """Score pictures ``(n, prompts, 3, 32, 32)`` in [-1, 1], in all `COLUMNS` but the seconds, and by prompt."""
        scores = self.judge.score(pictures, people)
        columns = {**scores.by_person(), "features": self.feature_similarity(pictures[:, 0], people)}
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
        """How alike pictures by the plain prompt ``(n, 3, 32, 32)`` are to the shown photos, ``(n,)``.

        By the cosine of the measuring network's features before its heads, which see pose, light and background too, as
        DINO's do; 0 another person's plain photo, 1 another plain photo of the same person. A copy has more than 1.
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


Method = Callable[[World, Sequence[int], int], AbstractContextManager[list[LoraFactors] | None]]
"""Called with the world, people and a seed, it fits them; inside the context, with the factors that it gives, the base
draws them."""


def fit_and_score(world: World, method: Method, people: Sequence[int], first: int, seed: int) -> list[dict]:
    """Each person's scores, and the processor seconds that the fit took for each.

    Args:
        first: how many people come before these in the row.
    """
    start = time.process_time()
    with method(world, people, seed) as factors:
        seconds = (time.process_time() - start) / len(people)
        pictures = draw_prompts(
            world.base, world.space_of(factors), factors, len(people), MINIATURE_RECIPE.token, seed=seed,
            guidance=MINIATURE_RECIPE.guidance,
            prompts=[PROMPTS[name][0] for name in world.judge.prompts], first=first,
        )  # fmt: skip
    return [{**line, "seconds": seconds} for line in world.score(pictures, people)]


class Results:
    """Scores in a file, one JSON line for each row, seed and person; a killed run goes on from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple[str, int], list[dict]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            scores = json.loads(line)
            self.lines.setdefault((scores.pop("row"), scores.pop("seed")), []).append(scores)

    def complete(self, world: World, row: str, method: Method, people: Sequence[int], seed: int, batch: int) -> None:
        """Score those of ``people`` who are missing, ``batch`` at once.

        Raises:
            ValueError: the file has other people.
        """
        lines = self.lines.setdefault((row, seed), [])
        if [line["person"] for line in lines[: len(people)]] != list(people[: len(lines)]):
            raise ValueError(f"{self.path} has other people in row {row!r}; choose another file")
        for first in range(len(lines), len(people), batch):
            scored = fit_and_score(world, method, people[first : min(first + batch, len(people))], first, seed)
            lines += scored
            with open(self.path, "a") as file:
                file.writelines(json.dumps({"row": row, "seed": seed, **line}) + "\n" for line in scored)
            means = {name: round(float(np.mean([line[name] for line in lines])), 3) for name in COLUMNS}
            print(row, seed, f"{len(lines)}/{len(people)}", means, flush=True)

    def table(self, rows: Iterable[str], columns: Sequence[str] = COLUMNS) -> str:
        """Markdown: mean over people and seeds ± standard error over people (standard deviation over seeds)."""
        table = ["| method | people | seeds | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|"]
        for row in rows:
            seeds = [lines for (name, _), lines in self.lines.items() if name == row and lines]
            if seeds:
                people = len({line["person"] for lines in seeds for line in lines})
                cells = [_cell(seeds, column) for column in columns]
                table.append(f"| {row} | {people} | {len(seeds)} | " + " | ".join(cells) + " |")
        return "\n".join(table)


def equal_steps(reached: float, plain: Sequence[float], all_steps: Sequence[int]) -> str:
    """How many steps reach as much, by what ``all_steps``, in order, reach: ``plain``, of which more is better."""
    best_so_far = np.maximum.accumulate(plain)
    if reached > best_so_far[-1]:
        return f"more than {all_steps[-1]}"
    return f"{np.interp(reached, best_so_far, all_steps):.0f}"


def _cell(seeds: list[list[dict]], column: str) -> str:
    by_person: dict[int, list[float]] = {}
    for line in (line for lines in seeds for line in lines):
        by_person.setdefault(line["person"], []).append(line[column])
    means = [np.mean(values) for values in by_person.values()]
    cell = f"{np.mean(means):.2f}"
    if len(means) > 1:
        cell += f" ± {np.std(means, ddof=1) / len(means) ** 0.5:.2f}"
    if len(seeds) > 1:
        cell += f" ({np.std([np.mean([line[column] for line in lines]) for lines in seeds], ddof=1):.2f})"
    return cell
