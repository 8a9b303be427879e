"""What the page does for one person and for many: calls of the public API, whose results go into a job's folder."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.web.jobs import Job
from cli.web.presets import Preset
from cli.web.sentences import in_words_of_the_page
from cli.web.work_folder import file_name

if TYPE_CHECKING:
    from hypernet.base_models.base import BaseModel
    from hypernet.personalized import Personalization
    from hypernet.watching import StepReport

LORAS = "loras"
"""The folder of many people's LoRAs, below that of the job."""
_NUM_LOSSES = 200  # reading one waits for the device


@dataclass(frozen=True)
class Wishes:
    """What somebody asked for on the page.

    Attributes:
        photos: files, of one person.
        name: of the LoRA.
        prompts: to draw on the sheet; none draws the trigger prompt.
        sampling_steps: of each of its pictures.
        preset: how often LoRAs are kept and drawn on the way, and the weights of the sheet.
        options: fields of the recipe to change, before those of the preset.
    """

    photos: tuple[str, ...]
    base: str
    name: str
    prompts: tuple[str, ...] = ()
    sampling_steps: int = 30
    preset: Preset = Preset({})  # noqa: RUF009 - nothing of it is changed
    options: dict[str, Any] = field(default_factory=dict)


class Bases:
    """The base model that was used last stays loaded; the worker alone asks for it."""

    def __init__(self, open_base: Callable[[str], "BaseModel"]) -> None:
        self._open, self._name, self._base = open_base, "", None

    def get(self, name: str) -> "BaseModel":
        if name != self._name:
            self._name, self._base = "", None  # two would need twice the memory
            self._base = self._open(name)
            self._name = name
        return self._base


def fit_person(job: Job, wishes: Wishes, bases: Bases) -> None:
    """Make a LoRA of the person, with those of some steps on the way, and draw steps x weights.

    Fills ``results``: ``trigger``; ``loras``, a file for each step; and, as `draw_loras`, ``pictures``, a list for each
    ``(step, weight)`` with one picture for each of ``prompts``.
    """
    from hypernet.personalization import make_person
    from hypernet.request import request_person

    job.report("look at the photos", 0, None)
    options = {**wishes.preset.recipe, **wishes.options}
    request = request_person(wishes.photos, base=wishes.base, hypernet="auto", options=options)
    job.report("load the base", 0, None)
    base = bases.get(wishes.base)
    job.check_stopped()
    save_every, preview_every = wishes.preset.every(request.config.steps)
    request = replace(request, save_every=save_every, preview_every=preview_every)
    result = make_person(request, base, job.report, _watch(job), job.stop.is_set)
    job.notes += [*result.left_out, *(photo.note for photo in result.photos if photo.note), *result.loss_notes]
    loras = _write(job.folder, wishes.name, result)
    job.results |= {"trigger": result.config.trigger, "loras": loras}
    job.changed()  # from now on there is something to take away, whatever becomes of the pictures
    job.was_stopped = job.stop.is_set()
    job.stop.clear()  # Stop ended the fit; pressed once more, it ends the drawing
    draw_loras(job, wishes, bases)
    _add_previews(job)


def draw_loras(job: Job, wishes: Wishes, bases: Bases) -> None:
    """Draw each of a job's LoRAs with each weight; fills ``prompts``, ``pictures`` and the file ``sheet``."""
    from hypernet import draw_sheet
    from hypernet.sheets import DrawConfig

    def report(done: int, total: int) -> None:
        job.report("draw the sheet", done, total)
        job.check_stopped()

    weights, loras, prompts = wishes.preset.weights, job.results["loras"], wishes.prompts or (job.results["trigger"],)
    named = {f"step {step}": file for step, file in loras.items()}
    config = DrawConfig(num_steps=wishes.sampling_steps)
    sheet = draw_sheet(bases.get(wishes.base), prompts, named, weights, config=config, progress=report)
    file = job.folder / "sheet.png"
    sheet.save(file)
    job.results |= {"prompts": prompts, "sheet": str(file), "pictures": {
        (step, weight): [sheet.picture(row, column, number, 0).image for number in range(len(prompts))]
        for row, step in enumerate(loras) for column, weight in enumerate(weights)
    }}  # fmt: skip


def fit_people(job: Job, people: Path, base: str, bases: Bases, options: dict[str, Any]) -> None:
    """Make a LoRA of everybody in a folder, below the job's folder.

    Fills ``people``, everybody's name and that of their LoRA; ``each``, a `PersonalizedEach` that grows meanwhile; and
    ``source``, the folder.
    """
    from hypernet import personalize_each
    from hypernet.inputs.people import open_people
    from hypernet.personalization_each import PersonalizedEach, lora_name

    def report(stage: str, done: int, total: int | None) -> None:
        job.report(stage, done, total)
        job.check_stopped()

    out, opened, result = job.folder / LORAS, open_people(people), PersonalizedEach()
    job.report("look at the photos", 0, None)
    people_of = {person.name: lora_name(person) for person in opened}
    job.results |= {"people": people_of, "each": result, "source": people}
    job.report("load the base", 0, None)
    loaded = bases.get(base)
    job.check_stopped()
    personalize_each(
        opened, loaded, out, progress=report, on_step=_watch(job), stop=job.stop.is_set, result=result, **options
    )
    job.notes += result.notes
    if not result.made and result.stopped_at is None:
        raise ValueError("no LoRA was made, because everybody was left out; the table says why")


def outcomes(job: Job) -> dict[str, str]:
    """Person -> what became of them so far, of a job of `fit_people`."""
    people, result = job.results.get("people", {}), job.results.get("each")
    if result is None:
        return {}
    folder = f"{job.results['source']}{os.sep}"  # nobody who uploads knows where that is
    skipped = {skip.name: in_words_of_the_page(skip.reason.replace(folder, "")) for skip in result.skipped}
    made = {file.stem for file in result.made}

    def outcome(person: str, lora: str) -> str:
        if lora in made:
            return "LoRA is ready"
        if person in skipped or job.is_over:
            return skipped.get(person, "not made")
        return "being fitted" if lora in result.fitting else "waiting"

    return {person: outcome(person, lora) for person, lora in people.items()} | {
        name: reason for name, reason in skipped.items() if name not in people
    }


def _watch(job: Job) -> "Callable[[StepReport], None]":
    """Take down a fit's loss and sample pictures."""
    from hypernet.sampling import save_picture

    def on_step(report: "StepReport") -> None:
        if report.step % max(1, report.steps // _NUM_LOSSES) == 0 or report.step == report.steps:
            job.losses.append((report.step, report.loss))
        if report.picture is not None:
            file = job.folder / f"sample-{report.step:06}.png"
            save_picture(report.picture, file)
            job.samples.append((str(file), f"step {report.step}"))
        job.changed()

    return on_step


def _write(folder: Path, name: str, result: "Personalization") -> dict[int, Path]:
    """Write the LoRA of each step that was kept, in order, kohya's way of naming them; the last has the plain name."""
    name, last = file_name(name), sum(len(values) for values in result.losses.values())
    loras = {step: folder / f"{name}-{step:06}.safetensors" for step in result.snapshots}
    for step, file in loras.items():
        result.save(file, step=step)
    loras[last] = folder / f"{name}.safetensors"
    result.save(loras[last])
    return loras


def _add_previews(job: Job) -> None:
    """Beside each LoRA its picture at the greatest weight, as A1111 shows it."""
    from converters.sidecar import write_preview

    greatest = max(weight for _, weight in job.results["pictures"])
    for step, file in job.results["loras"].items():
        write_preview(file, job.results["pictures"][step, greatest][0])
