"""Training a hypernetwork (HyperDreamBooth, arXiv:2307.06949, section 4.2), on one process or many.

The folder of a training holds ``last/`` and ``best/``, hypernetworks that `HyperNetwork.from_pretrained` loads;
``samples/``, pictures of held-out people; ``log.jsonl``; ``skipped.jsonl``; and ``training.safetensors``, to resume
from.
"""

import itertools
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import get_scheduler

from hypernet.base_models.base import BaseModel, enable_checkpointing
from hypernet.errors import first_sentence
from hypernet.fitting.losses import layer_scale
from hypernet.fitting.subjects import check_moments
from hypernet.fitting.targets import SKIPPED_FILE, TargetStore
from hypernet.inputs.people import People, Skipped, with_detector, write_skipped
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.processes import tells_of_the_dead, told_of_the_dead
from hypernet.recipe import StageProgress, TrainConfig
from hypernet.training.examples import Batch, Examples, choose_people, training_places
from hypernet.training.objective import SUMMED, Objective
from hypernet.training.setup import (
    BEST,
    LAST,
    LOG_FILE,
    SAMPLES,
    averaged,
    check_folder,
    check_start,
    make_accelerator,
    make_ema,
    make_optimizer,
    recomputes,
    some_targets,
    targets_to_learn,
    trained_parameters,
)
from hypernet.training.state import TrainingState
from hypernet.training.validation import TIMESTEPS, draw_sheet, validation_loader, validation_sums
from lidb_peft import LiDBSpace
from lidb_peft.files import atomic_path, locked_folder


@dataclass
class Trained:
    """The result of a training.

    Attributes:
        folder: the hypernetwork to use: the best on held-out people, or the last one.
        steps: total number of steps done.
        first_loss, loss: first and last logged training loss; None if no steps were left to do.
        best: the lowest loss on held-out people; None without validation.
        skipped: skipped photos and people, name -> reason.
        last, skipped_file: paths of the last hypernetwork and of the list of what was skipped.
        is_main_process: whether this is the main one of the processes that trained together.
    """

    folder: Path
    steps: int = 0
    first_loss: float | None = None
    loss: float | None = None
    best: float | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    is_main_process: bool = True

    @property
    def rose(self) -> bool:
        """Whether the loss is higher at the end than it was."""
        return self.first_loss is not None and self.loss is not None and self.loss > self.first_loss

    @property
    def last(self) -> Path:
        return self.folder.with_name(LAST)

    @property
    def skipped_file(self) -> Path:
        return self.folder.with_name(SKIPPED_FILE)


@told_of_the_dead("training", "resume from the last checkpoint with --resume")
def train(
    people: People,
    base: BaseModel,
    network: HyperNetwork,
    out: str | Path,
    config: TrainConfig,
    targets: str | Path | None = None,
    held_out: People | None = None,
    resume: bool = False,
    trackers: Sequence[str] = (),
    progress: StageProgress | None = None,
    space: LiDBSpace | None = None,
) -> Trained:
    """Train ``network`` in place and write checkpoints to ``out``.

    Processes started by `accelerate launch` or `torchrun` train together, each with its own people; with GPUs, ``base``
    must be on the process's own GPU. The hypernetwork computes in the base's dtype by autocast; its
    weights are float32.

    On a CPU, two processes give bit-identical results to one process with two passes. A batch of twice the size differs
    by rounding: measured on the miniature after 40 steps at 0.001, predictions by 1.5e-7, and by 2e-5 the key biases of
    attention, which its softmax does not see and Adam moves by their rounding.

    Args:
        targets: folder of a target store, for the distance to them.
        held_out: people to validate on, instead of ``config.validation`` of ``people``.
        resume: resume from the last state in ``out``; ``network`` is then the one in ``out``'s ``last/``.
        trackers: trackers supported by accelerate, such as ``tensorboard``; the log is always written.
        progress: called with ("train", steps done, total steps).
        space: the network's, if it has been made on ``base`` already.

    Raises:
        FileNotFoundError: there is no target store, or nothing to resume.
        ValueError: base, targets, network, people and config do not fit together, or the training diverged.
        ConnectionError: another process has died.
        BlockingIOError: another training is at work in ``out``.
        OSError: a checkpoint cannot be written; the previous one is kept.
    """
    out, config = Path(out), with_detector(config)
    check_folder(out, resume, [people.source, None if held_out is None else held_out.source, targets, base.name])
    space = space or network.space_on(base.adapted)
    store = targets_to_learn(targets, space, base, network, config)
    examples, validating = _examples(people, held_out, base, space, config, store)
    accelerator = make_accelerator(base, config, out, trackers)
    scale = None if store is None else layer_scale(space, some_targets(store), config.compare)
    sources = {"people": people, "held-out people": held_out, "targets": store}
    data = {name: source.fingerprint for name, source in sources.items() if source is not None}
    run = _Run(accelerator, Objective(base, space, network, config, scale), examples, validating, out, data)
    with _at_work(accelerator, base, run.recomputes, out, resume):
        run.start(resume)
        run.go(progress)
        accelerator.end_training()
    return run.result


