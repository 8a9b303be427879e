"""What do pre-optimisation and training cost? ``python benchmarks/preoptimization.py``

LiDB fits per hour with a base's own recipe, N in one batch compared with one at a time, and peak memory by N; for
comparison, the cost of the base itself for as many samples, without an adapter, which is a lower bound. Then steps per
second of training a hypernetwork. Photos are noise, which costs the same. On a CPU the peak is that of the whole
process, which only grows, so the fits come first, from few people to many.

Predicted: on one CPU thread the miniature gains at most a factor of five (fewer, larger matrix products); on a GPU the
gain continues until its arithmetic units are saturated, beyond the largest N here.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from costs import (
    Passes,
    bare_passes,
    base_folder,
    lidb_config_for,
    measure,
    new_parser,
    recipe_for,
    report,
)
from PIL import Image

from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import load_base
from hypernet.fitting.engine import Subject, fit_theta
from hypernet.inputs.people import People, open_people
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.recipe import TARGET_STEPS, FitConfig, TrainConfig
from hypernet.training.loop import train
from lidb_peft import LiDBSpace
from testbed import miniature_hypernetwork_path
from testbed.train_hypernetwork import KEEP_PROMPTS, LEARN_PEOPLE

TRAININGS = {"denoising": LEARN_PEOPLE, "denoising and preservation": KEEP_PROMPTS}


def fit_rows(base: BaseModel, space: LiDBSpace, fit: FitConfig, sizes: list[int], steps: int) -> list[dict]:
    """Cost of fitting N people at once, by N; the first N is one."""
    side = base.unet.config.sample_size
    people = [Subject(str(i), torch.randn(1, 8, side, side), "a sks face", "a face") for i in range(max(sizes))]
    rows = []
    for size in sizes:
        few = replace(fit, steps=steps)
        seconds, peak = measure(lambda tick, n=size, few=few: fit_theta(base, space, people[:n], few, progress=tick),
                                base.device)  # fmt: skip
        bare, _ = measure(bare_passes(base, Passes.of(fit, size), steps), base.device)
        an_hour = 3600 * size / (seconds * fit.steps)
        rows.append({"N": size, "s a step": seconds, "the base's own": bare, "identities an hour": an_hour,
                     "x one at a time": an_hour / (rows[0]["identities an hour"] if rows else an_hour),
                     "peak memory, MB": peak / 1e6})  # fmt: skip
    return rows


def train_rows(base: BaseModel, hypernet: str | Path, batches: list[int], steps: int) -> list[dict]:
    """Cost of training steps of the hypernetwork, by the parts of the loss and the people per step."""
    rows = []
    with TemporaryDirectory() as folder:
        people = _people_of_noise(Path(folder) / "people", max(batches), base.size_px)
        for terms, config in TRAININGS.items():
            for batch in batches:
                network = HyperNetwork.from_pretrained(hypernet).to(base.device)
                few = replace(config, steps=steps, batch_size=batch, validation=0.0, checkpoint_every=steps)
                out = Path(folder) / f"{terms} {batch}"
                seconds, peak = measure(_training(people, base, network, out, few), base.device)
                rows.append({"loss": terms, "people a step": batch, "s a step": seconds, "steps a second": 1 / seconds,
                             "people a second": batch / seconds})  # fmt: skip
                if base.device.type == "cuda":
                    rows[-1]["peak memory, MB"] = peak / 1e6
    return rows


def _training(people: People, base: BaseModel, network: HyperNetwork, out: Path, config: TrainConfig) -> Callable:
    return lambda tick: train(people, base, network, out, config, progress=tick)


def _people_of_noise(folder: Path, count: int, size_px: int) -> People:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (size_px, size_px, 3), np.uint8)).save(folder / f"{index}.png")
    return open_people(folder)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--hypernet", help="to train, on another base than testbed; without one no training is timed")
    parser.add_argument("--copies", type=int, help="noisy copies of a photo in each step of a fit, not the recipe's")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="people fitted at once")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="people a training step")
    parser.add_argument("--steps", type=int, default=6, help="timed of each; the first is left out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = replace(recipe_for(arguments.base), theta_steps=TARGET_STEPS)
    if arguments.copies:
        recipe = replace(recipe, timesteps_per_step=arguments.copies)
    with base_folder(arguments.base) as folder:
        base = load_base(folder, arguments.device, arguments.precision)
    space = LiDBSpace(base.adapted, lidb_config_for(arguments.base))
    sizes = sorted({1, *arguments.sizes})
    tables = {"LiDB fits of N people at once": fit_rows(base, space, recipe.theta_fit, sizes, arguments.steps)}
    hypernet = miniature_hypernetwork_path() if arguments.base == "testbed" else arguments.hypernet
    if hypernet:
        tables["Training the hypernetwork"] = train_rows(base, hypernet, arguments.batches, arguments.steps)
    report(arguments, tables)


if __name__ == "__main__":
    main()
