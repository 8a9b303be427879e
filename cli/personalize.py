"""`hdb personalize`."""

import signal
import threading
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.base_models import (
    base_options,
    batch_option,
    given_options,
    hypernet_option,
    pop_base,
    recipe_options,
    start_option,
)
from cli.generate import weights_option
from cli.options import Command
from cli.push import push_result, push_to_hub_option
from cli.results import overwrite_option
from hypernet.recipe import PersonalizeConfig
from hypernet.timing import timed

if TYPE_CHECKING:
    from hypernet.base_models.base import BaseModel
    from hypernet.base_models.config import BaseConfig
    from hypernet.personalization_each import PersonalizedEach
    from hypernet.personalized import Personalization
    from hypernet.request import PeopleRequest, PersonRequest
    from hypernet.watching import StepReport

# Options of one person's fit, besides --dry-run and --push-to-hub; and of what any fit leaves while it runs.
_OF_ONE = ("save_theta", "from_theta", "resume")
_WHILE_IT_RUNS = ("save_every", "preview_every", "weights")
_STOPPED = 130  # the exit code that shells use for Ctrl-C


@click.command(name="personalize", cls=Command, presets=True)
@click.argument("photos", nargs=-1, type=click.Path(path_type=Path))
@click.option("--each", metavar="DIR",
              help="Instead of PHOTOS: a folder of people, each a photo or a sub-folder of photos.")  # fmt: skip
@batch_option("People to fit at once with --each; auto: as many as fit into GPU memory, or a few on a CPU.")
@hypernet_option
@click.option("--out", type=click.Path(path_type=Path), show_default="PHOTO.safetensors; with --each, DIR-loras",
              help="LoRA to write; with --each, folder for the LoRAs, where an interrupted run resumes.")  # fmt: skip
@start_option
@recipe_options([field.name for field in fields(PersonalizeConfig)], own=("token", "prompt"))
@click.option("--preview", "previews", multiple=True, metavar="PROMPT", help="Also draw this prompt; may be repeated.")
@click.option("--no-preview", is_flag=True, help="Draw no pictures, not even the LoRA's preview.")
@click.option("--save-every", type=click.IntRange(1), metavar="STEPS",
              help="Also save the LoRA every STEPS steps (NAME-000020.safetensors), and at the end a sheet comparing "
                   "them (NAME-sheet.png) and the loss curve (NAME-loss.png); with --each, of everybody.")  # fmt: skip
@weights_option
@click.option("--preview-every", type=click.IntRange(1), metavar="STEPS",
              help="Draw a picture with the LoRA every STEPS steps (NAME-000020.png).")  # fmt: skip
@click.option("--resume", is_flag=True, help="Resume a fit that was stopped with Ctrl-C; --each resumes by itself.")
@click.option("--dry-run", is_flag=True, help="Write NAME-crops.png, which shows the crops, and print "
                                              "the plan; load and fit nothing.")  # fmt: skip
