"""The quality of the miniature world, in numbers and a picture: ``python -m testbed.report --out runs/report``.

Everything is measured on the test split, on which nothing was trained or tuned.
"""

import json
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import load_base
from hypernet.fitting.engine import fit_lora
from hypernet.fitting.starts import find_start, load_start
from hypernet.sampling import save_picture, to_image
from hypernet.sheets import contact_sheet
from lidb_peft import LiDBSpace
from lidb_peft.files import atomic_path
from testbed import MINIATURE_RECIPE, miniature_lidb_config, miniature_path
from testbed.corpus import portrait
from testbed.drawing import draw
from testbed.faces import DrawnRecogniser
from testbed.measuring import (
    CHOICES,
    CONTINUOUS,
    AttributeNetwork,
    MeasuringNetwork,
    labels,
    load_attribute_network,
    load_measuring_network,
    to_pixels,
)
from testbed.portraits import SPLITS, identity, random_scene
from testbed.prompts import PROMPTS
from testbed.protocol import (
    Judge,
    Scores,
    draw_prompts,
    own_and_others,
    photo,
    shown_photos,
    shown_subjects,
    true_picture,
)
from testbed.train import psnr_db

TEST = SPLITS["test"]
SEEN = 0.5  # an attribute counts as seen if this fraction of the error of guessing is explained


@torch.no_grad()
def autoencoder_psnr_db(base: BaseModel, count: int = 500) -> dict[str, float]:
    """PSNR of reconstructed test portraits: the mean over pictures, and over all pixels together."""
    pixels = to_pixels([portrait(index, "test")[0] for index in range(count)])
    output = torch.cat([base.vae.decode(base.vae.encode(part).latent_dist.mean).sample for part in pixels.split(100)])
    output = output.clamp(-1, 1)
    alone = [psnr_db(*pair) for pair in zip(output, pixels, strict=True)]
    return {"mean over pictures": float(np.mean(alone)), "all pixels": psnr_db(output, pixels)}


@torch.no_grad()
def attribute_accuracy(network: MeasuringNetwork | AttributeNetwork, plain: bool, count: int = 1000) -> dict:
    """Per attribute on test portraits: R^2 of continuous ones, fraction right of the others; under "unseen", the names
    of those where less than half of the error of guessing the mean or the most common value is explained.

    Args:
        plain: ordinary photographs only, instead of all styles, places and attires.
    """
    pictures, continuous, choices = [], [], []
    for seed in TEST[:count]:
        scene = random_scene(np.random.default_rng((seed, 0xAC)), plain=plain)
        pictures.append(draw(identity(seed), scene))
        numbers, names = labels(identity(seed), scene)
        continuous.append(numbers)
        choices.append(names)
    found = network(to_pixels(pictures))
    truth, right = torch.from_numpy(np.stack(continuous)), torch.from_numpy(np.stack(choices))
    scores, unseen = {}, []
    for index, name in enumerate(CONTINUOUS):
        error = (found.continuous[name] - truth[:, index]).square().mean()
        scores[name] = float(1 - error / truth[:, index].var(correction=0))
        if scores[name] < SEEN:
            unseen.append(name)
    for index, name in enumerate(CHOICES):
        scores[name] = float((found.logits[name].argmax(dim=1) == right[:, index]).float().mean())
        commonest = float(right[:, index].bincount().max()) / count
        if commonest < 1 and (scores[name] - commonest) / (1 - commonest) < SEEN:
            unseen.append(name)
    return {**scores, "unseen": unseen}


@torch.no_grad()
def retrieval(judge: Judge, count: int = 500) -> float:
    """Fraction of test identities whose photo is closest to another photo of themselves among ``count``."""
    first, second = (judge.measure([photo(person, k) for person in TEST[:count]]).embedding for k in (0, 1))
    return float(((first @ second.T).argmax(dim=1) == torch.arange(count)).float().mean())


def prompts_obeyed(scores: Scores) -> dict[str, float]:
    """Fraction of pictures that follow their prompt: for seen words, for unseen words, and by prompt."""
    means = scores.means()
    by_prompt = {name: float(values.mean()) for name, values in scores.right.items()}
    return {"seen": means["seen"], "unseen": means["unseen"], **by_prompt}


def identity_spread(embedding: Tensor) -> float:
    """Mean of 1 - cosine over all pairs."""
    return 1 - own_and_others(embedding @ embedding.T)[1]


