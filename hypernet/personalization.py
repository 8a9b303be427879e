"""One person's photos in, a standard LoRA out: predict or fit theta, relax the rank, finetune, join both (section 4).

theta starts at a hypernetwork's prediction, at a theta file, or at the shared starting vector.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from converters import KohyaMetadata, prepare_conversion, write_lora
from converters.sidecar import check_companions, write_our_picture
from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import Base, as_base
from hypernet.checkpoints import Checkpoints, Writer, run_record, state_path, step_path
from hypernet.fitting.engine import KeptStep, fit_lora, fit_theta, relaxed_factors
from hypernet.fitting.running import Observer, RunningFit
from hypernet.fitting.starts import AUTO_START, LoraStart, find_start, load_start
from hypernet.fitting.subjects import make_subjects
from hypernet.inputs.people import PreparedPerson
from hypernet.inputs.photos import Photo
from hypernet.inputs.pictures import PhotoLike
from hypernet.loss_curve import loss_curve
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.network.prediction import Hypernet, load_network, predict_people
from hypernet.pictures import Pictures
from hypernet.prompts import check_trained_prompt, warn_of_prompts
from hypernet.recipe import DEFAULT_BASE, PersonalizeConfig, Progress, StageProgress
from hypernet.request import NO_THETA_FILE, PersonRequest, Request, loss_path, request_person
from hypernet.sampling import generate
from hypernet.sheets import DrawConfig, infotext_of
from hypernet.timing import timed
from hypernet.watching import StepReport, Watch
from lidb_peft import LiDBConfig, LiDBSpace, LoraFactors, ThetaFile, base_fingerprint, check_record, save_theta
from lidb_peft.outputs import check_output
from lidb_peft.record import recorded_models

FIT_THETA, FINETUNE = "fit theta", "finetune LoRA"
"""Stages of a fit."""
_FEWEST_STEPS = 10  # of a fit whose loss tells more than its noise


@dataclass(repr=False)
class Personalization:
    """A person's weights.

    Attributes:
        theta: ``(L, row)``.
        photos: the prepared photos, at least one.
        bases: the learned bases of ``theta``, by label; None if they are the frozen ones.
        finetuned: theta and the finetuned LoRA combined into one set of factors; None without finetuning and start.
        start_source: the file of the LoRA that the finetuning started from; "" if it was a fresh one.
        seconds: time of each stage; people fitted together share it.
        losses: mean denoising loss of each step, ``(steps, 1)``, by stage.
        files: the files written.
        left_out: unusable photos, a sentence for each.
        snapshots: the factors after intermediate steps of the last stage, by step, in order.
        stopped_at: the stage and step after which the fit was stopped; None if it was not.
    """

    base: BaseModel
    space: LiDBSpace
    config: PersonalizeConfig
    theta: Tensor
    photos: Sequence[Photo]
    bases: dict[str, Tensor] | None = None
    finetuned: LoraFactors | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    start_source: str = ""
    left_out: Sequence[str] = ()
    snapshots: dict[int, LoraFactors] = field(default_factory=dict)
    stopped_at: tuple[str, int] | None = None

    @cached_property
    def theta_factors(self) -> LoraFactors:
        """theta as LoRA factors."""
        return self.space.factors(self.theta, self.bases)

    @property
    def factors(self) -> LoraFactors:
        """The factors for the LoRA file: theta, and the finetuned LoRA if there is one."""
        return self.theta_factors if self.finetuned is None else self.finetuned

    def __repr__(self) -> str:
        rank = next(iter(self.factors.values()))[0].shape[0]
        lines = [
            f"{type(self).__name__} of {len(self.photos)} photo{'s'[: len(self.photos) != 1]} on {self.base.name}",
            f'  a LoRA of rank {rank} on {len(self.factors)} layers that answers to "{self.config.trigger}"',
            f"  made in {sum(self.seconds.values()):.1f} s: {', '.join(self.seconds)}",
            f"  written: {', '.join(map(str, self.files)) or 'nothing yet; save(FILE.safetensors) writes it'}",
        ]
        return "\n".join(lines)

    @property
    def loss_notes(self) -> list[str]:
        """Where the loss of each stage began and ended, and a warning where it rose, in sentences."""
        notes = []
        for stage, values in self.losses.items():
            count = max(1, len(values) // 4)
            first, last = (float(part.mean()) for part in (values[:count], values[-count:]))
            rose = ""
            if last > first and len(values) >= _FEWEST_STEPS:
                rose = "; it rose, so the weights are overcooked: lower the learning rate, or take fewer steps"
            if len(values):
                notes.append(f"{stage}: loss {first:.3f} at first, {last:.3f} at the end{rose}")
        return notes

    def draw(
        self,
        prompts: str | Sequence[str],
        factors: LoraFactors | None,
        num_steps: int = 30,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Draw prompts with ``factors``, this person's or None for the base, from the noise of the config's seed."""
        return generate(
            self.base, prompts, self.space, factors,
            seed=self.config.seed, num_steps=num_steps, guidance=self.config.guidance, progress=progress,
        )  # fmt: skip

    def save(
        self,
        path: str | Path,
        preview: Image.Image | None = None,
        dtype: torch.dtype = torch.float16,
        to: str = "kohya",
        step: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the LoRA: kohya safetensors with A1111's sidecar and, if given, a preview picture, or another format.

        Args:
            to: one of `converters.FORMATS` that hold a LoRA, such as ``diffusers``, or ``peft``, which is a folder.
            step: write the one after this step, which must be among the snapshots.
            overwrite: what is at ``path``, and a sidecar or pictures of somebody else's beside it, may be replaced.

        Raises:
            FileExistsError: something is there, and is not to be replaced.
            ValueError: there is no snapshot of ``step``.
            ValueError, OSError: as `check_output`.
        """
        metadata = lora_metadata(self.base, self.config.trigger, num_photos=len(self.photos))
        factors = self.factors if step is None else self.snapshots.get(step)
        if factors is None:
            kept = ", ".join(map(str, self.snapshots)) or "none; pass save_every"
            raise ValueError(f"there is no LoRA of step {step}; kept are those of {kept}")
        if to == "kohya":
            check_output(path, overwrite=overwrite)
            check_companions(Path(path), self.config.trigger, preview=preview is not None, overwrite=overwrite)
            self.files += write_lora(path, factors, metadata, dtype=dtype, preview=preview)
            return
        with TemporaryDirectory() as folder:
            kohya, *_ = write_lora(Path(folder) / "lora.safetensors", factors, metadata, dtype=dtype)
            self.files += prepare_conversion(kohya, path, to, overwrite=overwrite).write()

    def save_losses(self, lora: Path) -> None:
        """Draw the loss of a fit that took a step beside its LoRA, ``<lora>-loss.png``."""
        if any(map(len, self.losses.values())):
            write_our_picture(loss_curve(self.losses), loss_path(lora))
            self.files.append(loss_path(lora))

    def save_theta(self, path: str | Path, overwrite: bool = False) -> None:
        """Write theta alone, 53 KB for Stable Diffusion 1.5.

        Args:
            overwrite: a file at ``path`` may be replaced.

        Raises:
            ValueError: its bases are learned.
            ValueError, OSError: as `check_output`.
        """
        if self.bases is not None:
            raise ValueError(NO_THETA_FILE)
        check_output(path, overwrite=overwrite)
        save_theta(
            path,
            self.theta,
            self.space,
            base_model_name=Path(self.base.name).name,
            base_fingerprint=base_fingerprint(self.space.models),
        )
        self.files.append(Path(path))


def personalize(
    photos: PhotoLike | Iterable[PhotoLike],
    base: Base = DEFAULT_BASE,
    config: PersonalizeConfig | None = None,
    lidb_config: LiDBConfig | None = None,
    from_theta: str | Path | None = None,
    hypernet: Hypernet | None = "auto",
    progress: StageProgress | None = None,
    start: str | Path | None = AUTO_START,
    save_every: int | None = None,
    preview_every: int | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> Personalization:
    """Personalise a base model on photos of one person.

    ``personalize("me.jpg").save("me.safetensors")`` is all it takes.

    Args:
        photos: one or several, as `open_photos` reads them: files, pictures, arrays or tensors.
        base: a loaded base model, or what `load_base` loads: an id, a folder, a file, or ``testbed``.
        config: recipe; by default the base's own, or with a hypernetwork its `predicted_recipe`.
        lidb_config: the bases; by default the base's own, for Stable Diffusion the paper's a = 100 and b = 50. Theta
            files and hypernetworks bring their own.
        from_theta: a theta file to start from instead of the shared starting vector.
        hypernet: hypernetwork whose prediction to start from: an id, a folder, or a loaded one, which stays on its
            device. ``none`` or None uses none; ``auto`` uses a bundled base's own, unless ``config`` or
            ``from_theta`` is given.
        start: LoRA file to start the finetuning from, see `hypernet.training.start`; ``auto`` uses the one next to the
            hypernetwork, if there is one, None starts from scratch.
        save_every: number of steps between the LoRAs kept in the result's ``snapshots``.
        preview_every: number of steps between drawings of the trigger prompt, for ``on_step``.
        on_step: called with a `StepReport` after every step: stage, step, loss, and a sample picture if one was due.
        stop: called after every step; returning True ends the fit and keeps the result so far.
        options: fields of the config to change, such as ``steps=40``.

    Raises:
        ValueError, OSError: a photo or the hypernetwork is unusable, or the hypernetwork does not match ``base`` and
            ``config``; the message names the cause.
    """
    request = request_person(
        photos, None, config, None, from_theta, hypernet, lidb_config, start=start, base=base, options=options,
        save_every=save_every, preview_every=preview_every,
    )  # fmt: skip
    return make_person(request, as_base(base), progress, on_step, stop)


def personalize_to_files(
    photos: PhotoLike | Iterable[PhotoLike],
    base: Base,
    out: str | Path,
    config: PersonalizeConfig | None = None,
    lidb_config: LiDBConfig | None = None,
    previews: Sequence[str] | None = (),
    save_theta: str | Path | None = None,
    from_theta: str | Path | None = None,
    hypernet: Hypernet | None = "auto",
    overwrite: bool = False,
    progress: StageProgress | None = None,
    start: str | Path | None = AUTO_START,
    save_every: int | None = None,
    preview_every: int | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
    weights: Sequence[float] = (1.0,),
    resume: bool = False,
    **options: Any,
) -> Personalization:
    """Personalise and write the LoRA ``out``, its sidecar and its preview picture (the trigger prompt, drawn).

    Args:
        previews: further prompts, drawn with the LoRA on the sheet ``<out>-preview.png``, above the base's pictures;
            None draws nothing, not even the preview picture.
        save_theta: file to save theta to.
        save_every: number of steps between saved LoRAs, ``<out>-000020.safetensors``, each with the state needed to
            resume; at the end a sheet of them, ``<out>-sheet.png``, and the loss curve, ``<out>-loss.png``.
        preview_every: number of steps between drawings of the trigger prompt, ``<out>-000020.png``.
        stop: called after every step; returning True ends the fit. The LoRA so far is saved under its step's name,
            with the state needed to resume.
        weights: strengths of the LoRAs on the sheet.
        resume: resume a stopped fit; the result is the same as that of an uninterrupted one.
        on_step: as for `personalize`.
        config, lidb_config, from_theta, hypernet, start, options: as for `personalize`.
        overwrite: replace existing outputs, but never an input.

    Raises:
        ValueError, OSError: an output cannot be written; this is checked before any work is done.
    """
    request = request_person(
        photos, out, config, save_theta, from_theta, hypernet, lidb_config, previews, start, base, overwrite, options,
        save_every, preview_every, weights, resume,
    )  # fmt: skip
    return make_person(request, as_base(base), progress, on_step, stop)


def make_person(
    request: PersonRequest,
    base: BaseModel,
    progress: StageProgress | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Personalization:
    """Carry out a request for one person and write the outputs.

    Args:
        on_step, stop: as for `personalize`.

    Raises:
        ValueError, OSError: the request does not match ``base``, the fit diverged, or a file cannot be written.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "prepare photos"):
        person = PreparedPerson("", tuple(photo.prepare(base.size_px) for photo in request.photos))
    opened = OpenedRequest(request, base, seconds)
    starts = opened.starts([person], progress)
    opened.network = None  # it may be larger than the base
    watch = Watch(request.save_every, request.preview_every, on_step, stop)
    if request.out is None:
        (result,) = opened.fit([person], starts, progress, watch)
        return _of_request(result, request)
    with Writer() as writer:
        checkpoints = opened.checkpoints([person], [request.out], state_path(request.out), writer)
        resumed = checkpoints.load_state() if request.resume else None
        (result,) = opened.fit([person], starts, progress, watch, checkpoints, resumed)
        result = _of_request(result, request)
        _save_fitted(result, request, seconds)  # before a checkpoint that could not be written is raised
    result.files += checkpoints.files
    if result.stopped_at is not None:
        return result
    checkpoints.remove_state()
    pictures = Pictures(base, opened.space, request.config, request.previews)
    result.files += pictures.draw(request.out, seconds, progress)
    if request.save_every is not None:
        result.save_losses(request.out)
        loras = request.loras_of(request.out)
        result.files += pictures.draw_steps(request.out, loras, request.weights, seconds, progress)
    return result