@push_to_hub_option
@base_options
@click.option("--save-theta", type=click.Path(path_type=Path), help="Also save the LiDB weights (53 KB for SD1.5).")
@click.option("--from-theta", type=click.Path(path_type=Path), help="Start from saved LiDB weights.")
@overwrite_option
@click.pass_context
def command(
    context, photos, each, batch_size, hypernet, out, previews, no_preview, start, dry_run, push_to_hub, overwrite,
    **options,
) -> None:  # fmt: skip
    """Make a LoRA of the person in PHOTOS; several photos are of one person. With --each, of many people at once.

    A folder among PHOTOS stands for the photos in it. If there are several photos, unusable ones are skipped and
    listed. Whether they all show the same person is not checked: look at what --dry-run writes. Ctrl-C stops the fit
    after the current step and saves the LoRA so far.

    \b
    hdb personalize me.jpg
    hdb personalize photos-of-me/ --out me.safetensors --preset portrait-best
    hdb personalize group.jpg --dry-run --face 2
    hdb personalize me.jpg --steps 160 --save-every 20 --weights 0.6,0.8,1.0
    hdb personalize me.jpg --hypernet my-hypernetwork/best
    hdb personalize me.jpg --preview "a sks face in the rain" --preview "a pencil drawing of a sks face"
    hdb personalize me1.jpg me2.jpg --base v1-5-pruned.safetensors --out me.safetensors --steps 160
    hdb personalize portrait.png --base testbed --no-crop --no-preview
    hdb personalize --each faces/ --out loras
    """  # fmt: skip
    of_one = {name: options.pop(name) for name in _OF_ONE}
    _check_usage(photos, each, batch_size, hypernet, previews, no_preview, of_one["from_theta"])
    if each is not None:
        _check_none_of_one(of_one | {"dry_run": dry_run, "push_to_hub": push_to_hub})
    if push_to_hub is not None:
        from hypernet.cards import check_repository

        check_repository(push_to_hub)
    base, seconds = pop_base(options), {}
    with timed(seconds, "import"):
        from hypernet.base_models.loading import as_base
        from hypernet.inputs.people import open_people
        from hypernet.request import request_people, request_person

    common = {
        "hypernet": hypernet or "auto",
        "previews": None if no_preview else previews,
        "start": None if start == "none" else start,
        "base": base,
        "overwrite": overwrite,
        **{name: options.pop(name) for name in _WHILE_IT_RUNS},
    }
    common["options"] = given_options(options)
    if each is None:
        out = out or Path(photos[0].resolve().stem + ".safetensors")
        request = request_person(photos, out, **of_one, **common)
        if dry_run:
            _tell_plan(request, base)
            return
    else:
        folder = Path(each).resolve()
        people, out = open_people(each), out or Path(f"{folder.name if folder.is_dir() else folder.stem}-loras")
        request = request_people(people, out, batch_size=batch_size, **common)
    with timed(seconds, "import"):
        from diffusers import StableDiffusionPipeline  # noqa: F401 - else it would be a part of loading
    with timed(seconds, "load base"):
        model = as_base(base)
    if each is None:
        result = _make_person(request, model)
        _tell_person(result, out)
        if result.stopped_at is not None:
            _tell_stopped(result, request, context)
    else:
        result = _make_people(request, model)
        _tell_people(result, out)
        if result.stopped_at is not None:
            click.echo(f"stopped {_of_stage(result.stopped_at)} of a batch; run the same command to continue there")
            context.exit(_STOPPED)
    _tell_use(request, seconds | result.seconds, is_one=each is None)
    if push_to_hub is not None:
        _push(result, out, base.base, push_to_hub)


def _make_person(request: "PersonRequest", model: "BaseModel") -> "Personalization":
    from cli.progress import LastLoss, progress_bars
    from hypernet.personalization import make_person

    loss = LastLoss()
    with progress_bars(read_loss=loss.read) as report, Stop() as stop:
        return make_person(request, model, report, on_step=lambda step: (loss(step), stop.note(step)), stop=stop)


def _make_people(request: "PeopleRequest", model: "BaseModel") -> "PersonalizedEach":
    from cli.progress import progress_bars
    from hypernet.personalization_each import make_people

    with progress_bars(per_hour="people") as report, Stop() as stop:
        return make_people(request, model, report, stop.note, stop)


class Stop:
    """Ctrl-C or SIGTERM during a fit: the first stops the fit after its step, the second stops everything at once."""

    def __init__(self) -> None:
        self._is_asked = self._is_fitting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup, or in the background
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self._is_asked

    def note(self, report: "StepReport") -> None:
        """Note whether a step is running that can be finished first."""
        self._is_fitting = report.step < report.steps

    def _handle(self, number: int, frame: Any) -> None:
        if self._is_asked or not self._is_fitting:
            raise KeyboardInterrupt
        self._is_asked = True
        click.echo("stopping after this step, to keep what there is; Ctrl-C again stops at once", err=True)


