"""Which recipe makes one photo a person? ``python benchmarks/fitting_recipe.py --out runs/recipes.jsonl``

Fits validation identities of the miniature world with every recipe of `ROWS`, several seeds each, and scores pictures
of 15 prompts by the measuring network (`testbed.protocol`): identity of "a [V] face" and of the other prompts, share of
styles and scenes obeyed, background copied from the photo. One JSON line per recipe and seed; what is there is not done
again, so that a killed run goes on. The table gives the mean over seeds and, after it, their standard deviation.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hypernet.base_models import load_base
from hypernet.diffusion import encode_photos
from hypernet.fit import Subject, fit_lora, fit_theta
from hypernet.recipe import PersonalizeConfig
from lidb_peft import LiDBSpace
from testbed import MINIATURE_RECIPE, miniature_lidb_config, miniature_path
from testbed.measuring import load_measuring_network, to_pixels
from testbed.portraits import SPLITS
from testbed.protocol import SHOWN, Judge, draw_prompts, photo

LORA = replace(MINIATURE_RECIPE, theta_steps=0, steps=40, lr=8e-3, rank=8, background=1.0, preservation=0.0)
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
COLUMNS = ("identity", "identity_prompted", "style", "scene", "prompt", "background", "seconds")


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
    base = load_base(arguments.base or str(miniature_path()), device="cpu")
    space = LiDBSpace(base.adapted, miniature_lidb_config())
    people = SPLITS["validation"][: arguments.people]
    subjects = [
        Subject(str(p), encode_photos(base, to_pixels([photo(p, SHOWN)])), LORA.trigger, LORA.class_prompt)
        for p in people
    ]
    judge = Judge(load_measuring_network())

    def score(recipe: PersonalizeConfig) -> dict[str, float]:
        start, theta, factors = time.perf_counter(), None, None
        if recipe.theta_steps:
            theta, _ = fit_theta(base, space, subjects, recipe.theta_fit)
            factors = [space.factors(each) for each in theta]
        if recipe.steps:
            factors, _ = fit_lora(base, space, subjects, recipe.lora_fit, recipe.rank, theta=theta)
        seconds = (time.perf_counter() - start) / len(people)
        pictures = draw_prompts(base, space, factors, len(people), seed=recipe.seed, guidance=recipe.guidance)
        scores = judge.score(pictures, people)
        by_prompt = {name: float(values.mean()) for name, values in scores.right.items()}
        return {**scores.means(), "seconds": seconds, "by_prompt": by_prompt}

    done = _read(arguments.out)
    for seed in arguments.seeds:
        for row in arguments.rows:
            if (row, seed) not in done:
                done[row, seed] = score(replace(ROWS[row], seed=seed))
                with open(arguments.out, "a") as file:
                    file.write(json.dumps({"row": row, "seed": seed, "people": len(people), **done[row, seed]}) + "\n")
                print(row, seed, {name: round(done[row, seed][name], 3) for name in COLUMNS}, flush=True)
    print_table(done)


def _read(path: Path) -> dict[tuple[str, int], dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(line["row"], line["seed"]): line for line in lines}


def print_table(done: dict[tuple[str, int], dict]) -> None:
    print("| recipe | seeds | " + " | ".join(COLUMNS) + " |")
    print("|---|---" + "|---" * len(COLUMNS) + "|")
    for row in ROWS:
        lines = [scores for (name, _), scores in done.items() if name == row]
        if lines:
            values = [[line[column] for line in lines] for column in COLUMNS]
            cells = [f"{np.mean(each):.2f}" + f" ± {np.std(each):.2f}" * (len(each) > 1) for each in values]
            print(f"| {row} | {len(lines)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
