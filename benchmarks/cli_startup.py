"""How long does a cold `hdb` take? ``python benchmarks/cli_startup.py [--base B]``

First `hdb --help`, compared with an empty Python: the median of several alternating runs of each, and their difference;
the goal is under 0.3 s. Then `hdb personalize` of a drawn portrait: the stages that it reports, and the whole process;
the rest is Python's own start and end.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from testbed.demo import draw_photos

HDB = [sys.executable, "-m", "cli.main"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import click": [sys.executable, "-c", "import click"],
    "hdb --help": [*HDB, "--help"],
    "hdb personalize --help": [*HDB, "personalize", "--help"],
}


class Run(NamedTuple):
    """Wall-clock and CPU seconds of a process, and seconds of the stages that it reports."""

    wall: float
    processor: float
    stages: dict[str, float]


def run(command: list[str]) -> Run:
    start, before = time.perf_counter(), os.times()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    wall, after = time.perf_counter() - start, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    told = re.search(r"^took (.*)$", output, re.MULTILINE)
    stages = re.findall(r"([a-zA-Z ]+) ([\d.]+) s", told[1]) if told else []
    return Run(wall, processor, {name.strip(): float(seconds) for name, seconds in stages})


def measure_help(runs: int) -> dict[str, float]:
    """Print and return the median seconds of each of `COMMANDS`."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            times[name].append(run(command).wall)
    medians = {name: statistics.median(values) for name, values in times.items()}
    nothing = medians["python -c pass"]
    for name, median in medians.items():
        print(f"{name:24}{median:7.3f} s   {median - nothing:+.3f} s   x {median / nothing:.1f}")
    return medians


def measure_personalize(base: str, runs: int) -> dict[str, float]:
    """Print and return the median seconds of each stage of `hdb personalize`, and of the whole."""
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "portrait.png")
        draw_photos(person=3)[0].save(photo)
        options = ["--base", base, "--no-crop", "--no-preview", "--out", f"{folder}/portrait.safetensors"]
        done = [run([*HDB, "personalize", str(photo), *options]) for _ in range(runs)]
    medians = {stage: statistics.median(one.stages[stage] for one in done) for stage in done[0].stages}
    medians["whole process"] = statistics.median(one.wall for one in done)
    medians["of the processor"] = statistics.median(one.processor for one in done)
    for stage, median in medians.items():
        print(f"{stage:24}{median:7.2f} s")
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="testbed", help="as hdb personalize takes it")
    parser.add_argument("--runs", type=int, default=11, help="of each command for help")
    parser.add_argument("--personalize-runs", type=int, default=5)
    arguments = parser.parse_args()
    helped = measure_help(arguments.runs)
    personalized = measure_personalize(arguments.base, arguments.personalize_runs)
    print(json.dumps({"python": sys.version.split()[0], "runs": arguments.runs, "median_s": helped,
                      "base": arguments.base, "personalize_median_s": personalized}))  # fmt: skip


if __name__ == "__main__":
    main()
