"""Make the miniature's hypernetwork from scratch: ``python -m testbed.train_hypernetwork --out runs/hypernetwork``.

Stages: draw people, a few plain photos of each; train a vision transformer to tell them apart, like a face recognition
network; train the hypernetwork around it as `hdb train` does; drop the text encoder and continue on prompts
(`testbed.lessons`); train a network that recognises people, and continue with the likeness of drawn pictures in the
loss (`testbed.likeness`); pack; learn where finetunings start, with and without predictions, as `hdb learn-start` does.
Each stage resumes where it was stopped.
"""

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import load_base
from hypernet.fitting.engine import Subject
from hypernet.fitting.starts import START_FILE, load_start, save_start
from hypernet.inputs.people import People, open_people
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.quiet import quiet_libraries
from hypernet.recipe import FitConfig, StageProgress, StartConfig, TrainConfig
from hypernet.training.loop import train
from hypernet.training.setup import BEST, LAST
from hypernet.training.start import learn_start, resumable_start
from hypernet.training.state import has_state
from lidb_peft import LiDBSpace
from lidb_peft.families import get_family
from testbed import MINIATURE_RECIPE, MINIATURE_SIZE_PX, miniature_lidb_config, miniature_path
from testbed.faces import DrawnRecogniser
from testbed.lessons import Lessons, without_text_encoder
from testbed.likeness import FIRST_STOP, Likeness, RecogniserStage, train_recogniser
from testbed.measuring import MeasuringNetwork
from testbed.measuring_training import SHOTS, Labelled, draw_labelled, train_to_tell_people
from testbed.portraits import SPLITS
from testbed.protocol import photo, photo_scene, shown_photos, shown_subjects
from testbed.trainer import Run, Trainer, fixed_initialisation, level_then_falling

HELD_OUT = 64  # people of the validation split
PHOTOS = 3  # of each person
ENCODER_WIDTH = 160
HYPERNETWORK = {
    "hidden_size": 128, "num_attention_heads": 4, "k": 1, "train_encoder": True, "learned_bases": True,
}  # fmt: skip
LEARN_PHOTOS = TrainConfig(
    steps=4_000, lr=4e-4, warmup_steps=100, batch_size=8, timesteps_per_step=4, background=0.0, same_photo=True,
    crop=False, num_workers=0, log_every=25,
)  # fmt: skip
LEARN_PEOPLE = replace(LEARN_PHOTOS, steps=7_500, same_photo=False)
KEEP_PROMPTS = replace(LEARN_PEOPLE, steps=800, lr=2e-4, warmup_steps=50, preservation=1.0, checkpoint_every=200)

IN_PROMPTS = 2_050  # steps of `testbed.lessons`
IN_PROMPTS_LR, IN_PROMPTS_EMA = 3e-4, 0.9985
RECOGNISER = RecogniserStage("recogniser", people=9_000, steps=2_200, noise=0.15)
BETTER_RECOGNISER = RecogniserStage("better-recogniser", people=16_000, steps=4_000, noise=0.1)
START_PREDICTED = StartConfig(rounds=24, people=16, inner_steps=10)
START_ALONE = replace(START_PREDICTED, rounds=16, inner_steps=20)


@dataclass(frozen=True)
class LikenessStage:
    """A training whose loss has the likeness of drawn pictures; the options of `testbed.lessons.Lessons`.

    Attributes:
        name: of its folder.
        first_stop: the first step of a drawing at which it may be read.
        trains_start: train the start for predictions too, which is applied beside all of them.
    """

    name: str
    steps: int
    seed: int
    likeness_from: int = 0
    one_copy_from: int = 0
    preservation: float = 1.0
    recogniser: RecogniserStage = RECOGNISER
    first_stop: int = FIRST_STOP
    trains_start: bool = False


WITH_LIKENESS = (
    LikenessStage("likeness", 1_900, seed=1, likeness_from=615, one_copy_from=846),
    LikenessStage("more-likeness", 2_300, seed=2, preservation=2.0),
    LikenessStage(
        "hypernetwork", 2_600, seed=3, preservation=2.0, recogniser=BETTER_RECOGNISER, first_stop=4, trains_start=True
    ),
)


class WithStart(nn.Module):
    """A hypernetwork, and the start ``(lora_size(rank),)`` beside its predictions."""

    def __init__(self, network: HyperNetwork, start: Tensor) -> None:
        super().__init__()
        self.network, self.start = network, nn.Parameter(start)


class PhotoFeatures(nn.Module):
    """The mean of a vision transformer's tokens, ``(n, width)``, for pictures ``(n, 3, 32, 32)`` in [-1, 1]."""

    def __init__(self, encoder: ViTModel):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixel_values=pixels).last_hidden_state.mean(dim=1)


