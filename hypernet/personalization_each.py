"""A folder of people in, a LoRA of each out: many are fitted at once, and each is written when its batch is done.

The fitting engine keeps people apart: a LoRA is the one that `personalize` makes of the same photos, but for rounding.
Matrix products of another batch round otherwise, and Adam, which divides a gradient by its size, makes full steps of
what is rounding alone: 0.4 to 6.5 % of an update after 40 steps. So who is fitted with whom is the same in every run.
"""

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import Base, as_base
from hypernet.checkpoints import STATE_SUFFIX, Checkpoints, OtherFitError, Writer, state_path, step_path
from hypernet.fitting.batch_size import choose_batch
from hypernet.fitting.engine import KeptStep
from hypernet.fitting.starts import AUTO_START
from hypernet.inputs.people import People, Person, PreparedPerson, Skipped, open_people, prepare_person
from hypernet.network.prediction import Hypernet
from hypernet.opened_request import FINETUNE, OpenedRequest
from hypernet.personalized import Personalization
from hypernet.pictures import Pictures
from hypernet.recipe import DEFAULT_BASE, FitConfig, PersonalizeConfig, StageProgress
from hypernet.request import PeopleRequest, request_people, steps_sheet_path
from hypernet.timing import timed
from hypernet.watching import StepReport, Watch
from lidb_peft import LiDBConfig
from lidb_peft.files import locked_folder, was_interrupted
from lidb_peft.outputs import NO_FILE_NAME

_LONGEST_NAME = 200  # bytes; file systems take 255, with the suffix and that of the temporary file


@dataclass(repr=False)
class PersonalizedEach:
    """What became of the people.

    Attributes:
        made: a LoRA for each person.
        kept: LoRAs that an earlier run had written.
        skipped: photos and people that were left out.
        notes: what to know of photos that were taken (several faces, a face too small).
        seconds: time of each stage, all people together.
        fitting: names of those who are being fitted now.
        stopped_at: the stage and step of its batch at which the run was stopped; None if it was not.
    """

    made: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    fitting: list[str] = field(default_factory=list)
    stopped_at: tuple[str, int] | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}: {len(self.made)} LoRAs made, {len(self.kept)} kept, {len(self.skipped)} skipped, "
            f"in {sum(self.seconds.values()):.1f} s"
        )

    @property
    def per_hour(self) -> float:
        """People in an hour; somebody must have been made."""
        return 3600 * len(self.made) / sum(self.seconds.values())


def personalize_each(
    people: People | str | Path,
    base: Base = DEFAULT_BASE,
    out: str | Path = "loras",
    config: PersonalizeConfig | None = None,
    lidb_config: LiDBConfig | None = None,
    previews: Sequence[str] | None = (),
    batch_size: int | None = None,
    hypernet: Hypernet | None = "auto",
    overwrite: bool = False,
    progress: StageProgress | None = None,
    start: str | Path | None = AUTO_START,
    save_every: int | None = None,
    preview_every: int | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
    weights: Sequence[float] = (1.0,),
    result: PersonalizedEach | None = None,
    **options: Any,
) -> PersonalizedEach:
    """Personalise a base model on each person of a data set; write ``<out>/<name>.safetensors`` and companions.

    Existing LoRAs are skipped, so an interrupted run resumes and produces exactly the files of an uninterrupted one; to
    this end, a batch is fitted as a whole if any of its people lacks a LoRA. A batch that was stopped goes on at its
    step. Unusable photos, photos of an earlier person, names that are not valid file names or that an earlier person
    has, and diverging fits are skipped.

    Args:
        people: what `open_people` opens, such as a folder, or has opened; a name is that of the person's photo or
            folder.
        batch_size: people to fit at once; None is as many as fit into GPU memory, or a few on a CPU.
        base, config, lidb_config, previews, hypernet, start, options: as for `personalize_to_files`.
        overwrite: make existing LoRAs again.
        progress: called with (stage, people done, total people or None if unknown).
        save_every: number of steps between saved LoRAs of each person, ``<name>-000020.safetensors``, and between the
            states that a run that was killed resumes from; at the end a sheet and the loss curve of each.
        preview_every, weights: as for `personalize_to_files`, for each person.
        on_step: called with a `StepReport` of the whole batch after every step.
        stop: called after every step; returning True ends the run, and leaves the state needed to resume.
        result: filled while the run goes on, for whoever watches it; by default a new one.

    Raises:
        BlockingIOError: another run is at work in ``out``.
        ValueError, OSError: as `request_people`, or a fit or an output fails; LoRAs written before are kept.
    """
    opened = people if isinstance(people, People) else open_people(people)
    request = request_people(
        opened, out, config, hypernet, lidb_config, previews, batch_size, start, base, overwrite, options,
        save_every, preview_every, weights,
    )  # fmt: skip
    return make_people(request, as_base(base), progress, on_step, stop, result)


