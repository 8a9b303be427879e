"""The whole way from a portrait to a LoRA on the bundled miniature, with a picture of every stage."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from hypernet.base_models import load_base
from hypernet.personalize import Personalization, personalize
from hypernet.recipe import StageProgress
from hypernet.sampling import contact_sheet, save_picture
from lidb_peft import LoraFactors
from testbed import MINIATURE_RECIPE, MINIATURE_SIZE_PX, miniature_lidb_config, miniature_path
from testbed.drawing import draw
from testbed.portraits import SPLITS, identity, random_scene

# Column -> prompt, and what of the scene it changes.
PROMPTS = {
    "a [V] face": ("a [V] face", {}),
    "pencil": ("a pencil drawing of a [V] face", {"style": "pencil"}),
    "watercolour": ("a watercolour painting of a [V] face", {"style": "watercolour"}),
    "neon": ("a neon sign of a [V] face", {"style": "neon"}),
    "at night": ("a [V] face at night", {"place": "night"}),
    "in a crown": ("a [V] face wearing a crown", {"attire": "crown"}),
}
NUM_STEPS = 25


@dataclass(frozen=True)
class DemoFiles:
    photo: Path
    lora: Path
    theta: Path
    sheet: Path


def run_demo(
    out: str | Path, person: int = 3, seed: int = 0, progress: StageProgress | None = None
) -> tuple[DemoFiles, Personalization]:
    """Draw an identity that nothing was trained on, personalise the miniature on one photo of it, show every stage.

    Args:
        person: which identity of the test split.
        seed: starting noise of fits and pictures.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = DemoFiles(out / "photo.png", out / "sks.safetensors", out / "sks-theta.safetensors", out / "demo.png")
    photo, *truth = draw_photos(person)
    save_picture(photo.resize((256, 256), Image.Resampling.NEAREST), files.photo)

    base = load_base(str(miniature_path()), device="cpu")
    recipe = replace(MINIATURE_RECIPE, seed=seed, crop=False)
    result = personalize([files.photo], base, recipe, miniature_lidb_config(), progress=progress)
    prompts = [prompt.replace("[V]", recipe.token) for prompt, _ in PROMPTS.values()]

    def pictures(stage: str, factors: LoraFactors | None) -> list[Image.Image]:
        report = None if progress is None else partial(progress, stage)
        return result.draw(prompts, factors, NUM_STEPS, report)

    rows = [
        ("the one photo,\nand right answers\n(never shown)", [photo, *truth]),
        ("base model", pictures("draw base model", None)),
        ("after the\nLiDB fit\n(rank 1)", pictures("draw LiDB fit", result.theta_factors)),
        ("after relaxed\nfinetuning\n(the LoRA)", pictures("draw LoRA", result.factors)),
    ]
    sheet = contact_sheet(rows, list(PROMPTS))
    preview = rows[-1][1][0].resize((512, 512), Image.Resampling.NEAREST)
    result.save(files.lora, preview=preview)
    result.save_theta(files.theta)
    save_picture(sheet, files.sheet)
    return files, result


def draw_photos(person: int) -> list[Image.Image]:
    """One plain photo of a test identity, then the same person as each further prompt of `PROMPTS` asks for."""
    seed = SPLITS["test"][person]
    rng = np.random.default_rng((seed, 0xDE))
    scenes = [replace(random_scene(rng, plain=True), **change) for _, change in PROMPTS.values()]
    return [Image.fromarray(draw(identity(seed), scene, MINIATURE_SIZE_PX)) for scene in scenes]
