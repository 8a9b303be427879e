"""Pre-optimisation: fit a theta to each person of a data set, many at once: the hypernetwork's targets (section 4.2).

Row i of the data set belongs to shard i // N, which depends on its own rows alone. Processes, on any number of
machines, claim shards one by one, so that a slow one does not decide; those that a dead one had claimed are made by
others, now or when the run is started again.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from hypernet.base_models.base import BaseModel
from hypernet.claims import LOOK_S, Claims, Sharing, one_at_a_time, take_missing
from hypernet.devices import OUT_OF_MEMORY
from hypernet.errors import is_out_of_memory
from hypernet.fitting.batch_size import choose_batch
from hypernet.fitting.engine import DivergedError, KeptStep, fit_theta
from hypernet.fitting.mirror import is_url
from hypernet.fitting.subjects import check_moments, make_subjects
from hypernet.fitting.targets import SKIPPED_FILE, Shard, TargetStore, create_targets, crop_fit, has_targets
from hypernet.inputs.people import People, Person, PreparedPerson, Skipped, prepare_person, with_detector
from hypernet.network.prediction import Start
from hypernet.optimizers import chosen_optimizer
from hypernet.recipe import PersonalizeConfig, PreoptimizeConfig, StageProgress
from lidb_peft import LiDBSpace
from lidb_peft.outputs import check_output_folder

Item = TypeVar("Item")


@dataclass
class Preoptimized:
    """What one process did, and the state of the store after all processes have finished.

    Attributes:
        fitted: number of people fitted.
        skipped: number of photos and people skipped.
        found: number of shards that existed already, when it began.
        loss: mean final denoising loss.
        seconds: how long it took.
        process, num_processes: index of this process, and number of processes.
        num_targets, num_skipped: people in the store, and photos and people skipped by all runs.
        missing: number of shards missing from the store, of ``shard_size`` people each.
        skipped_file: file that lists skipped photos and people with the reason, one per line.
    """

    fitted: int = 0
    skipped: int = 0
    found: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    process: int = 0
    num_processes: int = 1
    num_targets: int = 0
    num_skipped: int = 0
    missing: int = 0
    shard_size: int = 0
    skipped_file: str = SKIPPED_FILE

    @property
    def per_hour(self) -> float:
        return 3600 * self.fitted / self.seconds


def check_store(folder: str | Path, inputs: Sequence[str | Path | None]) -> None:
    """Raise ValueError or OSError now if no store can be made or gone on with in ``folder``; see `check_output`."""
    is_resumed = has_targets(folder)
    if not is_url(folder):
        check_output_folder(folder, inputs, (SKIPPED_FILE,), is_resumed)


def open_targets(
    folder: str | Path,
    base: BaseModel,
    space: LiDBSpace,
    people: People,
    config: PreoptimizeConfig,
    start_name: str = "theta_0",
) -> TargetStore:
    """Open the store that an earlier run has left, to go on with it, or make one.

    Args:
        start_name: what the fits start at, for the manifest.

    Raises:
        ValueError: the store there is of another base, seed, dimensions or fit, or the people's moments are.
        ValueError, OSError: as `check_store`.
    """
    check_store(folder, [people.source, base.name])
    check_moments(people, base)
    recipe = config.recipe
    fit = asdict(recipe.theta_fit)
    del fit["gradient_checkpointing"], fit["graph"]  # they change what a fit takes, not what it gives
    fit["optimizer"] = chosen_optimizer(fit["optimizer"])
    fit |= {"prompt": recipe.trigger, "class_prompt": recipe.class_prompt, "start": start_name}
    fit |= base.settings | {"size_px": base.size_px, "dtype": str(base.dtype).removeprefix("torch.")}
    fit |= crop_fit(recipe) | {"moments": "float16" if people.vae else "float32"}
    with nullcontext() if is_url(folder) else one_at_a_time(Path(folder)):
        if not has_targets(folder):
            batch = config.batch_size or choose_batch(base, space, recipe.theta_fit)
            create_targets(folder, space, Path(base.name).name, fit, batch, people.source)
    store = TargetStore(folder, space)
    store.check_fit(fit)
    return store


def preoptimize(
    people: People,
    base: BaseModel,
    space: LiDBSpace,
    store: TargetStore,
    config: PreoptimizeConfig,
    start: Start | None = None,
    sharing: Sharing | None = None,
    progress: StageProgress | None = None,
) -> Preoptimized:
    """Fit a theta to each person whose shard is not in the store yet.

    Processes that do so at the same time share the work; each ends when all shards are there.

    On a CPU a shard comes out the same to the last bit whenever it is made, if ``config.batch_size`` is the store's or
    None. A smaller one fits it in several batches, which changes it by rounding, and optimisation makes rounding grow:
    measured on the miniature, 1e-5 of the update after 2 steps and 4e-4 after 40.

    Args:
        start: predicts where each fit starts (several photos: the mean of their predictions); None is ``theta_0``.
        sharing: how processes agree on who makes which shard; None is by claims in the store's folder.
        progress: called with (stage, people done, people in all or None if that is not known).

    Raises:
        ValueError: there are no people, they are not those of a finished shard, that shard is damaged, or a batch does
            not fit into the memory.
        OSError: a shard cannot be written; those before it stay.
    """
    config, sharing = replace(config, recipe=with_detector(config.recipe)), sharing or Claims(store.folder)
    result, total_loss, began = Preoptimized(), 0.0, time.perf_counter()
    result.found = len(store.shards())
    report = _people_done(store, people.count(), progress)
    kept = KeptStep()
    try:
        for shards in _passes(people, store, base.size_px, config.recipe, sharing):
            for index, prepared in _ahead(shards):
                shard, thetas, losses = _make_shard(
                    base, space, prepared, config, config.batch_size or store.batch, start, report, kept
                )
                store.write(index, shard, thetas, losses)
                sharing.release(index)
                result.fitted += len(shard.keys)
                result.skipped += len(shard.skipped)
                total_loss += losses.sum().item()
    finally:
        sharing.release_all()
        store.list_skipped()
    if progress is not None and sharing.waits and people.count():
        progress("fit people", people.count() or 0, people.count())  # those of others too
    result.loss = total_loss / max(1, result.fitted)
    result.seconds = time.perf_counter() - began
    return result


@dataclass(frozen=True)
class _Prepared:
    """Rows of a shard, who of them can be fitted, and what is left out."""

    rows: list[tuple[Person, bool]]
    people: list[PreparedPerson]
    skipped: list[Skipped]


def _passes(
    people: People, store: TargetStore, size_px: int, recipe: PersonalizeConfig, sharing: Sharing
) -> Iterator[Iterator[tuple[int, _Prepared]]]:
    """Yield the shards that fall to this process: those that are free, then those of others who have died since."""
    others: set[int] = set()
    yield _free_shards(people, store, size_px, recipe, sharing, others)
    while sharing.waits and (others := {index for index in others if not store.has(index)}):
        taken = next((index for index in sorted(others) if take_missing(sharing, index, store.has)), None)
        if taken is None:
            time.sleep(LOOK_S)
            continue
        rows = next(islice(_shards(people, store.batch), taken, None))
        yield iter([(taken, _Prepared(rows, *_prepare(rows, size_px, recipe)))])


def _free_shards(
    people: People,
    store: TargetStore,
    size_px: int,
    recipe: PersonalizeConfig,
    sharing: Sharing,
    others: set[int],
) -> Iterator[tuple[int, _Prepared]]:
    """Yield the shards that nobody has made or claimed, prepared, with their numbers; note in ``others`` who has."""
    index = -1
    for index, rows in enumerate(_shards(people, store.batch)):
        if store.has(index):
            _check_rows(store, index, rows, people.source)
        elif take_missing(sharing, index, store.has):
            yield index, _Prepared(rows, *_prepare(rows, size_px, recipe))
        else:
            others.add(index)
    if index < 0:
        raise ValueError(f"{people.source} holds no people; pass a data set with at least one image")


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield items, each made while the one before is used, so that a GPU does not wait for photos."""
    end = object()
    with ThreadPoolExecutor(1) as executor:
        coming = executor.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = executor.submit(next, items, end)
            yield cast(Item, item)


