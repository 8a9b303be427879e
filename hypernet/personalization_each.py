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
from hypernet.fitting.batch_size import choose_batch
from hypernet.fitting.engine import KeptStep
from hypernet.fitting.starts import AUTO_START
from hypernet.inputs.people import People, Person, PreparedPerson, Skipped, open_people, prepare_person
from hypernet.network.prediction import Hypernet
from hypernet.personalization import OpenedRequest
from hypernet.pictures import Pictures
from hypernet.recipe import DEFAULT_BASE, FitConfig, PersonalizeConfig, StageProgress
from hypernet.request import PeopleRequest, request_people
from hypernet.timing import timed
from lidb_peft import LiDBConfig
from lidb_peft.files import locked_folder
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
    """

    made: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

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
    **options: Any,
) -> PersonalizedEach:
    """Personalise a base model on each person of a data set; write ``<out>/<name>.safetensors`` and companions.

    Existing LoRAs are skipped, so an interrupted run resumes and produces exactly the files of an uninterrupted one; to
    this end, a batch is fitted as a whole if any of its people lacks a LoRA. Unusable photos, photos of an earlier
    person, names that are not valid file names or that an earlier person has, and diverging fits are skipped.

    Args:
        people: what `open_people` opens, such as a folder, or has opened; a name is that of the person's photo or
            folder.
        batch_size: people to fit at once; None is as many as fit into GPU memory, or a few on a CPU.
        base, config, lidb_config, previews, hypernet, start, options: as for `personalize_to_files`.
        overwrite: make existing LoRAs again.
        progress: called with (stage, people done, total people or None if unknown).

    Raises:
        BlockingIOError: another run is at work in ``out``.
        ValueError, OSError: as `request_people`, or a fit or an output fails; LoRAs written before are kept.
    """
    opened = people if isinstance(people, People) else open_people(people)
    request = request_people(
        opened, out, config, hypernet, lidb_config, previews, batch_size, start, base, overwrite, options
    )
    return make_people(request, as_base(base), progress)


def make_people(request: PeopleRequest, base: BaseModel, progress: StageProgress | None = None) -> PersonalizedEach:
    """Carry out a request for everybody in a data set; see `personalize_each`."""
    result, config, previews = PersonalizedEach(), request.config, request.previews
    opened = OpenedRequest(request, base, result.seconds)
    batch = request.batch_size or choose_batch(base, opened.space, *_measured(config))
    assert request.people is not None, "a request for nobody"
    report = _people_done(result, request.people.count(), progress)
    stages = bool(config.theta_steps) + bool(config.steps) + (previews is not None) + 1  # the last is writing

    def share(num_people: int) -> StageProgress:
        def of_stage(stage: str, done: int, total: int | None) -> None:
            assert total, f"{stage} of no length"
            report(num_people / (stages * total))

        return of_stage

    pictures = Pictures(base, opened.space, config, previews)
    if previews is None and bool(config.theta_steps) != bool(config.steps):  # else its memory is wanted meanwhile
        opened.kept = KeptStep()
    with locked_folder(request.out, "hdb personalize --each"):
        for rows in _groups(_named(request, result, report), batch):
            there = set() if request.overwrite else {file for _, file in rows if file.exists()}
            result.kept += sorted(there)
            report(0)
            group = [] if len(there) == len(rows) else _prepared(rows, there, base.size_px, config, result, report)
            prepared = [person for person, _ in group]
            fitted = opened.fit(prepared, opened.starts(prepared), share(len(group))) if group else []
            made = []
            for one, (person, file) in zip(fitted, group, strict=True):
                if file in there:  # fitted again for the others
                    continue
                if isinstance(one, ValueError):
                    result.skipped.append(Skipped(person.name, str(one)))
                    report(1)
                    continue
                with timed(result.seconds, "export"):
                    one.save(file, overwrite=True)  # what is there and stays was found before the work
                made.append(file)
                result.notes += [f"{file.name}: {note}" for note in one.loss_notes if "overcooked" in note]
                report(1 / stages)
            result.made += made
            for _, file in rows:
                if file in made or (file in there and pictures.are_missing(file)):
                    pictures.draw(file, result.seconds, share(1))
    report(0)
    return result


def _groups(named: Iterable[tuple[Person, Path]], size: int) -> Iterator[list[tuple[Person, Path]]]:
    """Cut the people into lists of ``size``, the same in every run: who is fitted with whom changes the rounding."""
    named = iter(named)
    while group := list(islice(named, size)):
        yield group


def _named(
    request: PeopleRequest, result: PersonalizedEach, report: Callable[[float], None]
) -> Iterator[tuple[Person, Path]]:
    """Yield people with their files; note whose name can be none of a file of their own, and whose photos are known."""
    owners: dict[str, str] = {}
    photos: dict[str, str] = {}
    for person in request.people or ():
        name = lora_name(person)
        file = request.out / f"{name}.safetensors"
        key = unicodedata.normalize("NFC", name).casefold()  # what some file systems take for the same name
        reason = ""
        if not 0 < len(os.fsencode(name)) <= _LONGEST_NAME:
            reason = f"its name makes no file name of 1 to {_LONGEST_NAME} bytes; rename it"
        elif key in owners:
            reason = f"its LoRA would be {file.name}, as that of {owners[key]}; rename one of them"
        elif photos.setdefault(person.digest, person.name) != person.name:
            reason = _same_photo(photos[person.digest])
        elif request.overwrite or not file.exists():
            try:
                request.check_file(file)
            except (ValueError, OSError) as error:
                reason = str(error)
        owners.setdefault(key, person.name)
        if reason:
            result.skipped.append(Skipped(person.name, reason))
            report(1)
        else:
            yield person, file


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
    rows: Sequence[tuple[Person, Path]],
    there: set[Path],
    size_px: int,
    config: PersonalizeConfig,
    result: PersonalizedEach,
    report: Callable[[float], None],
) -> list[tuple[PreparedPerson, Path]]:
    """The people of a group who can be fitted, no two with the same photos; note who is left out.

    Whose LoRA is ``there`` is fitted again, beside those who have none yet.
    """
    usable: dict[str, tuple[PreparedPerson, Path]] = {}
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
