"""Which method makes one photo a person? ``python benchmarks/personalization_methods.py --out runs/methods.jsonl``

Tables 1 to 3 of HyperDreamBooth (arXiv:2307.06949) on the miniature world: one photo of each of its test identities,
our method compared with DreamBooth, LoRA DreamBooth and Textual Inversion, whose settings were chosen on validation
identities (``--table tuning``). `testbed.protocol` describes the measures; *features* corresponds to the paper's DINO
column: how similar "a [V] face" is to the input photo, by the measuring network's features before its embedding, on a
scale where 0 is another person's photo and 1 another photo of the same person.

``--table steps`` gives identity by number of finetuning steps, with and without the prediction.
``--details`` adds a table of likeness by attribute, on plain pictures and in prompts.

``_2`` columns are by the second measuring network, which reads only attributes; *spread* is how much 16 samples of "a
[V] face" vary in pose, zoom and background (1: as much as true photos), with the first seed only.

Writes one JSON line per row, seed and person; existing lines are kept, so a killed run resumes. A table gives the mean,
its standard error over people, and in brackets the standard deviation over seeds; seconds are CPU time per person, with
the row's batch of people fitted at once.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scoring import DETAILS, Results, World, equal_steps

from hypernet.evaluation import baselines
from hypernet.evaluation.harness import Method
from hypernet.fitting.engine import fit_lora, fit_theta
from hypernet.fitting.starts import find_start, load_start
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.recipe import FitConfig
from lidb_peft import LoraFactors
from testbed import MINIATURE_RECIPE
from testbed.faces import DrawnRecogniser
from testbed.portraits import SPLITS
from testbed.protocol import shown_photos

CURVE_STEPS = (0, 5, 10, 20, 40, 80, 160, 320, 640)
PLAIN, PREDICTED = "no hypernetwork", "hypernetwork"


@contextmanager
def relaxed(
    world: World,
    people: Sequence[int],
    seed: int,
    steps: int,
    network: Path | None = None,
    start: bool = True,
    **changes: Any,
) -> Iterator[list[LoraFactors] | None]:
    """Our LoRA, with or without the theta that a hypernetwork predicts.

    Args:
        start: use the learned start next to the hypernetwork, or else next to the base, if there is one.
        changes: changed fields of the recipe.
    """
    recipe = replace(MINIATURE_RECIPE, steps=steps, seed=seed, **changes)
    space = world.space if recipe.adapt == "all" else world.denoiser_space
    theta = bases = None
    if network is not None:
        hypernetwork = _load_network(network)
        space = world.space_of_layers(name for name, *_ in hypernetwork.config.layers)
        hypernetwork.check_space(space)
        theta, bases = hypernetwork(shown_photos(people)), hypernetwork.bases
    file = find_start("" if network is None else str(network), world.base.name) if start else None
    first = None if file is None else load_start(file).flat(space)
    if steps or first is not None:
        factors, _ = fit_lora(
            world.base, space, world.subjects(people), recipe.lora_fit, recipe.rank, theta, bases=bases, start=first,
            recogniser=DrawnRecogniser(),
        )  # fmt: skip
        yield factors
    else:
        yield None if theta is None else [space.factors(each, bases) for each in theta]


@contextmanager
def untouched(world: World, people: Sequence[int], seed: int) -> Iterator[None]:
    """The unchanged base."""
    yield


@contextmanager
def lidb(world: World, people: Sequence[int], seed: int, steps: int, lr: float) -> Iterator[list[LoraFactors]]:
    """LiDB's theta alone, fitted from theta_0 with our recipe."""
    recipe = replace(MINIATURE_RECIPE, theta_steps=steps, theta_lr=lr, seed=seed)
    thetas, _ = fit_theta(world.base, world.space, world.subjects(people), recipe.theta_fit)
    yield [world.space.factors(theta) for theta in thetas]


@contextmanager
def lora_dreambooth(
    world: World, people: Sequence[int], seed: int, rank: int, steps: int, lr: float
) -> Iterator[list[LoraFactors]]:
    """LoRA with the plain denoising loss, one timestep a step."""
    factors, _ = fit_lora(world.base, world.space, world.subjects(people), FitConfig(steps, lr, seed=seed), rank)
    yield factors


@contextmanager
def dreambooth(world: World, people: Sequence[int], seed: int, steps: int, lr: float) -> Iterator[None]:
    (subject,) = world.subjects(people)
    with baselines.dreambooth(world.base, subject, world.class_moments, steps, lr, seed):
        yield


