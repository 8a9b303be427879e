"""From a folder of people to targets, a hypernetwork or a start: `hdb preoptimize`, `train`, `learn-start` in one call.

The arguments become a request, which is resolved and checked before a base model is loaded and then used unchanged.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypernet.base_models.base import BaseModel
from hypernet.base_models.config import BaseConfig
from hypernet.base_models.loading import Base, as_base, base_inputs, base_name
from hypernet.bundles import find_bundle, hypernetwork_source
from hypernet.claims import Shares
from hypernet.devices import choose_device
from hypernet.fitting import preoptimize as preoptimization
from hypernet.fitting.starts import save_start
from hypernet.inputs import cache
from hypernet.inputs.people import People, open_people, with_detector
from hypernet.inputs.recognition import check_recogniser, load_recogniser
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import read_config
from hypernet.network.prediction import load_network, predicted_recipe, predicted_start
from hypernet.opened_request import recipe_space
from hypernet.processes import join_processes, told_of_the_dead, wait_for_others
from hypernet.recipe import (
    DEFAULT_BASE,
    DEFAULT_ENCODER,
    TARGET_STEPS,
    PersonalizeConfig,
    PreoptimizeConfig,
    StageProgress,
    StartConfig,
    TrainConfig,
    changed,
)
from hypernet.training import loop, start
from hypernet.training.setup import check_folder, open_network
from hypernet.training.start import StartState
from lidb_peft import LiDBConfig
from lidb_peft.outputs import check_output

if TYPE_CHECKING:
    from accelerate import PartialState

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetsRequest:
    """A request to make targets.

    Attributes:
        people: from `open_people`.
        out: folder of the store, or a URL that fsspec opens.
        base: a base model, loaded or not.
        config: how to fit.
        lidb_config: theta's bases and dimensions.
        network: hypernetwork whose predictions fits start from; None starts them at theta_0.
    """

    people: People
    out: str | Path
    base: Base
    config: PreoptimizeConfig
    lidb_config: LiDBConfig
    network: HyperNetworkConfig | None = None


@dataclass(frozen=True)
class TrainRequest:
    """A request to train a hypernetwork.

    Attributes:
        people, held_out: from `open_people`; without ``held_out``, a fraction of ``people`` is held out.
        out: folder of the training.
        base: a base model, loaded or not.
        config: how to train.
        lidb_config: config of a new hypernetwork's predictions.
        targets: folder or URL of the target store; None uses no targets.
        network: the hypernetwork to start from; None makes a new one around ``encoder`` with ``network_options``.
        resume: resume the training in ``out``.
        trackers: trackers supported by accelerate.
    """

    people: People
    out: Path
    base: Base
    config: TrainConfig
    lidb_config: LiDBConfig
    targets: str | Path | None = None
    held_out: People | None = None
    network: HyperNetworkConfig | None = None
    encoder: str = DEFAULT_ENCODER
    network_options: dict[str, Any] | None = None
    resume: bool = False
    trackers: tuple[str, ...] = ()


def preoptimize(
    people: People | str | Path,
    out: str | Path = "targets",
    base: Base = DEFAULT_BASE,
    config: PersonalizeConfig | None = None,
    lidb_config: LiDBConfig | None = None,
    hypernet: str | Path = "none",
    batch_size: int | None = None,
    progress: StageProgress | None = None,
    streaming: bool = False,
    **options: Any,
) -> preoptimization.Preoptimized:
    """Fit LiDB weights to each person of a data set, many at once: targets to train a hypernetwork on.

    An interrupted run is resumed; processes that write to the same store at the same time share the work.

    Args:
        people: anything that `open_people` opens, such as a folder, or its result.
        out: folder of the target store, or a URL that fsspec opens, such as ``s3://bucket/targets``. Nothing can be
            claimed at a URL: only the processes of one launch share the work there, in fixed shares.
        base: a loaded base model, or what `load_base` loads.
        config: the fit's recipe; by default the base's own.
        lidb_config: the bases; by default the base's own.
        hypernet: id or folder of a hypernetwork whose predictions the fits start from.
        batch_size: people to fit at once; None is as many as fit into GPU memory, or a few on a CPU.
        progress: called with (stage, people done, people of this process or None if unknown).
        streaming: stream a data set instead of copying it into the cache first.
        options: fields of the recipe to change, such as ``theta_steps=50``.

    Raises:
        ValueError, OSError: as `open_targets` and `preoptimize` of `hypernet.fitting.preoptimize`.
    """
    bundle = find_bundle(base_name(base))
    recipe = changed(config or bundle.recipe, {"theta_steps": TARGET_STEPS} | options if config is None else options)
    source = people.source if isinstance(people, People) else str(people)
    preoptimization.check_store(out, [source, *base_inputs(base), str(hypernet)])
    request = TargetsRequest(
        config=PreoptimizeConfig(with_detector(recipe), batch_size),
        network=_network_config(hypernet, base),
        people=open_people(people, streaming) if isinstance(people, str | Path) else people,
        out=out, base=base, lidb_config=lidb_config or bundle.lidb_config,
    )  # fmt: skip
    return make_targets(request, progress)


@told_of_the_dead("pre-optimisation", "start all again, with the same --out, to make the targets that are missing")
def make_targets(request: TargetsRequest, progress: StageProgress | None = None) -> preoptimization.Preoptimized:
    """Carry out a request for targets, or this process's share of it; see `preoptimize`."""
    state, base = _on_own_device(request.base)
    config, recipe = request.config, request.config.recipe
    people = cache.prepared(request.people, base.size_px, recipe, make=False)
    if request.network is None:
        space, predict, start_name = recipe_space(base, recipe, request.lidb_config), None, "theta_0"
    else:
        space, predict, start_name = predicted_start(request.network, base.adapted, base.device)
    with state.main_process_first():  # which makes the store
        store = preoptimization.open_targets(request.out, base, space, people, config, start_name)
    count = people.count()
    _log.info("%s: %s people, %d at a time", people.source, count or "any number of", config.batch_size or store.batch)
    result = preoptimization.preoptimize(
        people, base, space, store, config, predict,
        None if store.can_be_claimed else Shares(state.process_index, state.num_processes),
        progress if state.is_main_process else None,
    )  # fmt: skip
    if not store.can_be_claimed:
        wait_for_others(state)
    result.process, result.num_processes = state.process_index, state.num_processes
    result.num_targets, result.num_skipped, result.shard_size = len(store), len(store.skipped()), store.batch
    result.missing = 0 if count is None else -(-count // store.batch) - len(store.shards())
    result.skipped_file = store.skipped_file
    return result


def train(
    people: People | str | Path,
    out: str | Path = "hypernetwork",
    base: Base = DEFAULT_BASE,
    config: TrainConfig | None = None,
    lidb_config: LiDBConfig | None = None,
    targets: str | Path | None = None,
    hypernet: str | Path = "none",
    encoder: str | Path = DEFAULT_ENCODER,
    network_options: dict[str, Any] | None = None,
    held_out: People | str | Path | None = None,
    resume: bool = False,
    trackers: Sequence[str] = (),
    progress: StageProgress | None = None,
    **options: Any,
) -> loop.Trained:
    """Train a hypernetwork on the people of a data set and write its checkpoints to ``out``.

    Processes started by ``accelerate launch`` train together.

    Args:
        people: anything that `open_people` opens, such as a folder, or its result.
        base: a loaded base model, or what `load_base` loads.
        config: settings; with ``targets``, the default includes their loss term.
        lidb_config: config of a new hypernetwork's predictions; by default the base's own.
        targets: folder or URL of targets made by `preoptimize`, to compare predictions with.
        hypernet: id or folder of a hypernetwork to start from; by default a new one is made.
        encoder: id or folder of the vision transformer of a new hypernetwork.
        network_options: options of a new hypernetwork's `HyperNetworkConfig`, such as ``{"hidden_size": 256}``.
        held_out: people to validate on, instead of a fraction of ``people``.
        resume: resume from the last state in ``out``.
        trackers: trackers supported by accelerate, such as ``tensorboard``.
        progress: called with ("train", steps done, total steps).
        options: fields of the config to change, such as ``steps=1000``.

    Raises:
        ValueError, OSError: as `hypernet.training.loop.train` and `hypernet.training.setup.open_network`.
    """
    if config is None:
        options = {"target_distance": float(targets is not None)} | options
    config = with_detector(changed(config or TrainConfig(), options))
    sources = [data.source if isinstance(data, People) else data for data in (people, held_out)]
    check_folder(Path(out), resume, [*sources, targets, *base_inputs(base), str(hypernet)])
    request = TrainRequest(
        *(open_people(people) if isinstance(people, str | Path) else people, Path(out), base, config),
        lidb_config=lidb_config or find_bundle(base_name(base)).lidb_config,
        targets=targets,
        held_out=open_people(held_out) if isinstance(held_out, str | Path) else held_out,
        network=_network_config(hypernet, base),
        encoder=str(encoder), network_options=network_options, resume=resume, trackers=tuple(trackers),
    )  # fmt: skip
    return train_network(request, progress)


def train_network(request: TrainRequest, progress: StageProgress | None = None) -> loop.Trained:
    """Carry out a training request, together with other processes if there are any; see `train`."""
    state, base = _on_own_device(request.base)
    report = progress if state.is_main_process else None
    people, held_out = (
        None if source is None else _prepared(source, base.size_px, request.config, state.num_processes, report)
        for source in (request.people, request.held_out)
    )
    network, space = open_network(
        request.out if request.resume else None, request.network, request.encoder, base, request.lidb_config,
        base_name(request.base), request.config.seed, **(request.network_options or {}),
    )  # fmt: skip
    return loop.train(
        people or request.people, base, network, request.out, request.config, request.targets, held_out,
        request.resume, request.trackers, progress, space,
    )  # fmt: skip


def _prepared(people: People, size_px: int, config: TrainConfig, world: int, progress: StageProgress | None) -> People:
    """A data set from the cache, prepared first if the training looks at everybody anyway."""
    if not config.cache:
        return people
    looks = config.steps * config.gradient_accumulation_steps * config.batch_size * world
    return cache.prepared(people, size_px, config, config.num_workers, progress, make=looks >= (people.count() or 0))


def learn_start(
    people: People | str | Path,
    out: str | Path,
    base: Base = DEFAULT_BASE,
    config: StartConfig | None = None,
    recipe: PersonalizeConfig | None = None,
    hypernet: str | Path = "auto",
    progress: StageProgress | None = None,
    **options: Any,
) -> StartState:
    """Learn a start for finetunings and write it as a LoRA, see `hypernet.training.start`; resumes an interrupted run.

    Args:
        people: anything that `open_people` opens, such as a folder, or its result.
        base: a loaded base model, or what `load_base` loads.
        config: settings of the learning.
        recipe: recipe of the later finetunings; by default the base's own, or with a hypernetwork its
            `predicted_recipe`.
        hypernet: id or folder of the hypernetwork whose predictions are finetuned; ``auto`` is a bundled base's own,
            ``none`` uses none.
        progress: called with ("learn start", rounds done, total rounds).
        options: fields of the recipe to change, such as ``rank=8``.

    Raises:
        ValueError, OSError: as `rounds_of`, `resumable_start` and `learn_start` of `hypernet.training.start`, or
            ``out`` cannot be written.
    """
    out, name, config = Path(out), base_name(base), config or StartConfig()
    source = people.source if isinstance(people, People) else str(people)
    # A base's folder may have a start in it.
    check_output(out, [source, *(file for file in base_inputs(base) if Path(file).is_file())])
    bundle, network_config = find_bundle(name), _network_config(hypernet, base)
    if recipe is None:
        recipe = bundle.recipe if network_config is None else predicted_recipe(network_config, bundle.recipe)
    recipe = with_detector(changed(recipe, options))
    check_recogniser(name, recipe)
    opened = open_people(people) if isinstance(people, str | Path) else people
    network = None if network_config is None else load_network(network_config).requires_grad_(False)
    base = as_base(base)
    space = recipe_space(base, recipe, bundle.lidb_config) if network is None else network.space_on(base.adapted)
    recogniser = load_recogniser(name, recipe, base.device)
    of_round = start.rounds_of(opened, base, recipe, config, network, recogniser)
    report = None if progress is None else partial(progress, "learn start")
    with start.resumable_start(out.with_suffix(".unfinished"), space, recipe.rank, config.seed) as (state, checkpoint):
        start.learn_start(
            base, space, of_round, config, recipe.lora_fit, state, recipe.rank,
            None if network is None else network.bases, report, checkpoint, recogniser,
        )  # fmt: skip
        save_start(out, state.start, recipe.rank, space)
    return state


def _network_config(hypernet: str | Path, base: Base) -> HyperNetworkConfig | None:
    """Read what a hypernetwork is before a base is loaded, which may be a download of gigabytes."""
    source = hypernetwork_source(hypernet, base_name(base))
    return None if source is None else read_config(source)


def _on_own_device(base: Base) -> "tuple[PartialState, BaseModel]":
    """Meet the processes that a launcher has started, if one has, and load the base on this one's own device."""
    device = base.device if isinstance(base, BaseModel | BaseConfig) else "auto"
    state = join_processes(choose_device(str(device)))
    return state, as_base(base, None if state.num_processes == 1 else str(state.device))