def _shards(people: Iterable[Person], size: int) -> Iterator[list[tuple[Person, bool]]]:
    """Cut the people into lists of ``size``; with each goes whether somebody before had the same name."""
    seen: set[str] = set()
    rows: list[tuple[Person, bool]] = []
    for person in people:
        rows.append((person, person.name in seen))
        seen.add(person.name)
        if len(rows) == size:
            yield rows
            rows = []
    if rows:
        yield rows


def _names(rows: list[tuple[Person, bool]]) -> tuple[str, ...]:
    return tuple(person.name for person, _ in rows)


def _photos(rows: list[tuple[Person, bool]]) -> tuple[str, ...]:
    return tuple(person.digest for person, _ in rows)


def _check_rows(store: TargetStore, index: int, rows: list[tuple[Person, bool]], source: str) -> None:
    shard = store.read(index)
    if shard.rows != _names(rows) or (shard.photos and shard.photos != _photos(rows)):
        raise ValueError(
            f"{store.name(index)} holds other people or photos than {source} has in that place; the data set has "
            f"changed since it was written: choose another folder"
        )


def _make_shard(
    base: BaseModel,
    space: LiDBSpace,
    prepared: _Prepared,
    config: PreoptimizeConfig,
    batch: int,
    start: Start | None,
    report: Callable[[float], None],
    kept: KeptStep,
) -> tuple[Shard, Tensor, Tensor]:
    """A shard, its thetas ``(n, L, row)`` and their final losses ``(n,)``; ``report`` gets the rows done."""
    people = prepared.people
    thetas, losses = [space.theta_0.new_empty(0, *space.theta_0.shape)], [torch.empty(0)]
    fitted, diverged = [], []
    report(len(prepared.rows) - len(people))
    for first in range(0, len(people), batch):
        own = people[first : first + batch]
        failed: dict[int, str] = {}
        theta, loss = _fit_people(base, space, own, config, start, report, failed, kept)
        good = [row for row in range(len(own)) if row not in failed]
        thetas.append(theta[good])
        losses.append(loss[good])
        fitted += [own[row] for row in good]
        diverged += [Skipped(own[row].name, reason) for row, reason in failed.items()]
    shard = Shard(
        rows=_names(prepared.rows),
        keys=tuple(person.key for person in fitted),
        names=tuple(person.name for person in fitted),
        skipped=(*prepared.skipped, *diverged),
        photos=_photos(prepared.rows),
    )
    return shard, torch.cat(thetas), torch.cat(losses)