def _examples(
    people: People, held_out: People | None, base: BaseModel, space: LiDBSpace, config: TrainConfig,
    store: TargetStore | None,
) -> tuple[Examples, Examples | None]:  # fmt: skip
    """What is trained on, and what is validated on, if anything is.

    Raises:
        ValueError: nothing could be measured on the held-out people, the people's moments are of another VAE, or as
            `choose_people`.
    """
    if held_out is not None and not config.needs_base:
        raise ValueError("nothing could be measured on the held-out people, who have no targets; let denoising count, "
                         "or hold out a fraction")  # fmt: skip
    for source in (people, held_out):
        if source is not None:
            check_moments(source, base)
    training, validating = choose_people(people, config, store, held_out)
    shape = (space.num_layers, space.row_size)
    examples = Examples(training, base.size_px, config, store, shape, config.timesteps_per_step)
    if not validating:
        return examples, None
    theirs = store if held_out is None else None
    return examples, Examples(validating, base.size_px, config, theirs, shape, TIMESTEPS, True)


@contextmanager
def _at_work(accelerator: Accelerator, base: BaseModel, recomputed: bool, out: Path, resume: bool) -> Iterator[None]:
    """Hold the folder, and what the base needs for training, until the training ends in whatever way."""
    is_main = accelerator.is_main_process
    try:
        with (
            locked_folder(out, "a training") if is_main else nullcontext(),
            base.checkpointed(recomputed),
        ):
            if is_main:
                check_start(out, resume)  # another may have begun, and ended, since
            yield
    finally:
        base.release_vae()


