"""What a training is put together from: targets, optimizer, processes."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

from hypernet.bases.base import BaseModel
from hypernet.devices import WAIT, use_device
from hypernet.fitting.targets import SKIPPED_FILE, TargetStore, detector_fit
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.network.prediction import load_network
from hypernet.optimizers import make_adamw
from hypernet.recipe import TrainConfig
from hypernet.training.state import has_state
from lidb_peft import LiDBConfig, LiDBSpace
from lidb_peft.files import was_interrupted
from lidb_peft.outputs import check_output_folder

LAST, BEST, SAMPLES, LOG_FILE = "last", "best", "samples", "log.jsonl"
_WRITTEN = (LAST, BEST, f"{SAMPLES}/step-*.png", LOG_FILE, SKIPPED_FILE)
_SCALE_FROM = 256  # targets, of which the layers' scale is the mean
_PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def make_optimizer(network: HyperNetwork, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what is trained of a hypernetwork, its state in 8 bits on request.

    Raises:
        ValueError: bitsandbytes is asked for and is not installed.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return make_adamw(config.optimizer, parameters, config.lr, weight_decay=config.weight_decay)


def targets_to_learn(
    folder: str | Path | None, space: LiDBSpace, base: BaseModel, network: HyperNetwork, config: TrainConfig
) -> TargetStore | None:
    """Open the targets in ``folder`` for the weight term; None if there is no such term.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the targets are of another base, seed, prompt or crop, or ``config`` does not go with them.
    """
    if bool(config.weights) != (folder is not None):
        raise ValueError(f"weights is {config.weights} and targets is {folder}; the weight term needs targets, and "
                         f"targets need a weight above 0")  # fmt: skip
    if folder is None:
        return None
    if network.bases is not None and config.compare == "factors":
        raise ValueError("compare is 'factors', which mean nothing on learned bases; choose 'updates'")
    store = TargetStore(folder, space)
    fit = {"prompt": network.config.trigger, "crop": config.crop, "size_px": base.size_px}
    store.check_fit(fit | detector_fit(config.crop, config.face_detector))
    return store


def some_targets(store: TargetStore) -> Tensor:
    """Targets from all over the store, ``(n, L, row)``."""
    keys = sorted(store.places)
    if not keys:
        raise ValueError(f"{store.folder} holds no targets yet; run hdb preoptimize first")
    return store.thetas(keys[:_SCALE_FROM])


def open_network(
    trained: Path | None,
    start: HyperNetworkConfig | None,
    encoder: str,
    base: BaseModel,
    lidb_config: LiDBConfig,
    base_model_name: str,
    seed: int,
    **options: Any,
) -> tuple[HyperNetwork, LiDBSpace]:
    """The hypernetwork to train, and the space of its predictions on ``base``.

    Args:
        trained: folder of the training to go on with; None begins one.
        start: of the hypernetwork that it begins, or began, with; None makes a fresh one around ``encoder``.
        lidb_config: of a fresh one's predictions.
        options: of a fresh one's `HyperNetworkConfig`.

    Raises:
        FileNotFoundError: it cannot be had.
        ValueError: it cannot be had, is of another base, or the one that is trained has other options.
    """
    if trained is None:
        if start is not None:
            network = load_network(start)
            return network, network.space_on(base.adapted)
        space = LiDBSpace(base.adapted, lidb_config)
        return HyperNetwork.from_encoder(encoder, space, Path(base_model_name).name, seed, **options), space
    check_resumable(trained)
    network = HyperNetwork.from_pretrained(trained / LAST)
    found = {} if start is not None else {name: getattr(network.config, name) for name in options}
    differing = [f"{name} {value} (here {options[name]})" for name, value in found.items() if value != options[name]]
    if differing:
        raise ValueError(f"{trained} trains a hypernetwork with {', '.join(differing)}; resume with the same options")
    return network, network.space_on(base.adapted)


def check_folder(out: Path, resume: bool, inputs: Sequence[str | Path | None]) -> None:
    """Raise now what a training in ``out`` would destroy or could not write.

    Raises:
        ValueError, OSError: as `check_start`, or `check_output_folder`; ``inputs`` are what the training reads.
    """
    check_start(out, resume)
    check_output_folder(out, inputs, _WRITTEN, is_resumed=resume or was_interrupted(out))


def check_start(out: Path, resume: bool) -> None:
    """Raise FileNotFoundError or ValueError unless there is a training in ``out`` just if it is to be resumed."""
    if resume:
        check_resumable(out)
    elif has_state(out):
        raise ValueError(f"{out} holds a training already; resume it, or choose another folder")


def check_resumable(folder: Path) -> None:
    """Raise FileNotFoundError unless there is a training in ``folder`` to resume."""
    if not has_state(folder):
        raise FileNotFoundError(f"{folder} holds no training to resume; check the folder, or train without resuming")


def make_accelerator(base: BaseModel, config: TrainConfig, out: Path, trackers: Sequence[str]) -> Accelerator:
    """Join the other processes, if there are any, on the base's kind of device and in its precision.

    Raises:
        ValueError: a tracker is unknown or not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    missing = [name for name in trackers if name not in available]
    if missing:
        raise ValueError(f"the tracker {missing[0]!r} is not installed; pip install it if it is one of "
                         f"{', '.join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))}")  # fmt: skip
    use_device(base.device)
    accelerator = Accelerator(
        cpu=base.device.type == "cpu",
        mixed_precision=_PRECISIONS[base.dtype],
        gradient_accumulation_steps=config.accumulation,
        log_with=list(trackers) or None,
        project_dir=out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )
    if trackers:
        settings = {name: value for name, value in asdict(config).items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("hypernetwork", settings)
    return accelerator
