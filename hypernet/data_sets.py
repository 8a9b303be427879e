"""From a folder of people to targets, and to a hypernetwork: ``hdb preoptimize`` and ``hdb train`` as one call each."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypernet.bases.base import BaseModel
from hypernet.bases.loading import as_base, base_name, load_base
from hypernet.bundles import Bundle, find_bundle, hypernetwork_source
from hypernet.devices import choose_device, join_processes
from hypernet.fitting import preoptimize as preoptimization
from hypernet.inputs.people import People, open_people
from hypernet.network.prediction import predicted_start
from hypernet.recipe import (
    DEFAULT_BASE,
    DEFAULT_ENCODER,
    TARGET_STEPS,
    PersonalizeConfig,
    PreoptimizeConfig,
    StageProgress,
    TrainConfig,
    changed,
)
from hypernet.training import loop
from hypernet.training.setup import open_network
from lidb_peft import LiDBConfig, LiDBSpace

if TYPE_CHECKING:
    from accelerate import PartialState


def preoptimize(
    people: People | str | Path,
    out: str | Path = "targets",
    base: BaseModel | str | Path = DEFAULT_BASE,
    config: PersonalizeConfig | None = None,
    lidb_config: LiDBConfig | None = None,
    hypernet: str | Path = "none",
    batch: int | None = None,
    progress: StageProgress | None = None,
    **options: Any,
) -> preoptimization.Preoptimized:
    """Fit LiDB weights to each person of a data set, many at once: targets to train a hypernetwork on.

    A run that was stopped is resumed; processes that ``accelerate launch`` has started share the work.

    Args:
        people: what `open_people` opens, such as a folder, or has opened.
        out: folder of the target store.
        base: a loaded base model, or what `load_base` loads.
        config: the fit's recipe; by default the base's own.
        lidb_config: the bases; by default the base's own.
        hypernet: id or folder of a hypernetwork whose predictions the fits start at.
        batch: people fitted at once; None is as many as a GPU's memory allows, and a few on a CPU.
        progress: called with (stage, people done, this process' people or None if that is not known).
        options: fields of the recipe to change, such as ``theta_steps=50``.

    Raises:
        ValueError, OSError: as `open_targets` and `preoptimize` of `hypernet.fitting.preoptimize`.
    """
    opened = people if isinstance(people, People) else open_people(people)
    state, base, bundle = _on_own_device(base)
    recipe = changed(config or bundle.recipe, {"theta_steps": TARGET_STEPS} | options if config is None else options)
    settings = PreoptimizeConfig(recipe, batch)
    space = LiDBSpace(base.adapted, lidb_config or bundle.lidb_config)
    source = hypernetwork_source(hypernet, base.name)
    start, start_name = (None, "theta_0") if source is None else predicted_start(source, space, base.device)
    with state.main_process_first():  # which makes the store
        store = preoptimization.open_targets(out, base, space, opened, settings, start_name)
    return preoptimization.preoptimize(
        opened, base, space, store, settings, start, state.process_index, state.num_processes, progress
    )


def train(
    people: People | str | Path,
    out: str | Path = "hypernetwork",
    base: BaseModel | str | Path = DEFAULT_BASE,
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
    """Train a hypernetwork on the people of a data set and leave its checkpoints in ``out``.

    Processes that ``accelerate launch`` has started train together.

    Args:
        people: what `open_people` opens, such as a folder, or has opened.
        base: a loaded base model, or what `load_base` loads.
        config: how; with ``targets`` the default has their term of the loss too.
        lidb_config: of a new hypernetwork's predictions; by default the base's own.
        targets: folder of what `preoptimize` has made, to compare predictions with.
        hypernet: id or folder of a hypernetwork to start from; by default a new one is made.
        encoder: id or folder of a new one's vision transformer.
        network_options: of a new one's `HyperNetworkConfig`, such as ``{"hidden_size": 256}``.
        held_out: people to validate on, instead of a fraction of ``people``.
        resume: resume from the last state in ``out``.
        trackers: that accelerate knows, such as ``tensorboard``.
        progress: called with ("train", steps done, steps in all).
        options: fields of the config to change, such as ``steps=1000``.

    Raises:
        ValueError, OSError: as `hypernet.training.loop.train` and `hypernet.training.setup.open_network`.
    """
    if config is None:
        config = TrainConfig(weights=float(targets is not None))
    config = changed(config, options)
    opened, held_out = (open_people(data) if isinstance(data, str | Path) else data for data in (people, held_out))
    name = base_name(base)
    _, base, bundle = _on_own_device(base)
    network, _ = open_network(
        Path(out) if resume else None, hypernetwork_source(hypernet, base.name), str(encoder), base,
        lidb_config or bundle.lidb_config, name, config.seed, **(network_options or {}),
    )  # fmt: skip
    return loop.train(opened, base, network, out, config, targets, held_out, resume, trackers, progress)


def _on_own_device(base: BaseModel | str | Path) -> "tuple[PartialState, BaseModel, Bundle]":
    """Meet the processes that a launcher has started, if one has, and load the base on this one's own device."""
    bundle = find_bundle(base_name(base))
    state = join_processes(base.device if isinstance(base, BaseModel) else choose_device())
    if not isinstance(base, BaseModel) and state.num_processes > 1:
        base = load_base(base, str(state.device))
    return state, as_base(base), bundle