class _Run:
    """A training under way."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        training: Examples,
        validating: Examples | None,
        out: Path,
        data: dict[str, str],
    ) -> None:
        self.accelerator, self.objective, self.out = accelerator, objective, out
        self.training, self.validating = training, validating
        self.config, self.network = objective.config, objective.network
        self.result = Trained(out / LAST, is_main_process=accelerator.is_main_process)
        self.recomputes = recomputes(objective, training)
        if self.recomputes:
            enable_checkpointing(self.network)
        self.model = accelerator.prepare(objective)
        optimizer = make_optimizer(self.network, self.config)  # now that the parameters are where they are trained
        self.schedule = get_scheduler(
            self.config.lr_scheduler, optimizer, min(self.config.warmup_steps, self.config.steps), self.config.steps
        )
        self.optimizer = accelerator.prepare(optimizer)
        self.ema = make_ema(self.network, self.config)
        parts: dict[str, Any] = {"optimizer": optimizer, "schedule": self.schedule}
        if accelerator.scaler is not None:
            parts["scaler"] = accelerator.scaler
        if self.ema is not None:
            parts["ema"] = self.ema
        self.state = TrainingState(self.network, data, parts)
        self.validation = None
        if validating is not None:
            self.validation = validation_loader(validating, accelerator.process_index, self.world, self.is_cuda)
        self.running = torch.zeros(len(SUMMED), device=accelerator.device)
        self.used = 0  # people since the last checkpoint

    @property
    def is_cuda(self) -> bool:
        return self.accelerator.device.type == "cuda"

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    def start(self, resume: bool) -> None:
        """Take over the last state, or write the first, so that a run that is killed at any moment can be resumed."""
        self.objective.train()
        if resume:
            self.state.load(self.out, self.config, self.world)
            if self.ema is not None:
                self.ema.to(self.accelerator.device)
            self.result.skipped = _read_skipped(self.out / SKIPPED_FILE)
        elif self.validating is not None:  # looked at here, so that no step is lost for them
            self._check_held_out(self.validating)
        logged: list[float | None] = [None]
        if self.accelerator.is_main_process:
            (self.out / SAMPLES).mkdir(parents=True, exist_ok=True)
            _trim_log(self.out / LOG_FILE, self.state.step)
            logged = [_logged_validation(self.out / LOG_FILE, self.state.step)]
            if not resume:
                self._save()
        self.accelerator.wait_for_everyone()
        if self.validating is not None and self.state.step:
            validated = gather_object(logged)[0] if self.world > 1 else logged[0]
            if validated is None:  # it was stopped after the checkpoint
                self._validate(self.validating)
            else:
                self.state.best = min(self.state.best, validated)

    def go(self, progress: StageProgress | None) -> None:
        """Train to the last step."""
        state, config = self.state, self.config
        places = training_places(config, len(self.training), state.step, self.accelerator.process_index, self.world)
        loader = DataLoader(
            self.training, batch_sampler=places, collate_fn=self.training.collate, num_workers=config.num_workers,
            generator=torch.Generator(), pin_memory=self.is_cuda,  # the global generator is left alone
        )  # fmt: skip
        for batch in loader:
            self._learn(batch)
            if not self.accelerator.sync_gradients:
                continue
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(trained_parameters(self.network))
            state.step += 1
            is_checkpoint = state.step == config.steps or state.step % config.checkpoint_every == 0
            if is_checkpoint or state.step % config.log_every == 0:
                self._log_training()
            if is_checkpoint:
                self._checkpoint()
            if progress is not None and self.accelerator.is_main_process:
                progress("train", state.step, config.steps)
        if self.ema is not None:  # what the caller has is what is saved
            self.ema.copy_to(trained_parameters(self.network))
        self.result.steps = state.step
        self.result.best = None if self.validating is None else state.best
        self.result.folder = self.out / (LAST if self.result.best is None else BEST)

    def _learn(self, batch: Batch) -> None:
        self.result.skipped.update(batch.skipped)
        with self.accelerator.accumulate(self.model):
            loss, sums = self.model(batch.to(self.accelerator.device))
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.running += sums

    def _log_training(self) -> None:
        means = self._means(self.running, self.training)
        self.running.zero_()
        if means:
            self.used += int(means["people"])
            self.result.loss = means["loss"]
            if self.result.first_loss is None:
                self.result.first_loss = means["loss"]
            self._log({**means, "lr": self.schedule.get_last_lr()[0]})

    def _checkpoint(self) -> None:
        """Save; then validate and draw."""
        if not self.used:
            raise ValueError(self._nobody(self.training))
        self.used = 0
        skipped = [self.result.skipped]
        for entries in gather_object(skipped) if self.world > 1 else skipped:
            self.result.skipped.update(entries)
        if self.accelerator.is_main_process:
            self._save()
        if self.validating is not None:
            self._validate(self.validating)
        self.accelerator.wait_for_everyone()

    def _validate(self, examples: Examples) -> None:
        """Measure and draw held-out people after a checkpoint, which is worth more: what fails costs a warning.

        The line of the log comes last: where it is, all is.
        """
        assert self.validation is not None, "nobody is held out"
        step, sums = self.state.step, torch.zeros_like(self.running)
        with averaged(self.network, self.ema):
            with _costs_a_warning(f"step {step} is saved, but not validated"):
                sums = validation_sums(self.objective, self.validation)
            means = {}
            with _costs_a_warning(f"step {step} is saved, but not validated"):
                means = self._means(sums, examples)
            if means and self.accelerator.is_main_process:
                if means["loss"] < self.state.best:
                    self.network.save_pretrained(self.out / BEST)
                with _costs_a_warning(f"step {step} is saved, but its samples are not drawn"):
                    draw_sheet(self.objective, examples, self.out / SAMPLES / f"step-{step:07d}.png")
        self.objective.train()
        if means:
            self.state.best = min(means["loss"], self.state.best)
            self._log({f"validation_{name}": value for name, value in means.items()})

    def _check_held_out(self, examples: Examples) -> None:
        """Raise ValueError if nobody of the held-out people can be used."""
        reasons: dict[str, str] = {}
        for row in range(len(examples)):
            example = examples[0, row]
            if example.name:
                return
            reasons.update(example.skipped)
        self.result.skipped.update(reasons)
        raise ValueError(self._nobody(examples))

    def _save(self) -> None:
        with averaged(self.network, self.ema):
            self.network.save_pretrained(self.out / LAST)
        write_skipped(self.out / SKIPPED_FILE, itertools.starmap(Skipped, self.result.skipped.items()))
        self.state.save(self.out, self.config, self.world)

    def _means(self, sums: Tensor, examples: Examples) -> dict[str, float]:
        """The mean of each term over the people of all processes, and the loss that they make; nothing of nobody."""
        summed = dict(zip(SUMMED, self.accelerator.reduce(sums.clone(), "sum").tolist(), strict=True))
        people = summed.pop("people")
        if not people:
            return {}
        if examples.targets is None:
            del summed["target_distance"]
        terms = {name: value / people for name, value in summed.items() if getattr(self.config, name)}
        loss = sum(getattr(self.config, name) * value for name, value in terms.items())
        if not math.isfinite(loss):
            raise ValueError(f"the training diverged before step {self.state.step} ({terms}); lower the learning rate "
                             f"{self.config.lr} and train again")  # fmt: skip
        return {"loss": loss, **terms, "people": int(people)}

    def _nobody(self, examples: Examples) -> str:
        found = "; ".join(f"{name}: {reason}" for name, reason in list(self.result.skipped.items())[:1])
        return f"none of the people of {examples.people.source} that were looked at could be used ({found})"

    def _log(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with open(self.out / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.state.step, **values}) + "\n")
        self.accelerator.log(values, step=self.state.step)


@contextmanager
def _costs_a_warning(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, OSError, MemoryError) as error:  # a card's memory is a RuntimeError
        if tells_of_the_dead(error):
            raise
        warnings.warn(f"{what}: {first_sentence(error)}", stacklevel=3)


def logged_loss(folder: str | Path) -> float | None:
    """The loss that a training in ``folder`` has logged last; None before it has logged any."""
    path = Path(folder) / LOG_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    losses = (json.loads(line).get("loss") for line in reversed(lines) if line.endswith("}"))
    return next((loss for loss in losses if loss is not None), None)


def _logged_validation(path: Path, step: int) -> float | None:
    """The validation loss that is logged of a step; None if there is none."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [line["validation_loss"] for line in lines if line["step"] == step and "validation_loss" in line]
    return found[-1] if found else None


def _read_skipped(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    with open(path, encoding="utf-8") as file:  # a name may hold what splitlines takes for the end of a line
        entries = [json.loads(line) for line in file]
    return {entry["name"]: entry["reason"] for entry in entries}


def _trim_log(path: Path, step: int) -> None:
    """Drop what an interrupted run has logged after the state that is gone on from."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
