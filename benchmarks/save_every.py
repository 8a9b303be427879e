"""What does ``--save-every`` cost? ``python benchmarks/save_every.py``

`hdb personalize` of a drawn portrait, with intermediate LoRAs and without, in turn; no pictures, for the sheet of
steps is drawn after the fit. What is compared is seconds of the processor, for the clock also counts whatever else is
running.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from cli_startup import HDB, Run, run

from testbed.demo import draw_photos


def measure_pair(photo: Path, base: str, steps: int, every: int, folder: Path) -> tuple[Run, Run]:
    """A run without intermediate LoRAs and one with them."""
    command = [*HDB, "personalize", str(photo), "--base", base, "--steps", str(steps), "--no-crop", "--no-preview",
               "--overwrite", "--out", str(folder / "me.safetensors")]  # fmt: skip
    return run(command), run([*command, "--save-every", str(every)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="testbed", help="as hdb personalize takes it")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "portrait.png")
        draw_photos(person=3)[0].save(photo)
        pairs = [measure_pair(photo, arguments.base, arguments.steps, arguments.every, Path(folder))
                 for _ in range(arguments.rounds)]  # fmt: skip
    plain, saved = ([pair[side].processor for pair in pairs] for side in (0, 1))
    for without, with_them in zip(plain, saved, strict=True):
        print(f"without {without:7.2f} s   with {with_them:7.2f} s   {with_them - without:+.2f} s")
    extra = [after - before for before, after in zip(plain, saved, strict=True)]
    print(json.dumps({
        "steps": arguments.steps, "every": arguments.every, "processor_s": {"without": plain, "with": saved},
        "median_s": {"without": statistics.median(plain), "with": statistics.median(saved),
                     "difference": statistics.median(extra)},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