@contextmanager
def textual_inversion(
    world: World, people: Sequence[int], seed: int, start: str, steps: int, lr: float
) -> Iterator[None]:
    subjects, token = world.subjects(people), MINIATURE_RECIPE.token
    with baselines.textual_inversion(world.base, subjects, token, start, steps, lr, seed):
        yield


@cache
def _load_network(folder: Path) -> HyperNetwork:
    network = HyperNetwork.from_pretrained(folder).requires_grad_(False)
    found = network.config.prompt.replace("[V]", network.config.token)
    if found != MINIATURE_RECIPE.trigger:
        raise ValueError(f"{folder} was trained for {found!r}; this benchmark asks for {MINIATURE_RECIPE.trigger!r}")
    return network


@dataclass(frozen=True)
class Row:
    """A method with its settings.

    Attributes:
        people, seeds: their default numbers.
        batch: people fitted at once.
        class_pictures: whether it needs the base's own pictures of the class.
    """

    method: Method
    people: int = 20
    seeds: int = 1
    batch: int = 20
    class_pictures: bool = False


def _dreambooth_row(steps: int, lr: float) -> Row:
    return Row(partial(dreambooth, steps=steps, lr=lr), batch=1, class_pictures=True)


def _relaxed_name(start: str, steps: int) -> str:
    if start == PLAIN:
        return f"{PLAIN}, {steps} steps"
    return f"{start} + {steps} steps" if steps else f"{start} alone"


BEFORE = {"likeness": 0.0, "timesteps_per_step": 4}  # of the recipe before 2026-11-30
COMPARED_CLOSELY = {"people": 40, "seeds": 3}
ROWS: dict[str, Row] = {
    "base": Row(untouched, **COMPARED_CLOSELY),
    **{_relaxed_name(PLAIN, steps): Row(partial(relaxed, steps=steps), **COMPARED_CLOSELY) for steps in (20, 40)},
    **{
        f"{PLAIN} or start, {steps} steps": Row(
            partial(relaxed, steps=steps, start=False, **BEFORE), **COMPARED_CLOSELY
        )
        for steps in (20, 80)
    },
    # The recipe before 2026-11-29 adapted the text encoder too and used noisier timesteps.
    f"{PLAIN} or start, 80 steps on all layers": Row(
        partial(relaxed, steps=80, start=False, adapt="all", max_timestep=700, **BEFORE), **COMPARED_CLOSELY
    ),
    "DreamBooth 1200": _dreambooth_row(1200, 1e-4),
    "DreamBooth 400": _dreambooth_row(400, 3e-4),
    "DreamBooth 40": _dreambooth_row(40, 1e-3),
    "Textual Inversion": Row(partial(textual_inversion, start="sks", steps=400, lr=1e-2)),
    "LoRA DreamBooth rank 1": Row(partial(lora_dreambooth, rank=1, steps=400, lr=2e-3)),
    "LoRA DreamBooth rank 8": Row(partial(lora_dreambooth, rank=8, steps=400, lr=1e-3)),
    "LiDB alone": Row(partial(lidb, steps=400, lr=2e-2), **COMPARED_CLOSELY),
}
DREAMBOOTH_GRID = {40: (8, (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)), 400: (4, (1e-4, 3e-4, 1e-3)), 1200: (3, (1e-4, 3e-4))}
TUNING: dict[str, Row] = {
    **{f"DreamBooth {steps} x {lr:g}": replace(_dreambooth_row(steps, lr), people=people)
       for steps, (people, lrs) in DREAMBOOTH_GRID.items() for lr in lrs},
    **{f"Textual Inversion from {start!r}, {steps} x {lr:g}":
       Row(partial(textual_inversion, start=start, steps=steps, lr=lr), people=8)
       for start, steps, lr in (("face", 400, 3e-3), ("face", 400, 1e-2), ("face", 400, 3e-2), ("sks", 400, 1e-2))},
    **{f"LoRA DreamBooth rank {rank}, 400 x {lr:g}":
       Row(partial(lora_dreambooth, rank=rank, steps=400, lr=lr), people=8)
       for rank, lrs in ((1, (1e-3, 2e-3, 8e-3, 3e-2)), (8, (5e-4, 1e-3, 3e-3, 8e-3))) for lr in lrs},
    **{f"LiDB alone, 400 x {lr:g}": Row(partial(lidb, steps=400, lr=lr), people=4) for lr in (1e-2, 2e-2)},
}  # fmt: skip
"""Settings tried on validation identities, with fewer people for fits that take minutes."""


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    rows = _choose_rows(arguments)
    world, results = World(arguments.split, arguments.base), Results(arguments.out)
    for name in arguments.rows or rows:
        row = rows[name]
        if row.class_pictures:
            _ = world.class_moments  # drawn once, so no part of a person's seconds
        for seed in range(arguments.seeds or row.seeds):
            people = SPLITS[arguments.split][: arguments.people or row.people]
            results.complete(world, name, row.method, people, seed, row.batch)
    print(curve_table(results, arguments.people) if arguments.table == "steps" else results.table(rows))
    if arguments.details:
        for suffix in ("", "_prompted"):
            print("\n" + results.table(rows, [name + suffix for name in DETAILS]))