def build_encoder() -> ViTModel:
    """A vision transformer with 16 patches and 1.3 million parameters."""
    config = ViTConfig(
        image_size=MINIATURE_SIZE_PX, patch_size=8, hidden_size=ENCODER_WIDTH, intermediate_size=4 * ENCODER_WIDTH,
        num_hidden_layers=4, num_attention_heads=4,
    )  # fmt: skip
    with fixed_initialisation():
        return ViTModel(config, add_pooling_layer=False)


def draw_people(folder: Path, count: int) -> Labelled:
    """Plain photos of the training split's first people; cached in ``folder``."""
    return draw_labelled(
        folder, "people", SPLITS["train"][:count], lambda seed: [photo_scene(seed, shot) for shot in range(SHOTS)]
    )


def train_encoder(run: Run, people: Labelled, num_steps: int) -> Path:
    """Train the encoder to tell people apart; returns its folder."""
    folder = run.out / "encoder"
    if not (folder / "model.safetensors").exists():
        encoder = build_encoder()
        with fixed_initialisation():
            network = MeasuringNetwork(PhotoFeatures(encoder), ENCODER_WIDTH)
        train_to_tell_people("encoder", run, network, people, num_steps)
        with quiet_libraries():
            encoder.save_pretrained(folder)
    return folder


def write_people(folder: Path, split: str, images: np.ndarray) -> People:
    """Write photos of a split's first people as PNG files, one folder for each person, as `hdb train` reads them.

    Args:
        images: ``(n, shots, 32, 32, 3)`` uint8; the first ``PHOTOS`` of each are written.
    """
    for seed, photos in zip(SPLITS[split][: len(images)], images, strict=True):
        person = folder / f"{seed:07d}"
        if not person.exists():
            unfinished = folder / f".{person.name}"  # no person to its readers
            unfinished.mkdir(parents=True, exist_ok=True)
            for shot in range(PHOTOS):
                Image.fromarray(photos[shot]).save(unfinished / f"{shot}.png")
            unfinished.rename(person)
    return open_people(folder)


def train_hypernetwork(out: Path, encoder: Path, images: np.ndarray, fraction: float, progress: StageProgress) -> Path:
    """Train on the people in ``images``, or resume.

    First the input photo is denoised, which teaches most; then another photo of the same person, where only the
    person's likeness helps; then with prompt preservation too.

    Args:
        images: as for `write_people`, of the training split.

    Returns:
        The folder of the hypernetwork, which still adapts the text encoder too.
    """
    base = load_base(str(miniature_path()), device="cpu")
    space = LiDBSpace(base.adapted, miniature_lidb_config())
    training = write_people(out / "train", "train", images)
    others = SPLITS["validation"][:HELD_OUT]
    photos = np.stack([[photo(person, shot) for shot in range(PHOTOS)] for person in others])
    held_out = write_people(out / "validation", "validation", photos)
    before = None
    for number, config in enumerate((LEARN_PHOTOS, LEARN_PEOPLE, KEEP_PROMPTS), start=1):
        config = replace(config, steps=math.ceil(fraction * config.steps))
        folder = out / f"training-{number}"
        resume = has_state(folder)
        start = folder / LAST if resume else before
        if start is not None:
            network = HyperNetwork.from_pretrained(start)
        else:
            network = HyperNetwork.from_encoder(encoder, space, "testbed", **HYPERNETWORK)
        train(training, base, network, folder, config, held_out=held_out, resume=resume, progress=progress)
        before = folder / BEST
    return before


def train_in_prompts(run: Run, before: Path) -> Path:
    """Continue training the hypernetwork in ``before``, on the denoiser alone; returns its folder, in float16."""
    folder = run.out / "in-prompts"
    if not (folder / "model.safetensors").exists():
        base, space = load_denoiser()
        network = without_text_encoder(HyperNetwork.from_pretrained(before), space).train()
        trainer = Trainer(
            "in-prompts", run, network, IN_PROMPTS, IN_PROMPTS_LR, IN_PROMPTS_EMA, schedule=level_then_falling
        )
        trainer.run(Lessons(base, space, network))
        network.save_pretrained(folder, dtype=torch.float16)
    return folder


