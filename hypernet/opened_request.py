"""A request on a base model, opened once, and the fits of people that it asks for: theta, then the LoRA beside it."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hypernet.base_models.base import BaseModel
from hypernet.checkpoints import Checkpoints, Writer, run_record
from hypernet.fitting.engine import KeptStep, fit_lora, fit_theta, relaxed_factors
from hypernet.fitting.running import Observer, RunningFit
from hypernet.fitting.starts import AUTO_START, LoraStart, find_start, load_start
from hypernet.fitting.subjects import make_subjects
from hypernet.inputs.people import PreparedPerson
from hypernet.inputs.recognition import load_recogniser
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.network.prediction import load_network, predict_people
from hypernet.personalized import Personalization, lora_metadata
from hypernet.prompts import check_trained_prompt, warn_of_prompts
from hypernet.recipe import PersonalizeConfig, Progress, StageProgress
from hypernet.request import Request
from hypernet.sampling import generate
from hypernet.sheets import DrawConfig, infotext_of
from hypernet.timing import timed
from hypernet.watching import Watch
from lidb_peft import LiDBConfig, LiDBSpace, LoraFactors, ThetaFile, base_fingerprint, check_record
from lidb_peft.record import recorded_models

FIT_THETA, FINETUNE = "fit theta", "finetune LoRA"
"""Stages of a fit."""


class Starts(NamedTuple):
    """Where the fits of N people start.

    Attributes:
        theta: ``(L, row)`` or ``(N, L, row)``.
        bases: learned ones that theta is in, by label; None takes the frozen ones.
    """

    theta: Tensor
    bases: dict[str, Tensor] | None = None


class OpenedRequest:
    """A request on a base model: everything that does not depend on the people, made once.

    Attributes:
        space: of the thetas.
        start, start_source: the flat LoRA that finetunings start from, and its file; None and "" draw fresh ones.
        network: the hypernetwork that predicts where fits start, loaded; None if there is none.
        recogniser: the network that recognises people in the finetuning; None if the recipe needs none.
        seconds: time of each stage; it becomes every result's.
        kept: the step of the people before, for the next ones; None keeps none.
    """

    kept: KeptStep | None = None

    def __init__(self, request: Request, base: BaseModel, seconds: dict[str, float] | None = None) -> None:
        """Open a request.

        Raises:
            ValueError: its hypernetwork or theta file is of another base.
        """
        self.request, self.base = request, base
        check_trained_prompt(base, request.config.trigger, request.config.token)
        warn_of_prompts(base, request.previews or ())
        base.prepare_prompts(request.prompts)
        self.seconds = {} if seconds is None else seconds
        self.network: HyperNetwork | None = None
        if isinstance(request.network, HyperNetworkConfig):
            with timed(self.seconds, "load hypernetwork"):
                self.network = load_network(request.network)
        else:
            self.network = request.network
        if self.network is not None:
            self.space = self.network.space_on(base.adapted)
        else:
            file = request.theta_file
            self.space = (
                recipe_space(base, request.config, request.lidb_config)
                if file is None
                else _theta_space(base, file, request.theta_source)
            )
        self.start, self.start_source = self._open_start()
        self.recogniser = load_recogniser(base.name, request.config, base.device)

    def _open_start(self) -> tuple[Tensor | None, str]:
        """The start of finetunings; ``auto`` uses an existing start that fits, and warns of one that does not.

        Raises:
            ValueError: the start that was asked for is of other layers.
        """
        start, rank = self.request.start, self.request.config.rank
        if isinstance(start, LoraStart):
            return start.flat(self.space), start.source
        network = self.request.network_config
        file = None
        if start == AUTO_START:
            file = find_start("" if network is None else network.name_or_path or "", self.base.name)
        if file is None:
            return None, ""
        try:
            return load_start(file).of_rank(rank).flat(self.space), str(file)
        except ValueError as error:
            warnings.warn(f"the finetuning starts at a fresh LoRA: {error}", stacklevel=3)
            return None, ""

    def starts(self, people: Sequence[PreparedPerson], progress: StageProgress | None = None) -> Starts:
        """Where the fits of these people start: at a prediction for each, or all at one theta."""
        if self.network is None:
            file = self.request.theta_file
            return Starts(self.space.theta_0 if file is None else file.theta)
        with timed(self.seconds, "predict"):
            return Starts(*predict_people(self.network, people, self.base.device, _of_stage(progress, "predict")))

    def checkpoints(
        self, people: Sequence[PreparedPerson], outs: Sequence[Path | None], state: Path, writer: Writer
    ) -> Checkpoints:
        """Where a fit of these people leaves its files; see `Checkpoints`."""
        request, base = self.request, self.base
        record = run_record(
            request.config, base=base_fingerprint(self.space.models) or base.name, dtype=str(base.dtype),
            photos=" ".join(person.key for person in people), start=self.start_source, theta=request.theta_source,
            hypernetwork="" if request.network_config is None else request.network_config.name_or_path or "",
        )  # fmt: skip
        metadata = [lora_metadata(base, request.config.trigger, num_photos=len(person.photos)) for person in people]
        return Checkpoints(outs, state, writer, metadata, record)

    def fit(
        self,
        people: Sequence[PreparedPerson],
        starts: Starts,
        progress: StageProgress | None = None,
        watch: Watch | None = None,
        checkpoints: Checkpoints | None = None,
        resumed: Mapping[str, Any] | None = None,
    ) -> list[Personalization | ValueError]:
        """Fit several people at once, each with their own weights; a diverging fit yields an error with the reason.

        Args:
            watch: what is wanted while the fit runs.
            checkpoints: where its files go; None keeps what is wanted in memory alone.
            resumed: the state of a fit of the same people to go on from, see `Checkpoints.load_state`.
        """
        base, space, config = self.base, self.space, self.request.config
        (theta, bases), losses = starts, {}
        failed: dict[int, str] = {}
        snapshots: list[dict[int, LoraFactors]] = [{} for _ in people]
        with timed(self.seconds, "prepare photos"):
            subjects = make_subjects(
                base, people, config.trigger, config.class_prompt, self.kept, self.recogniser, failed
            )
        if len(failed) == len(people):
            return [ValueError(reason) for reason in failed.values()]
        stage, state = (None, None) if resumed is None else (resumed["stage"], resumed["fit"])
        if resumed is not None and stage == FINETUNE:
            theta, losses = resumed["theta"], dict(resumed["losses"])
            failed |= {int(person): reason for person, reason in resumed.get("failed", {}).items()}
        elif config.theta_steps:
            save_state = _state_saver(checkpoints, FIT_THETA, theta, {}, {})
            observe = self._observer(
                watch, FIT_THETA, lambda _, own: space.factors(own, bases), snapshots, checkpoints, save_state
            )
            with timed(self.seconds, FIT_THETA):
                theta, losses[FIT_THETA] = fit_theta(
                    base, space, subjects, config.theta_fit, theta, _of_stage(progress, FIT_THETA), bases, failed,
                    self.kept, observe, state,
                )  # fmt: skip
        theta = theta.expand(len(people), *space.theta_0.shape)
        if failed:  # what is not finite is not gone on from
            theta = theta.clone()
            theta[list(failed)] = space.theta_0
        finetuned: Sequence[LoraFactors | None] = [None] * len(people)
        stopped_at = _stopped_at(losses, FIT_THETA, config.theta_steps)
        # What a prediction lacks, a start has in part before any step.
        if stopped_at is None and (config.steps or self.start is not None):
            is_identity = torch.equal(theta, space.theta_0.expand_as(theta))  # which would only add to the rank
            own = None if is_identity else theta

            def relaxed(person: int, lora: Tensor) -> LoraFactors:
                return relaxed_factors(space, lora, config.rank, None if own is None else own[person], bases)

            save_state = _state_saver(checkpoints, FINETUNE, theta, dict(losses), dict(failed))
            observe = self._observer(watch, FINETUNE, relaxed, snapshots, checkpoints, save_state)
            state = state if stage == FINETUNE else None
            with timed(self.seconds, FINETUNE):
                finetuned, losses[FINETUNE] = fit_lora(
                    base, space, subjects, config.lora_fit, config.rank, own,
                    _of_stage(progress, FINETUNE), bases, self.start, failed,
                    self.kept, observe, state, self.recogniser,
                )  # fmt: skip
            stopped_at = _stopped_at(losses, FINETUNE, config.steps)
        return [
            ValueError(failed[i]) if i in failed else Personalization(
                base, space, config, theta[i], person.photos, bases, finetuned[i], self.seconds,
                {name: values[:, i : i + 1] for name, values in losses.items()},
                start_source=self.start_source, snapshots=snapshots[i], stopped_at=stopped_at,
            )
            for i, person in enumerate(people)
        ]  # fmt: skip

    def _observer(
        self,
        watch: Watch | None,
        stage: str,
        factors: Callable[[int, Tensor], LoraFactors],
        snapshots: list[dict[int, LoraFactors]],
        checkpoints: Checkpoints | None,
        save_state: Callable[[RunningFit], None] | None,
    ) -> Observer | None:
        """What to call after each step of a stage; of the last stage alone LoRAs are kept and pictures drawn.

        Args:
            factors: a person's number and their parameters -> what their LoRA would be.
            snapshots: takes each person's factors, by step.
        """
        if watch is None:
            return None
        config = self.request.config
        if stage == FIT_THETA and config.steps:
            return watch.observer(stage, save_state=save_state)

        def current(run: RunningFit) -> Iterator[tuple[int, LoraFactors]]:
            for person, own in enumerate(run.weights()):
                is_wanted = checkpoints is None or checkpoints.outs[person] is not None
                if is_wanted and torch.isfinite(own).all():  # one that has diverged is told of in the end
                    yield person, factors(person, own)

        def keep(run: RunningFit) -> None:
            for person, own in current(run):
                if checkpoints is None or len(snapshots) == 1:  # those of many, which files hold, fill the memory
                    snapshots[person][run.step] = own
                if checkpoints is not None:
                    checkpoints.keep_lora(person, run.step, own)

        def draw(run: RunningFit) -> dict[int, Image.Image]:
            pictures = {}
            for person, own in current(run):
                (pictures[person],) = generate(
                    self.base, config.trigger, self.space, own, config.seed, guidance=config.guidance
                )
                if checkpoints is not None:
                    text = infotext_of(self.base, config.trigger, config.seed, DrawConfig(guidance=config.guidance))
                    checkpoints.keep_picture(person, run.step, pictures[person], str(text))
            self.base.release_vae()
            return pictures

        return watch.observer(stage, keep, draw, save_state)


def _state_saver(
    checkpoints: Checkpoints | None, stage: str, theta: Tensor, losses: dict[str, Tensor], failed: dict[int, str]
) -> Callable[[RunningFit], None] | None:
    return None if checkpoints is None else lambda run: checkpoints.keep_state(stage, run, theta, losses, failed)


def _stopped_at(losses: dict[str, Tensor], stage: str, num_steps: int) -> tuple[str, int] | None:
    done = len(losses.get(stage, ()))
    return (stage, done) if stage in losses and done < num_steps else None


def recipe_space(base: BaseModel, config: PersonalizeConfig, lidb_config: LiDBConfig) -> LiDBSpace:
    """The layers that a recipe adapts, unless a hypernetwork or theta file determines them."""
    return LiDBSpace(base.models_to_adapt(config.adapt), lidb_config)


def _theta_space(base: BaseModel, file: ThetaFile, source: str) -> LiDBSpace:
    """The space of the models that a theta file is of."""
    space = LiDBSpace(recorded_models(base.adapted, file.base_fingerprint, source), file.config)
    check_record(file.record, space, source)
    return space


def _of_stage(progress: StageProgress | None, stage: str) -> Progress | None:
    return None if progress is None else partial(progress, stage)