def _choose_rows(arguments: argparse.Namespace) -> dict[str, Row]:
    if arguments.table == "tuning":
        return TUNING if arguments.hypernetwork is None else TUNING | max_timestep_rows(arguments.hypernetwork)
    if arguments.table == "steps":
        return curve_rows(arguments.hypernetwork)
    rows = {}
    if arguments.hypernetwork:
        rows |= network_rows(PREDICTED, arguments.hypernetwork, **COMPARED_CLOSELY)
    if arguments.one_round:
        rows["k = 1"] = Row(partial(relaxed, steps=40, network=arguments.one_round), **COMPARED_CLOSELY)
    for name, folder in arguments.network:
        rows |= network_rows(name, folder)
    return rows | ROWS


def network_rows(name: str, folder: Path, **sizes: int) -> dict[str, Row]:
    return {
        _relaxed_name(name, steps): Row(partial(relaxed, steps=steps, network=folder), **sizes)
        for steps in (40, 10, 3, 0)
    } | {
        f"{_relaxed_name(name, 10)} without likeness": Row(
            partial(relaxed, steps=10, network=folder, **BEFORE), **sizes
        )
    }


def max_timestep_rows(hypernetwork: Path) -> dict[str, Row]:
    return {
        f"{_relaxed_name(PREDICTED, 40)} below {most}": Row(
            partial(relaxed, steps=40, network=hypernetwork, max_timestep=most, **BEFORE)
        )
        for most in (300, 500, 700, 1000)
    }


def curve_rows(hypernetwork: Path | None) -> dict[str, Row]:
    starts = {PLAIN: None} if hypernetwork is None else {PLAIN: None, PREDICTED: hypernetwork}
    return {
        _relaxed_name(start, steps): Row(partial(relaxed, steps=steps, network=folder))
        for start, folder in starts.items()
        for steps in CURVE_STEPS
    }


def curve_table(results: Results, num_people: int | None) -> str:
    """Identity by steps, without and with the prediction, and how many steps without it reach the same."""
    num_people = num_people or Row.people  # the same for all steps, also where the file has more

    def curve(start: str) -> list[float]:
        rows = [results.lines.get((_relaxed_name(start, steps), 0), [])[:num_people] for steps in CURVE_STEPS]
        return [float(np.mean([line["identity"] for line in lines])) if lines else float("nan") for lines in rows]

    plain, predicted = curve(PLAIN), curve(PREDICTED)
    table = [f"| steps | {PLAIN} | {PREDICTED} | steps without it for the same |", "|---|---|---|---|"]
    for steps, without, reached in zip(CURVE_STEPS, plain, predicted, strict=True):
        equal = equal_steps(reached, plain, CURVE_STEPS)
        table.append(f"| {steps} | {without:.2f} | {reached:.2f} | {equal} |")
    return "\n".join(table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", choices=("methods", "tuning", "steps"), default="methods")
    parser.add_argument("--split", choices=("validation", "test"), help="Default: test; for tuning validation.")
    parser.add_argument("--base", help="Another miniature than the bundled one.")
    parser.add_argument("--hypernetwork", type=Path, metavar="DIR", help="Ours.")
    parser.add_argument("--one-round", type=Path, metavar="DIR", help="The one that was trained with one round.")
    parser.add_argument("--network", type=_named_folder, action="append", default=[], metavar="NAME=DIR",
                        help="Another hypernetwork, alone and with 40 steps; may be given several times.")  # fmt: skip
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="Default: all of the table.")
    parser.add_argument("--details", action="store_true", help="Print likeness by attribute too.")
    parser.add_argument("--people", type=int, help="Default: the row's.")
    parser.add_argument("--seeds", type=int, help="How many; default: the row's.")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    arguments.split = arguments.split or ("validation" if arguments.table == "tuning" else "test")
    if arguments.table == "tuning" and arguments.split != "validation":
        parser.error("settings are chosen on validation identities; leave --split out")
    unknown = set(arguments.rows or []) - set(_choose_rows(arguments))
    if unknown:
        parser.error(f"no row is called {sorted(unknown)}; there are {list(_choose_rows(arguments))}")
    return arguments


def _named_folder(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=DIR")
    return name, Path(folder)


if __name__ == "__main__":
    main()