def measure_base(base: BaseModel, judge: Judge, count: int) -> tuple[dict, Tensor]:
    """Prompt fidelity and diversity of the base's own samples, compared with real portraits, and its samples."""
    prompts = [PROMPTS[name][0].replace("a [V] face", "a face") for name in judge.prompts]
    samples = draw_prompts(base, None, None, count, prompts=prompts)
    more = draw_prompts(base, None, None, 10 * count, seed=1, prompts=["a face"])[:, 0]
    people = TEST[: 10 * count]
    true = torch.stack([to_pixels([true_picture(person, name) for name in judge.prompts]) for person in TEST[:count]])
    sampled, real = (prompts_obeyed(judge.score(pictures, TEST[:count])) for pictures in (samples, true))
    return {
        "prompts obeyed": sampled,
        "measuring network on true pictures": {group: real[group] for group in ("seen", "unseen")},
        "identity spread of 'a face'": identity_spread(judge.measure(more).embedding),
        "identity spread of real people": identity_spread(judge.measure(shown_photos(people)).embedding),
    }, samples


def measure_fits(base: BaseModel, judge: Judge, count: int, seeds: int) -> tuple[dict, Tensor]:
    """Scores of `MINIATURE_RECIPE` on one photo of each of ``count`` test identities, and pictures of the last seed.

    Without a hypernetwork, from the start beside the base if it has one.
    """
    space = LiDBSpace(base.models_to_adapt(MINIATURE_RECIPE.adapt), miniature_lidb_config())
    people, file = TEST[:count], find_start("", base.name)
    start = None if file is None else load_start(file).of_rank(MINIATURE_RECIPE.rank).flat(space)
    subjects = shown_subjects(base, people)
    rows = []
    for seed in range(seeds):
        recipe = replace(MINIATURE_RECIPE, seed=seed)
        factors, _ = fit_lora(
            base, space, subjects, recipe.lora_fit, recipe.rank, start=start, recogniser=DrawnRecogniser()
        )
        prompts = [PROMPTS[name][0] for name in judge.prompts]
        pictures = draw_prompts(
            base, space, factors, count, recipe.token, seed=seed, guidance=recipe.guidance, prompts=prompts
        )
        rows.append(judge.score(pictures, people).means())
    return {name: {"mean": float(np.mean([row[name] for row in rows])),
                   "by seed": [round(row[name], 3) for row in rows]} for name in rows[0]}, pictures  # fmt: skip


@click.command()
@click.option("--base", "folder", type=click.Path(path_type=Path), help="Another miniature than the bundled one.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for report.json and samples.png.")
@click.option("--people", default=20, show_default=True, help="Samples of each prompt, and people to fit.")
@click.option("--seeds", default=3, show_default=True, help="Fits of each person.")
@click.option("--threads", default=1, show_default=True, help="Processor threads.")
def main(folder: Path | None, out: Path, people: int, seeds: int, threads: int) -> None:
    """Measure the miniature world on test identities."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    base = load_base(str(folder or miniature_path()), device="cpu")
    network = load_measuring_network()
    judge = Judge(network, "test")
    report = {
        "autoencoder, dB": autoencoder_psnr_db(base),
        "measuring network, plain photos": attribute_accuracy(network, plain=True),
        "measuring network, all scenes": attribute_accuracy(network, plain=False),
        "attribute network, plain photos": attribute_accuracy(load_attribute_network(), plain=True),
        "attribute network, all scenes": attribute_accuracy(load_attribute_network(), plain=False),
        "right one of 500 people": retrieval(judge),
        "right one of 500 people, by attributes": retrieval(Judge(load_attribute_network(), "test")),
    }
    click.echo(json.dumps(report, indent=1))
    report["base"], samples = measure_base(base, judge, people)
    click.echo(json.dumps(report["base"], indent=1))
    report["one photo, default recipe"], fitted = measure_fits(base, judge, people, seeds)
    click.echo(json.dumps(report["one photo, default recipe"], indent=1))
    with atomic_path(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    rows = [('base model,\n"a face" ...', [to_image(pixels) for pixels in samples[0]])]
    for index, person in enumerate(TEST[:3]):
        rows.append(("true pictures", [Image.fromarray(true_picture(person, name)) for name in judge.prompts]))
        rows.append(("from one photo", [to_image(pixels) for pixels in fitted[index]]))
    save_picture(contact_sheet(rows, list(judge.prompts)), out / "samples.png")


if __name__ == "__main__":
    main()