def _tell_plan(request: "PersonRequest", base: "BaseConfig") -> None:
    from converters.sidecar import is_our_picture, write_our_picture
    from hypernet.inputs.crops import crops_sheet
    from lidb_peft.outputs import check_output

    config, sheet = request.config, request.out.with_name(f"{request.out.stem}-crops.png")
    check_output(sheet, [], ".png", request.overwrite or is_our_picture(sheet))
    write_our_picture(crops_sheet(request.photos), sheet)
    for sentence in request.left_out:
        click.echo(sentence, err=True)
    count = len(request.photos)
    stages = [f"{steps} steps of {what}" for what, steps in (("a LiDB fit", config.theta_steps),
              ("finetuning", config.steps)) if steps]  # fmt: skip
    click.echo(f"wrote {sheet}: the crops of {count} photo{'s'[: count != 1]}; check that all show the same person")
    click.echo(
        f'would fit "{config.trigger}" on {base.base}: {" and ".join(stages) or "nothing beyond the prediction"}'
    )
    click.echo(f"would write {', '.join(map(str, request.planned_files))}")


def _push(result: "Personalization", out: Path, base: str, repository: str) -> None:
    from hypernet.cards import hub_id, share_lora

    config = result.config
    how = [f"{config.steps} steps of finetuning, learning rate {config.lr:g}, rank {config.rank}, seed {config.seed}.",
           *(f"{note.capitalize()}." for note in result.loss_notes)]  # fmt: skip
    push_result(share_lora(out, hub_id(base), how=how), out, repository)


def _tell_stopped(result: "Personalization", request: "PersonRequest", context: click.Context) -> None:
    click.echo(f"stopped {_of_stage(result.stopped_at)}; run the same command with --resume to continue")
    context.exit(_STOPPED)


def _of_stage(stopped_at: tuple[str, int]) -> str:
    stage, step = stopped_at
    return f"after step {step} of {stage}"


def _check_usage(photos, each, batch_size, hypernet, previews, no_preview, from_theta) -> None:
    if each is None and not photos:
        raise click.UsageError("PHOTOS are missing; pass at least one photo, or --each with a folder of people")
    contradictions = {
        "PHOTOS and --each": photos and each,
        "--preview and --no-preview": previews and no_preview,
        "--hypernet and --from-theta": from_theta and hypernet not in (None, "none"),
    }
    for both, are_given in contradictions.items():
        if are_given:
            raise click.UsageError(f"{both} contradict each other; pass one of them")
    if batch_size is not None and each is None:
        raise click.UsageError("--batch-size is for many people; pass them with --each")


def _check_none_of_one(of_one: dict[str, Any]) -> None:
    for name, value in of_one.items():
        if value not in (None, False):
            hint = "--each resumes by itself" if name == "resume" else "drop it or --each"
            raise click.UsageError(f"--{name.replace('_', '-')} is for one person; {hint}")


def _tell_person(result: "Personalization", out: Path) -> None:
    for sentence in result.left_out:
        click.echo(sentence, err=True)
    for photo in result.photos:
        if photo.note:
            click.echo(photo.note, err=True)
    if result.start_source:
        click.echo(f"the finetuning started from {result.start_source}", err=True)
    for note in result.loss_notes:
        click.echo(note, err=True)
    for file in result.files:
        click.echo(f"wrote {file}")


def _tell_people(result: "PersonalizedEach", out: Path) -> None:
    for note in result.notes:
        click.echo(note, err=True)
    for name, reason in result.skipped:
        click.echo(f"skipped {name}: {reason}")
    if not result.made and not result.kept and result.stopped_at is None:
        raise ValueError(f"no LoRA was made: all {len(result.skipped)} people were skipped, see above")
    if result.made:
        click.echo(f"made {len(result.made)} LoRAs in {out}, {result.per_hour:,.0f} an hour")
    if result.kept:
        click.echo(f"kept {len(result.kept)} LoRAs already in {out}; delete a LoRA to redo it")


def _tell_use(request: "PersonRequest | PeopleRequest", seconds: dict[str, float], is_one: bool) -> None:
    trigger, out = request.config.trigger, request.out
    click.echo("took " + ", ".join(f"{stage} {duration:.2f} s" for stage, duration in seconds.items()))
    where, name = (out.name, out.stem) if is_one else ("the files", "NAME")
    click.echo(f'use it: put {where} into models/Lora and write "{trigger} <lora:{name}:1>"')
    if not is_one:
        click.echo(f'all of them use the trigger "{trigger}": load one at a time')