def _save_fitted(result: Personalization, request: PersonRequest, seconds: dict[str, float]) -> None:
    """Write the LoRA, or of a fit that was stopped the LoRA so far, if it is one and not written yet."""
    assert request.out is not None, "there is no file to write"
    if result.stopped_at is None:
        if request.save_theta is not None:
            result.save_theta(request.save_theta, overwrite=request.overwrite)
        with timed(seconds, "export"):
            result.save(request.out, overwrite=request.overwrite)
        return
    step, is_lora = result.stopped_at[1], result.finetuned is not None or not request.config.steps
    if is_lora and step not in result.snapshots:
        result.save(step_path(request.out, step), overwrite=request.overwrite or request.resume)


def _of_request(result: Personalization | ValueError, request: PersonRequest) -> Personalization:
    if isinstance(result, ValueError):
        raise result
    result.left_out = request.left_out
    return result


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
            subjects = make_subjects(base, people, config.trigger, config.class_prompt, self.kept)
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
                    self.kept, observe, state,
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
    models = base.adapted
    return LiDBSpace(models if config.adapt == "all" else dict([next(iter(models.items()))]), lidb_config)


def _theta_space(base: BaseModel, file: ThetaFile, source: str) -> LiDBSpace:
    """The space of the models that a theta file is of."""
    space = LiDBSpace(recorded_models(base.adapted, file.base_fingerprint, source), file.config)
    check_record(file.record, space, source)
    return space


def _of_stage(progress: StageProgress | None, stage: str) -> Progress | None:
    return None if progress is None else partial(progress, stage)


def lora_metadata(base: BaseModel, trigger: str, num_photos: int = 0) -> KohyaMetadata:
    """The metadata of a LoRA file for this base."""
    return KohyaMetadata(
        family=base.family,
        v_prediction=base.prediction_type == "v_prediction",
        trigger=trigger,
        base_model_name=Path(base.name).name,
        resolution_px=base.size_px,
        num_photos=num_photos,
    )
