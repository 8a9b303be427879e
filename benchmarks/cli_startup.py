"""How long does `hdb --help` take beside an empty Python? ``python benchmarks/cli_startup.py``

Prints the median of several runs of each, taken in turn, and their difference; the aim is under 0.3 s.
"""

import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import click": [sys.executable, "-c", "import click"],
    "hdb --help": [sys.executable, "-m", "cli.main", "--help"],
    "hdb personalize --help": [sys.executable, "-m", "cli.main", "personalize", "--help"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(runs: int = 11) -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    nothing = medians["python -c pass"]
    for name, median in medians.items():
        print(f"{name:24}{median:7.3f} s   {median - nothing:+.3f} s   x {median / nothing:.1f}")
    print(json.dumps({"python": sys.version.split()[0], "runs": runs, "median_s": medians}))


if __name__ == "__main__":
    main()
