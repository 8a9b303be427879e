"""One harness for every table: methods fit people, pictures are drawn and scored, and each score is kept in a file.

The miniature's tables (``benchmarks/``) and `hypernet.comparison` differ in their `Bench`: whom to fit, draw, judge.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lidb_peft.files import atomic_path

Person = Any  # an int or a str, as the bench has it


class Bench(Protocol):
    """Who is fitted, how they are drawn and how they are judged."""

    clock: Callable[[], float]
    """Seconds, whose difference is what a fit takes."""

    def draw(self, fitted: Any, people: Sequence[Person], seed: int, first: int) -> Any:
        """Draw people with what a method fitted; ``first`` is how many come before them."""

    def score(self, pictures: Any, people: Sequence[Person]) -> list[dict]:
        """Each person's scores, ``person`` among them; ``{"person": ..., "failed": reason}`` where there are none."""


Method = Callable[[Any, Sequence[Person], int], AbstractContextManager[Any]]
"""Called with the bench, people and a seed, it fits them; inside the context, with what it gives, they are drawn."""


def fit_and_score(bench: Bench, method: Method, people: Sequence[Person], first: int, seed: int) -> list[dict]:
    """Each person's scores, and the seconds that the fit took for each.

    Args:
        first: how many people come before these in the row.
    """
    start = bench.clock()
    with method(bench, people, seed) as fitted:
        seconds = (bench.clock() - start) / len(people)
        pictures = bench.draw(fitted, people, seed, first)
    return [{**line, "seconds": seconds} for line in bench.score(pictures, people)]


class Results:
    """Scores in a file, one JSON line for each row, seed and person; a run that was stopped goes on from it.

    Attributes:
        lines: by row and seed.
    """

    def __init__(self, path: Path, columns: Sequence[str], settings: dict[str, Any] | None = None) -> None:
        """Open a file, or begin one.

        Args:
            columns: of the table.
            settings: what scores depend on, the file's first line; None writes none. ``rows`` has what those of single
                rows do; rows that are not among them stay as they are.

        Raises:
            ValueError: the file is of other settings, or no such file.
        """
        self.path, self.columns, self.settings = path, tuple(columns), settings
        self.lines: dict[tuple[str, int], list[dict]] = {}
        found = None
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                scores = json.loads(line)
                if "settings" in scores:
                    found = scores["settings"]
                else:
                    self.lines.setdefault((scores.pop("row"), scores.pop("seed")), []).append(scores)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} holds a line that is not a score; it is damaged: choose another output, or "
                                 f"remove the line {line[:60]!r}") from error  # fmt: skip
        if path.exists() and settings is not None:
            self._check(found or {})

    def _check(self, found: dict[str, Any]) -> None:
        asked = json.loads(json.dumps(self.settings))
        rows, known = asked.pop("rows", {}), found.pop("rows", {})
        pairs = {name: (found.get(name), asked.get(name)) for name in (*asked, *found)}
        pairs |= {f"row {row!r}": (known[row], rows[row]) for row in rows if row in known}
        for name, (there, here) in pairs.items():
            if there != here:
                raise ValueError(f"{self.path} is of another run: its {name} is {_short(there)}, and here it is "
                                 f"{_short(here)}; choose another output folder")  # fmt: skip
        if known | rows:
            self.settings = asked | {"rows": known | rows}

    def complete(
        self,
        bench: Bench,
        row: str,
        method: Method,
        people: Sequence[Person],
        seed: int,
        batch: int,
        report: Callable[[str], None] = print,
    ) -> None:
        """Score those of ``people`` who are missing, ``batch`` at once.

        Raises:
            ValueError: the file has other people.
        """
        lines = self.lines.setdefault((row, seed), [])
        if [line["person"] for line in lines[: len(people)]] != list(people[: len(lines)]):
            raise ValueError(f"{self.path} has other people in row {row!r}; choose another file")
        for first in range(len(lines), len(people), batch):
            lines += fit_and_score(bench, method, people[first : min(first + batch, len(people))], first, seed)
            self._write()
            means = {name: round(_mean_of(lines, name), 3) for name in self.columns if any(name in x for x in lines)}
            report(f"{row} {seed} {len(lines)}/{len(people)} {means}")

    def _write(self) -> None:
        head = [] if self.settings is None else [{"settings": self.settings}]
        rows = [{"row": row, "seed": seed, **line} for (row, seed), lines in self.lines.items() for line in lines]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in head + rows), encoding="utf-8")

    def table(self, rows: Iterable[str], columns: Sequence[str] | None = None) -> str:
        """Markdown: mean over people and seeds ± standard error over people (standard deviation over seeds)."""
        columns = columns or self.columns
        table = ["| method | people | seeds | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|"]
        for row in rows:
            seeds = self.seeds_of(row)
            if seeds:
                people = len({line["person"] for lines in seeds for line in lines})
                cells = [_cell(seeds, column) for column in columns]
                table.append(f"| {row} | {people} | {len(seeds)} | " + " | ".join(cells) + " |")
        return "\n".join(table)

    def seeds_of(self, row: str) -> list[list[dict]]:
        """The lines of a row, seed by seed."""
        return [lines for (name, _), lines in self.lines.items() if name == row and lines]


def statistics(seeds: Sequence[Sequence[dict]], column: str) -> dict[str, float]:
    """Mean over people, its standard error if there are several, and the deviation over seeds if there are several."""
    by_person: dict[Person, list[float]] = {}
    for line in (line for lines in seeds for line in lines):
        if math.isfinite(line.get(column, math.nan)):
            by_person.setdefault(line["person"], []).append(line[column])
    means = [np.mean(values) for values in by_person.values()]
    found = {"mean": float(np.mean(means)) if means else math.nan, "people": len(means)}
    if len(means) > 1:
        found["standard_error"] = float(np.std(means, ddof=1) / len(means) ** 0.5)
    if len(seeds) > 1:
        found["over_seeds"] = float(np.std([_mean_of(lines, column) for lines in seeds], ddof=1))
    return found


def _cell(seeds: list[list[dict]], column: str) -> str:
    found = statistics(seeds, column)
    if not found["people"]:
        return ""
    cell = f"{found['mean']:.2f}"
    if "standard_error" in found:
        cell += f" ± {found['standard_error']:.2f}"
    if "over_seeds" in found:
        cell += f" ({found['over_seeds']:.2f})"
    return cell


def _mean_of(lines: Sequence[dict], column: str) -> float:
    values = [line[column] for line in lines if math.isfinite(line.get(column, math.nan))]
    return float(np.mean(values)) if values else math.nan


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