def make_people(
    request: PeopleRequest,
    base: BaseModel,
    progress: StageProgress | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    stop: Callable[[], bool] | None = None,
    result: PersonalizedEach | None = None,
) -> PersonalizedEach:
    """Carry out a request for everybody in a data set; see `personalize_each`."""
    assert request.people is not None, "a request for nobody"
    result = PersonalizedEach() if result is None else result
    watch = Watch(request.save_every, request.preview_every, on_step, stop)
    run = _Run(request, base, result, watch, _people_done(result, request.people.count(), progress))
    is_resumed = was_interrupted(request.out) or any(request.out.glob(f"*{STATE_SUFFIX}"))
    with locked_folder(request.out, "hdb personalize --each"):
        for rows in _groups(_named(request, result, run.report, is_resumed), run.batch_size):
            run.make(rows)
            if result.stopped_at is not None:
                return result
    run.report(0)
    return result


Row = tuple[Person, Path]
"""A person and the file of their LoRA."""
Prepared = tuple[PreparedPerson, Path]


class _Run:
    """What is the same for every batch of a run."""

    def __init__(
        self,
        request: PeopleRequest,
        base: BaseModel,
        result: PersonalizedEach,
        watch: Watch,
        report: Callable[[float], None],
    ) -> None:
        self.request, self.base, self.result, self.watch, self.report = request, base, result, watch, report
        config, draws = request.config, request.previews is not None
        self.opened = OpenedRequest(request, base, result.seconds)
        self.batch_size = request.batch_size or choose_batch(
            base, self.opened.space, *_measured(config), self.opened.recogniser
        )
        self.pictures = Pictures(base, self.opened.space, config, request.previews)
        self.stages = bool(config.theta_steps) + bool(config.steps) + draws + 1  # the last is writing
        # A kept step's memory is wanted for drawing, and for the other stage.
        if not draws and request.preview_every is None and bool(config.theta_steps) != bool(config.steps):
            self.opened.kept = KeptStep()

    def make(self, rows: Sequence[Row]) -> None:
        """Make the LoRAs of a batch that are not there yet."""
        request, result = self.request, self.result
        there = set() if request.overwrite else {file for _, file in rows if file.exists()}
        result.kept += sorted(there)
        self.report(0)
        made: list[Path] = []
        if len(there) < len(rows):
            group = _prepared(rows, there, self.base.size_px, request.config, result, self.report)
            if group:
                made = self._fit(group, there, state_path(rows[0][1]))
        if result.stopped_at is None:
            for _, file in rows:
                if file in made or file in there:
                    self._draw(file, is_new=file in made)

    def _fit(self, group: Sequence[Prepared], there: set[Path], state: Path) -> list[Path]:
        """Fit a batch, and write the LoRAs of those who have none; whose is ``there`` is fitted again beside them."""
        people, request, result = [person for person, _ in group], self.request, self.result
        result.fitting = [lora_file.stem for _, lora_file in group if lora_file not in there]
        outs = [None if file in there else file for _, file in group]
        with Writer() as writer:
            checkpoints = self.opened.checkpoints(people, outs, state, writer)
            resumed = self._resumed(checkpoints)
            share = self._share(len(group))
            if resumed is not None and resumed["stage"] == FINETUNE and request.config.theta_steps:
                self.report(len(group) / self.stages)
            starts = self.opened.starts(people)
            fitted = self.opened.fit(people, starts, share, self.watch, checkpoints, resumed)
            result.stopped_at = next((one.stopped_at for one in fitted if not isinstance(one, ValueError)), None)
            made = [] if result.stopped_at else self._write(fitted, group, there)
        if result.stopped_at is None:
            checkpoints.remove_state()
        result.fitting = []
        return made

    def _resumed(self, checkpoints: Checkpoints) -> dict[str, Any] | None:
        """The state that a stopped run has left of this batch; None if there is none, or the batch was another."""
        if self.request.overwrite or not checkpoints.state.exists():
            return None
        try:
            return checkpoints.load_state()
        except OtherFitError as error:
            if list(error.differing) != ["photos"]:
                raise
            self.result.notes.append(f"{checkpoints.state.name} is of other people fitted together: they begin anew")
            return None

    def _write(
        self, fitted: Sequence[Personalization | ValueError], group: Sequence[Prepared], there: set[Path]
    ) -> list[Path]:
        """Write the LoRAs of a batch, and the loss curves; note whose fit diverged."""
        result, made = self.result, []
        for one, (person, file) in zip(fitted, group, strict=True):
            if file in there:
                continue
            if isinstance(one, ValueError):
                result.skipped.append(Skipped(person.name, str(one)))
                self.report(1)
                continue
            with timed(result.seconds, "export"):
                one.save(file, overwrite=True)  # what is there and stays was found before the work
                if self.request.save_every is not None:
                    one.save_losses(file)
            made.append(file)
            result.made.append(file)
            result.notes += [f"{file.name}: {note}" for note in one.loss_notes if "overcooked" in note]
            self.report(1 / self.stages)
        return made

    def _draw(self, file: Path, is_new: bool) -> None:
        """Draw what a LoRA lacks: everything beside a new one, and what a run that was stopped did not come to."""
        seconds, request = self.result.seconds, self.request
        if is_new or self.pictures.are_missing(file):
            self.pictures.draw(file, seconds, self._share(1))
        if request.save_every is not None and (is_new or not steps_sheet_path(file).exists()):
            self.pictures.draw_steps(file, request.loras_of(file), request.weights, seconds)

    def _share(self, num_people: int) -> StageProgress:
        """The progress of one of the stages of so many people."""
        before: dict[str, int] = {}

        def of_stage(stage: str, done: int, total: int | None) -> None:
            assert total, f"{stage} of no length"
            self.report(num_people * (done - before.get(stage, 0)) / (self.stages * total))
            before[stage] = done

        return of_stage


