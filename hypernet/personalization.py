"""One person's photos in, a standard LoRA out: predict or fit theta, relax the rank, finetune, join both (section 4).

theta starts at a hypernetwork's prediction, at a theta file, or at the shared starting vector.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import Base, as_base
from hypernet.checkpoints import Writer, state_path, step_path
from hypernet.fitting.starts import AUTO_START
from hypernet.inputs.people import PreparedPerson
from hypernet.inputs.pictures import PhotoLike
from hypernet.network.prediction import Hypernet
from hypernet.opened_request import OpenedRequest
from hypernet.personalized import Personalization
from hypernet.pictures import Pictures
from hypernet.recipe import DEFAULT_BASE, PersonalizeConfig, StageProgress
from hypernet.request import PersonRequest, request_person
from hypernet.timing import timed
from hypernet.watching import StepReport, Watch
from lidb_peft import LiDBConfig


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
