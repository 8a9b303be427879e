"""What does fitting N identities in one batch save over one at a time? ``python benchmarks/batched_fit.py``

Predicted: on a processor two to three times at most (fewer, larger matrix products); on a GPU far more, until its
arithmetic is full. Runs on the bundled miniature with random photos, or on ``--base``.
"""

import argparse
import json
import time

import diffusers
import torch
import transformers

from hypernet.base_models import load_base
from hypernet.fitting.engine import Subject, fit_theta
from hypernet.recipe import FitConfig
from lidb_peft import LiDBConfig, LiDBSpace
from testbed import miniature_lidb_config, miniature_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="testbed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    is_testbed = arguments.base == "testbed"
    base = load_base(str(miniature_path()) if is_testbed else arguments.base, arguments.device)
    space = LiDBSpace(base.adapted, miniature_lidb_config() if is_testbed else LiDBConfig())
    side = base.unet.config.sample_size
    subjects = [Subject(str(i), torch.randn(1, 8, side, side), "a sks face") for i in range(max(arguments.sizes))]

    def seconds(size: int) -> float:
        """Per step of the whole batch, after one warm-up step, the best of three."""
        best = float("inf")
        fit_theta(base, space, subjects[:size], FitConfig(steps=1, lr=1e-3))
        for _ in range(3):
            start = time.perf_counter()
            fit_theta(base, space, subjects[:size], FitConfig(steps=arguments.steps, lr=1e-3))
            best = min(best, (time.perf_counter() - start) / arguments.steps)
        return best

    alone = seconds(1)
    rows = {}
    print(f"{'N':>4}{'s a step':>12}{'identity-steps/s':>20}{'x one at a time':>18}")
    for size in arguments.sizes:
        step = alone if size == 1 else seconds(size)
        rows[size] = step
        print(f"{size:4}{step:12.4f}{size / step:20.1f}{size * alone / step:18.2f}")
    versions = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    print(json.dumps({"base": arguments.base, "device": str(base.device), "threads": torch.get_num_threads(),
                      **versions, "seconds_per_step": rows}))  # fmt: skip


if __name__ == "__main__":
    main()