def _groups(named: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Cut the people into lists of ``size``, the same in every run: who is fitted with whom changes the rounding."""
    named = iter(named)
    while group := list(islice(named, size)):
        yield group


def _named(
    request: PeopleRequest, result: PersonalizedEach, report: Callable[[float], None], is_resumed: bool
) -> Iterator[Row]:
    """Yield people with their files; note whose name can be none of a file of their own, and whose photos are known."""
    owners: dict[str, str] = {}
    photos: dict[str, str] = {}
    for person in request.people or ():
        name = lora_name(person)
        file = request.out / f"{name}.safetensors"
        files = [file, *(step_path(file, step) for step in request.steps_kept)]
        taken = next((one for one in files if _folded(one.name) in owners), None)
        reason = ""
        if not 0 < len(os.fsencode(name)) <= _LONGEST_NAME:
            reason = f"its name makes no file name of 1 to {_LONGEST_NAME} bytes; rename it"
        elif taken is not None:
            what = "its LoRA" if taken == file else "one of its intermediate LoRAs"
            reason = f"{what} would be {taken.name}, as that of {owners[_folded(taken.name)]}; rename one of them"
        elif photos.setdefault(person.digest, person.name) != person.name:
            reason = _same_photo(photos[person.digest])
        elif request.overwrite or not file.exists():
            try:
                request.check_file(file)
                request.check_intermediate_files(file, is_resumed=is_resumed)
            except (ValueError, OSError) as error:
                reason = str(error)
        for one in files:
            owners.setdefault(_folded(one.name), person.name)
        if reason:
            result.skipped.append(Skipped(person.name, reason))
            report(1)
        else:
            yield person, file


def _folded(name: str) -> str:
    """What some file systems take for the same name."""
    return unicodedata.normalize("NFC", name).casefold()


def _same_photo(name: str) -> str:
    return f"its photo is the same as that of {name}"


def _measured(config: PersonalizeConfig) -> tuple[FitConfig, int | None]:
    """The fit that takes most memory, and the rank of its LoRA, if it fits one."""
    return (config.lora_fit, config.rank) if config.steps else (config.theta_fit, None)


def lora_name(person: Person) -> str:
    """Return what a person's LoRA is called: their name, without the suffix if it is that of a photo."""
    is_photo = [photo.name for photo in person.photos] == [person.name]
    name = os.path.splitext(person.name)[0] if is_photo else person.name
    return NO_FILE_NAME.sub("-", name).strip(". ")


def _prepared(
    rows: Sequence[Row],
    there: set[Path],
    size_px: int,
    config: PersonalizeConfig,
    result: PersonalizedEach,
    report: Callable[[float], None],
) -> list[Prepared]:
    """The people of a group who can be fitted, no two with the same photos; note who is left out.

    Whose LoRA is ``there`` is fitted again, beside those who have none yet.
    """
    usable: dict[str, Prepared] = {}
    for person, file in rows:
        with timed(result.seconds, "prepare photos"):
            prepared, skipped = prepare_person(person, size_px, config.crop, config.face_detector, face=config.face)
        if prepared is not None and prepared.key not in usable:
            usable[prepared.key] = prepared, file
            notes = [photo.note for photo in prepared.photos if photo.note]
        else:
            notes = []
            if prepared is not None:
                skipped = [*skipped, Skipped(person.name, _same_photo(usable[prepared.key][0].name))]
            report(file not in there)
        if file not in there:
            result.skipped += skipped
            result.notes += notes
    return list(usable.values())


def _people_done(
    result: PersonalizedEach, num_people: int | None, progress: StageProgress | None
) -> Callable[[float], None]:
    """Return a function that adds to the people done, beside those whose LoRA was there, and reports them."""
    done = 0.0

    def report(more: float) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress("personalize", round(done) + len(result.kept), num_people)

    return report
