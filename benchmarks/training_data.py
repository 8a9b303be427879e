"""What does a training pay for its photos? ``python benchmarks/training_data.py``

The same training of the miniature's hypernetwork on a folder of photographs without and with the cache, on its first
and second use, on a prepared data set, and on one with the VAE's moments; whether the losses are the folder's, and what
float16 costs in moments and bytes. Rounds are interleaved. Photos are one real photograph (scikit-image's) at different
brightness, so that faces are found.

Predicted: the first use pays for every face once, later ones for none; the losses are equal to the bit but for moments,
whose are equal to three digits.
"""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from costs import base_folder, new_parser, report
from PIL import Image, ImageEnhance
from skimage.data import astronaut

from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import load_base
from hypernet.data_sets import train
from hypernet.inputs.people import open_people, prepare_person
from hypernet.inputs.prepared import prepare
from testbed import miniature_hypernetwork_path

MODES = ("folder", "cache, first use", "cache, second use", "prepared", "prepared, moments")


def train_rows(base: BaseModel, images: Path, folder: Path, steps: int, rounds: int) -> list[dict]:
    """Processor seconds of each way, by round, and whether its losses are those of the folder."""
    rows = []
    for number in range(rounds):
        _use_cache(folder / f"assets-{number}")
        losses: dict[str, list[float]] = {}
        for mode in MODES:
            source = {"prepared": folder / "prepared", "prepared, moments": folder / "moments"}.get(mode, images)
            out = folder / f"{number} {mode}"
            start = time.process_time()
            train(source, out, base, hypernet=miniature_hypernetwork_path(), steps=steps, batch_size=4, num_workers=0,
                  validation=0.0, checkpoint_every=steps, log_every=1, cache=mode.startswith("cache"))  # fmt: skip
            seconds = time.process_time() - start
            losses[mode] = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
            pairs = zip(losses[mode], losses["folder"], strict=True)
            off = max(abs(found - expected) / expected for found, expected in pairs)
            rows.append({"round": number, "photos from": mode, "CPU s": seconds, "CPU s a step": seconds / steps,
                         "largest relative difference of a loss": off})  # fmt: skip
    return rows


def _use_cache(folder: Path) -> None:
    from huggingface_hub import constants

    constants.HF_ASSETS_CACHE = str(folder)


def moments_rows(base: BaseModel, folder: Path) -> list[dict]:
    """What float16 changes in the moments, and what storing them adds to the files."""
    people = [prepare_person(person, base.size_px, True)[0] for person in open_people(folder / "moments")]
    start = time.process_time()
    exact = torch.cat([base.encode_photos(person.pixels, release=False) for person in people if person])
    seconds = (time.process_time() - start) / len(exact)
    base.release_vae()
    stored = torch.cat([person.moments for person in people if person]).float().reshape(exact.shape)
    mean, log_variance = (stored - exact).abs().chunk(2, dim=1)
    sizes = [sum(file.stat().st_size for file in (folder / name).glob("*.parquet")) for name in ("prepared", "moments")]
    return [{"photos": len(exact), "largest error of a mean": mean.max().item(), "of a log variance":
             log_variance.max().item(), "relative error, rms": ((stored - exact).norm() / exact.norm()).item(),
             "bytes a photo": sizes[0] / len(exact), "with moments": sizes[1] / len(exact),
             "CPU s to encode a photo": seconds}]  # fmt: skip


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="of each training, of 4 people")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with base_folder(arguments.base) as name:
        base = load_base(name, arguments.device, arguments.precision)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        for index in range(arguments.people):
            photo = ImageEnhance.Brightness(Image.fromarray(astronaut())).enhance(0.7 + 0.6 * index / arguments.people)
            photo.save(folder / "images" / f"{index:02}.png")
        prepare(folder / "images", folder / "prepared", base.size_px)
        prepare(folder / "images", folder / "moments", base.size_px, base=base)
        tables = {
            "Training": train_rows(base, folder / "images", folder, arguments.steps, arguments.rounds),
            "Moments in float16": moments_rows(base, folder),
        }
    report(arguments, tables)


if __name__ == "__main__":
    main()
