"""What do pre-optimisation and training cost? ``python benchmarks/preoptimization.py``

Identities an hour of the LiDB fits of a base's own recipe, N of them in one batch beside one at a time, and peak memory
against N; then steps a second of a hypernetwork's training. Photos are noise, which costs the same. Steps are timed one
by one and their median counts, so that loading, warming up and saving do not: on a processor by its own seconds, which
other programs do not lengthen, elsewhere by the clock. Peak memory is CUDA's, or on a processor the whole process's,
which only grows: so the fits go first, from few people to many.

Predicted: on one thread of a processor the miniature gains five times at most (fewer, larger matrix products); on a GPU
it gains until its arithmetic is full, beyond the largest N here.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from hypernet.base_models import BaseModel, load_base
from hypernet.devices import describe_choice
from hypernet.fitting.engine import Subject, fit_theta
from hypernet.inputs.people import People, open_people
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.recipe import TARGET_STEPS, FitConfig, PersonalizeConfig, TrainConfig
from hypernet.training.loop import train
from lidb_peft import LiDBConfig, LiDBSpace
from testbed import MINIATURE_RECIPE, miniature_hypernetwork_path, miniature_lidb_config, miniature_path
from testbed.train_hypernetwork import KEEP_PROMPTS, LEARN_PEOPLE

TRAININGS = {"denoising": LEARN_PEOPLE, "denoising and preservation": KEEP_PROMPTS}


def measure(run: Callable[[Callable], object], device: torch.device) -> tuple[float, int]:
    """Call ``run`` with a progress callback; returns the seconds of a step and the peak memory in bytes."""
    on_cuda, times = device.type == "cuda", []

    def tick(*_) -> None:
        if on_cuda:
            torch.cuda.synchronize(device)
        times.append(time.process_time() if device.type == "cpu" else time.perf_counter())

    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    run(tick)
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else _max_rss_bytes()
    return statistics.median(after - before for before, after in pairwise(times)), peak


def _max_rss_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def fit_rows(base: BaseModel, space: LiDBSpace, fit: FitConfig, sizes: list[int], steps: int) -> list[dict]:
    """What N people at once cost, by N; the first N is one."""
    side = base.unet.config.sample_size
    people = [Subject(str(i), torch.randn(1, 8, side, side), "a sks face", "a face") for i in range(max(sizes))]
    rows = []
    for size in sizes:
        few = replace(fit, steps=steps)
        seconds, peak = measure(lambda tick, n=size, few=few: fit_theta(base, space, people[:n], few, progress=tick),
                                base.device)  # fmt: skip
        an_hour = 3600 * size / (seconds * fit.steps)
        rows.append({"N": size, "s a step": seconds, "identities an hour": an_hour,
                     "x one at a time": an_hour / (rows[0]["identities an hour"] if rows else an_hour),
                     "peak memory, MB": peak / 1e6})  # fmt: skip
    return rows


def train_rows(base: BaseModel, hypernet: str | Path, batches: list[int], steps: int) -> list[dict]:
    """What steps of training the hypernetwork cost, by what the loss is made of and people a step."""
    rows = []
    with TemporaryDirectory() as folder:
        people = _people_of_noise(Path(folder) / "people", max(batches), base.size_px)
        for terms, config in TRAININGS.items():
            for batch in batches:
                network = HyperNetwork.from_pretrained(hypernet).to(base.device)
                few = replace(config, steps=steps, batch=batch, validation=0.0, checkpoint_every=steps)
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


def table(rows: list[dict]) -> str:
    """Markdown."""
    cells = [[value if isinstance(value, str) else f"{value:,.4g}" for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="testbed")
    parser.add_argument("--hypernet", help="To train, on another base than testbed; without one no training is timed.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="People fitted at once.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="People a training step.")
    parser.add_argument("--steps", type=int, default=6, help="Timed of each; the first is left out.")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    is_testbed = arguments.base == "testbed"
    base = load_base(str(miniature_path()) if is_testbed else arguments.base, arguments.device)
    space = LiDBSpace(base.adapted, miniature_lidb_config() if is_testbed else LiDBConfig())
    recipe = replace(MINIATURE_RECIPE if is_testbed else PersonalizeConfig(), theta_steps=TARGET_STEPS)
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    print(json.dumps({"base": arguments.base, "device": describe_choice(base.device, base.dtype),
                      "threads": torch.get_num_threads(), **versions}))  # fmt: skip
    print(table(fit_rows(base, space, recipe.theta_fit, sorted({1, *arguments.sizes}), arguments.steps)), flush=True)
    hypernet = miniature_hypernetwork_path() if is_testbed else arguments.hypernet
    if hypernet:
        print(table(train_rows(base, hypernet, arguments.batches, arguments.steps)))


if __name__ == "__main__":
    main()
