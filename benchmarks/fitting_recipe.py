"""Which recipe makes one photo a person? ``python benchmarks/fitting_recipe.py --out runs/recipes.jsonl``

Fits validation identities of the miniature world with each recipe in `ROWS`, with several seeds, and scores pictures of
the split's prompts with the measuring network (`testbed.protocol`): identity for "a [V] face" and for the other
prompts, fractions of seen and unseen prompts followed, background copied from the photo. Writes one JSON line per
recipe, seed and person; existing lines are kept, so a killed run resumes. The table gives the mean, its standard error
over people and, in brackets, the standard deviation over seeds; seconds are CPU time, with all people in one batch.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from scoring import Results, World

from hypernet.fitting.engine import fit_lora, fit_theta
from hypernet.recipe import PersonalizeConfig
from lidb_peft import LoraFactors
from testbed import MINIATURE_RECIPE
from testbed.portraits import SPLITS

LORA = replace(
    MINIATURE_RECIPE, theta_steps=0, steps=40, lr=8e-3, rank=8, max_timestep=1000, background=1.0, preservation=0.0,
    timesteps_per_step=4, likeness=0.0,
)  # fmt: skip
KEPT = replace(LORA, preservation=1.0, background=0.2)
THETA = replace(KEPT, theta_steps=100, theta_lr=1e-2, steps=0)
ROWS: dict[str, PersonalizeConfig] = {
    "base": replace(LORA, steps=0),
    "LoRA 40 x 0.008": LORA,
    "LoRA, background 0.2": replace(LORA, background=0.2),
    "LoRA, preservation": replace(LORA, preservation=1.0),
    "LoRA, both": KEPT,
    "LoRA, both, background 0": replace(KEPT, background=0.0),
    "LoRA, both, preservation 3": replace(KEPT, preservation=3.0),
    "LoRA, both, 80 steps": replace(KEPT, steps=80),
    "LoRA, both, 160 steps": replace(KEPT, steps=160),
    "LoRA, both, background 0, 80 steps": replace(KEPT, background=0.0, steps=80),
    "LoRA, both, background 0, 80 steps below 700": replace(KEPT, background=0.0, steps=80, max_timestep=700),
    "LoRA, both, background 0, 80 steps below 500": replace(KEPT, background=0.0, steps=80, max_timestep=500),
    "LoRA, both, lr 0.004": replace(KEPT, lr=4e-3),
    "LoRA, both, lr 0.012": replace(KEPT, lr=1.2e-2),
    "LoRA, both, lr 0.016": replace(KEPT, lr=1.6e-2),
    "LoRA, both, lr 0.024": replace(KEPT, lr=2.4e-2),
    "LoRA, both, rank 2": replace(KEPT, rank=2),
    "LoRA, both, rank 32": replace(KEPT, rank=32),
    "LoRA, both, 160 steps of 1 timestep": replace(KEPT, steps=160, timesteps_per_step=1),
    "theta 100 x 0.01, both": THETA,
    "theta 100 x 0.02, both": replace(THETA, theta_lr=2e-2),
    "theta 100 x 0.05, both": replace(THETA, theta_lr=5e-2),
    "theta 400 x 0.02, both": replace(THETA, theta_steps=400, theta_lr=2e-2),
    "theta 100 x 0.02, neither": replace(THETA, theta_lr=2e-2, background=1.0, preservation=0.0),
    "theta 100 x 0.02, LoRA 40, both": replace(THETA, theta_lr=2e-2, steps=40),
    "theta 100 x 0.02, LoRA 40, both, background 0": replace(THETA, theta_lr=2e-2, steps=40, background=0.0),
    "theta 100 x 0.01, LoRA 40, both": replace(THETA, steps=40),
    "theta 100 x 0.01, LoRA 40, neither": replace(THETA, steps=40, background=1.0, preservation=0.0),
}


@contextmanager
def fitted(
    world: World, people: Sequence[int], seed: int, recipe: PersonalizeConfig
) -> Iterator[list[LoraFactors] | None]:
    recipe, subjects, theta, factors = replace(recipe, seed=seed), world.subjects(people), None, None
    if recipe.theta_steps:
        theta, _ = fit_theta(world.base, world.space, subjects, recipe.theta_fit)
        factors = [world.space.factors(each) for each in theta]
    if recipe.steps:
        factors, _ = fit_lora(world.base, world.space, subjects, recipe.lora_fit, recipe.rank, theta)
    yield factors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", help="Another miniature than the bundled one.")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    world, results = World("validation", arguments.base), Results(arguments.out)
    people = SPLITS["validation"][: arguments.people]
    for seed in arguments.seeds:
        for row in arguments.rows:
            results.complete(world, row, partial(fitted, recipe=ROWS[row]), people, seed, len(people))
    print(results.table(ROWS))


if __name__ == "__main__":
    main()