def _prepare(
    rows: list[tuple[Person, bool]], size_px: int, recipe: PersonalizeConfig
) -> tuple[list[PreparedPerson], list[Skipped]]:
    """The people who can be fitted, no two of them with one name or one photo, and what is left out."""
    people: dict[str, PreparedPerson] = {}
    left_out = []
    for person, is_double in rows:
        if is_double:
            left_out.append(Skipped(person.name, "an earlier row of the data set has the same name"))
            continue
        prepared, skipped = prepare_person(person, size_px, recipe.crop, recipe.face_detector, face=recipe.face)
        left_out += skipped
        if prepared is not None and prepared.key in people:
            left_out.append(Skipped(person.name, f"its photo is the same as that of {people[prepared.key].name}"))
        elif prepared is not None:
            people[prepared.key] = prepared
    return list(people.values()), left_out


def _fit_people(
    base: BaseModel,
    space: LiDBSpace,
    people: list[PreparedPerson],
    config: PreoptimizeConfig,
    start: Start | None,
    report: Callable[[float], None],
    failed: dict[int, str],
    kept: KeptStep,
) -> tuple[Tensor, Tensor]:
    """Thetas ``(n, L, row)`` and final losses ``(n,)``: the mean of the last tenth of the steps; see `fit_theta`."""
    subjects = make_subjects(base, people, config.recipe.trigger, config.recipe.class_prompt, kept)
    first = None
    if start is not None:
        thetas = start(torch.cat([person.pixels for person in people]))
        first = torch.stack([own.mean(0) for own in thetas.split([len(person.photos) for person in people])])
    try:
        theta, losses = fit_theta(
            base, space, subjects, config.recipe.theta_fit, first, lambda _, steps: report(len(people) / steps),
            kept=kept,
        )  # fmt: skip
    except DivergedError as error:  # one person's costs one person
        failed.update(error.failed)
        theta, losses = error.fitted, error.losses
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"{len(people)} people at once do not fit into the memory of {base.device}; {OUT_OF_MEMORY}"
        ) from error
    return theta, losses[-max(1, config.recipe.theta_steps // 10) :].mean(0)


def _people_done(store: TargetStore, num_people: int | None, progress: StageProgress | None) -> Callable[[float], None]:
    """A function that adds to the people done, those of finished shards included, and reports them."""

    def num_rows(shards: Iterable[int]) -> int:
        sizes = (store.batch if num_people is None else num_people - shard * store.batch for shard in shards)
        return sum(max(0, min(store.batch, size)) for size in sizes)

    done = float(num_rows(store.shards()))

    def report(more: float) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress("fit people", round(done), num_people)

    report(0)
    return report
