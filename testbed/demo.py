"""The whole pipeline from a portrait to a LoRA on the bundled miniature, with a picture and a score of each stage."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from converters.sidecar import check_companions
from hypernet.base_models.loading import load_base
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.network.prediction import predicted_recipe
from hypernet.personalization import personalize
from hypernet.personalized import Personalization
from hypernet.recipe import StageProgress
from hypernet.sampling import save_picture
from hypernet.sheets import contact_sheet
from lidb_peft import LoraFactors
from lidb_peft.outputs import check_output, check_output_folder
from testbed import MINIATURE_RECIPE, miniature_hypernetwork_path, miniature_path
from testbed.measuring import load_measuring_network, to_pixels
from testbed.portraits import SPLITS
from testbed.prompts import PLAIN, PROMPTS, SEEN
from testbed.protocol import SHOWN, Judge, photo, true_picture

COLUMNS = ("plain", "pencil", "night", "crown", "snow", "cartoon crown", "neon")
UNHEARD_OF = "(nobody was trained with this prompt)"
NUM_STEPS = 25


@dataclass(frozen=True)
class DemoFiles:
    photo: Path
    lora: Path
    sheet: Path


def run_demo(
    out: str | Path,
    person: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    progress: StageProgress | None = None,
) -> tuple[DemoFiles, Personalization]:
    """Personalise the miniature on one photo of an identity on which nothing was trained, and show each stage.

    Args:
        person: which identity of the test split.
        seed: random seed of fits and pictures.
        overwrite: replace the files of an earlier demo in ``out``.

    Raises:
        ValueError, OSError: as `check_output` for each of the files.
    """
    out = Path(out)
    files = DemoFiles(out / "photo.png", out / "sks.safetensors", out / "demo.png")
    check_output_folder(out)
    for file in (files.photo, files.lora, files.sheet):
        check_output(file, suffix=file.suffix, overwrite=overwrite, parents=True)
    check_companions(files.lora, preview=True, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)
    shown, truth = draw_photos(person)
    save_picture(shown.resize((256, 256), Image.Resampling.NEAREST), files.photo)

    base = load_base(str(miniature_path()), device="cpu")
    network = HyperNetwork.from_pretrained(miniature_hypernetwork_path())
    recipe = replace(predicted_recipe(network.config, MINIATURE_RECIPE), seed=seed, crop=False)
    result = personalize([files.photo], base, recipe, hypernet=network, progress=progress)
    prompts = [PROMPTS[column][0].replace("[V]", recipe.token) for column in COLUMNS]
    judge = Judge(load_measuring_network(), "test", COLUMNS)

    def row(label: str, pictures: list[Image.Image]) -> tuple[str, list[Image.Image]]:
        pixels = to_pixels([np.asarray(picture) for picture in pictures])[None]
        scores = judge.score(pixels, [SPLITS["test"][person]])
        likeness = torch.stack(list(scores.identities.values())).mean().clamp(0, 1).item()
        obeyed = int(sum(scores.right.values()))
        return f"{label}\n\nlikeness {likeness:.0%}\nprompts {obeyed} of {len(scores.right)}", pictures

    def drawn(label: str, stage: str, factors: LoraFactors | None) -> tuple[str, list[Image.Image]]:
        report = None if progress is None else partial(progress, f"draw {stage}")
        return row(label, result.draw(prompts, factors, NUM_STEPS, report))

    rows = [
        ("the one photo\nthat is given", [shown]),
        drawn("base model\n(does not know\nthe person)", "base model", None),
        drawn(f"predicted from\nthe photo in\n{result.seconds['predict']:.1f} s", "prediction", result.theta_factors),
        drawn(f"and {recipe.steps} steps of\nfinetuning\n(the LoRA)", "LoRA", result.factors),
        row("right answers\n(never shown)", truth),
    ]
    heads = [f"{PROMPTS[column][0]} {'' if column in PLAIN | SEEN else UNHEARD_OF}" for column in COLUMNS]
    sheet = contact_sheet(rows, heads)
    preview = rows[3][1][0].resize((512, 512), Image.Resampling.NEAREST)
    result.save(files.lora, preview=preview, overwrite=overwrite)
    save_picture(sheet, files.sheet)
    return files, result


def draw_photos(person: int) -> tuple[Image.Image, list[Image.Image]]:
    """The one photo of a test identity, and the true picture of that person for each of `COLUMNS`."""
    seed = SPLITS["test"][person]
    return Image.fromarray(photo(seed, SHOWN)), [Image.fromarray(true_picture(seed, column)) for column in COLUMNS]