def train_with_likeness(run: Run, stage: LikenessStage, before: Path, start: Path) -> Path:
    """Continue training the hypernetwork in ``before``, with a loss on drawings; returns its folder, in float16.

    Args:
        start: the start's file; the folder gets it, or what the stage makes of it.
    """
    folder = run.out / stage.name
    if not (folder / "model.safetensors").exists():
        base, space = load_denoiser()
        network, rank = HyperNetwork.from_pretrained(before).train(), MINIATURE_RECIPE.rank
        both = WithStart(network, load_start(start).of_rank(rank).flat(space)) if stage.trains_start else None
        trainer = Trainer(
            stage.name, run, network if both is None else both, stage.steps, IN_PROMPTS_LR, IN_PROMPTS_EMA,
            schedule=level_then_falling,
        )  # fmt: skip
        people = math.ceil(stage.recogniser.people * run.fraction)
        recogniser = train_recogniser(run, base, replace(stage.recogniser, people=people))
        likeness = Likeness(base, space, recogniser, stage.first_stop)
        trainer.run(
            Lessons(
                base, space, network, stage.seed, likeness, stage.likeness_from, stage.one_copy_from,
                stage.preservation, None if both is None else both.start,
            )
        )  # fmt: skip
        folder.mkdir(exist_ok=True)
        if both is None:
            shutil.copy(start, folder / START_FILE)
        else:
            save_start(folder / START_FILE, both.start.detach(), rank, space)
        network.save_pretrained(folder, dtype=torch.float16)
    return folder


def load_denoiser() -> tuple[BaseModel, LiDBSpace]:
    """The base, and the space of its denoiser's layers."""
    base = load_base(str(miniature_path()), device="cpu")
    return base, LiDBSpace({get_family(base.family).denoiser.name: base.denoiser}, miniature_lidb_config())


def learn_a_start(run: Run, name: str, config: StartConfig, fit: FitConfig, network: HyperNetwork | None) -> Path:
    """Learn where finetunings of the denoiser start, with a hypernetwork's predictions or without; returns the file."""
    file = run.out / f"{name}.safetensors"
    if not file.exists():
        base, space = load_denoiser()
        config = replace(config, rounds=math.ceil(run.fraction * config.rounds))

        def people(number: int) -> tuple[list[Subject], Tensor | None]:
            seeds = SPLITS["train"][number * config.people : (number + 1) * config.people]
            return shown_subjects(base, seeds), None if network is None else network(shown_photos(seeds))

        bases = None if network is None else network.bases
        rank, recogniser = MINIATURE_RECIPE.rank, DrawnRecogniser() if fit.likeness else None
        with resumable_start(run.out / f"{name}.unfinished.safetensors", space, rank) as (state, checkpoint):
            learn_start(base, space, people, config, fit, state, rank, bases, None, checkpoint, recogniser)
            save_start(file, state.start, rank, space)
    return file


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Working folder; resumes what it holds.")
@click.option("--people", default=20_000, show_default=True, help="Identities of the training split.")
@click.option("--encoder-steps", default=2_500, show_default=True, help="Encoder steps of 128 photos.")
@click.option("--fraction", default=1.0, show_default=True, help="Of the steps of the hypernetwork's own training.")
@click.option("--threads", default=1, show_default=True, help="Processor threads.")
@click.option("--init-from", type=click.Path(path_type=Path), help="Train this one on in prompts; nothing before that.")
def main(
    out: Path, people: int, encoder_steps: int, fraction: float, threads: int, init_from: Path | None
) -> None:  # fmt: skip
    """Make the miniature's hypernetwork from scratch, or resume a run that was stopped."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    if init_from is None:
        init_from = train_from_nothing(out, people, encoder_steps, fraction)
    run = Run(out, fraction)
    in_prompts = train_in_prompts(run, init_from)
    # Of the one before likeness: 30 steps through the loss of the next stages brought it nothing.
    network = HyperNetwork.from_pretrained(in_prompts).requires_grad_(False)
    fit = replace(MINIATURE_RECIPE.lora_fit, likeness=0.0, timesteps_per_step=4)
    start = learn_a_start(run, "start-predicted", START_PREDICTED, fit, network)
    folder = in_prompts
    for stage in WITH_LIKENESS:
        folder = train_with_likeness(run, stage, folder, start)
    alone = learn_a_start(run, "start-alone", START_ALONE, MINIATURE_RECIPE.lora_fit, None)
    click.echo(f"wrote {folder}, with {START_FILE}, and {alone}, which goes into the miniature's folder")


def train_from_nothing(out: Path, people: int, encoder_steps: int, fraction: float) -> Path:
    """The stages before those on prompts; returns the folder of the hypernetwork, which adapts all layers."""
    drawn = draw_people(out, people)
    encoder = train_encoder(Run(out), drawn, encoder_steps)
    began = time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        if done % LEARN_PEOPLE.log_every == 0:
            click.echo(f"{stage} {done} of {total}, {(time.monotonic() - began) / 60:.0f} min", err=True)

    return train_hypernetwork(out, encoder, drawn.images, fraction, report)


if __name__ == "__main__":
    main()
