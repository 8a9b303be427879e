"""What a training is put together from: targets, optimizer, processes."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor
from torch.nn import Parameter

from hypernet.base_models.base import BaseModel
from hypernet.devices import release_memory, use_device
from hypernet.errors import is_out_of_memory
from hypernet.fitting.targets import SKIPPED_FILE, TargetStore, crop_fit
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.network.prediction import load_network
from hypernet.optimizers import make_adamw
from hypernet.processes import WAIT
from hypernet.recipe import NetworkConfig, TrainConfig
from hypernet.training.examples import Batch, Examples
from hypernet.training.objective import Objective
from hypernet.training.state import has_state
from lidb_peft import LiDBConfig, LiDBSpace
from lidb_peft.files import was_interrupted
from lidb_peft.outputs import check_output_folder

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

LAST, BEST, SAMPLES, LOG_FILE = "last", "best", "samples", "log.jsonl"
_WRITTEN = (LAST, BEST, f"{SAMPLES}/step-*.png", LOG_FILE, SKIPPED_FILE)
_SCALE_FROM = 256  # targets, of which the layers' scale is the mean
_RUN_OUT = ("cuda",)  # devices whose memory a step may not fit into, and which say so
_PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def make_optimizer(network: HyperNetwork, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over what is trained of a hypernetwork, its state in 8 bits on request.

    Raises:
        ValueError: bitsandbytes is asked for and is not installed.
    """
    return make_adamw(config.optimizer, trained_parameters(network), config.lr, weight_decay=config.weight_decay)


def trained_parameters(network: HyperNetwork) -> list[Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def make_ema(network: HyperNetwork, config: TrainConfig) -> "EMAModel | None":
    """The moving average of what is trained of a hypernetwork, where it is trained; None if ``ema_decay`` is 0.

    Every process has its own: the weights are the same in all of them, and so is their average.
    """
    if not config.ema_decay:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(trained_parameters(network), decay=config.ema_decay)


@contextmanager
def averaged(network: HyperNetwork, ema: "EMAModel | None") -> Iterator[None]:
    """Give a hypernetwork the average of its weights for a block; without an average nothing changes."""
    if ema is None:
        yield
        return
    parameters = trained_parameters(network)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def recomputes(objective: Objective, examples: Examples) -> bool:
    """Whether activations are recomputed; ``auto`` tries a pass of the first people on a CUDA device, and says so.

    To be asked before the objective is wrapped for several processes: each decides for itself.
    """
    choice, device = objective.config.gradient_checkpointing, objective.base.device
    if choice != "auto" or device.type not in _RUN_OUT:
        return choice == "on"
    rows = [(0, row % len(examples)) for row in range(objective.config.batch_size)]
    if _fits(objective, examples.collate([examples[place] for place in rows])):
        return False
    warnings.warn(
        f"a step does not fit into the memory of {device}; gradient checkpointing is on now, which takes less memory "
        f"and more time",
        stacklevel=2,
    )
    return True


def _fits(objective: Objective, batch: Batch) -> bool:
    """Whether a pass, and what the optimizer will hold beside it, fit into the memory; nothing stays of it."""
    device = objective.base.device
    objective.to(device).train()
    try:
        _try_pass(objective, batch)
        is_full = False
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        is_full = True
    objective.zero_grad(set_to_none=True)
    if is_full:
        release_memory(device)  # only here has the failed attempt let go of its tensors
    return not is_full


def _try_pass(objective: Objective, batch: Batch) -> None:
    """Take a pass; what it holds is gone with its frame, also where it fails."""
    device, dtype = objective.base.device, objective.base.dtype
    copies = 2 + (objective.config.ema_decay > 0)  # Adam's two moments and the average
    held = [torch.empty_like(each) for each in trained_parameters(objective.network) for _ in range(copies)]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss, _ = objective(batch.to(device))
    loss.backward()
    del held


def targets_to_learn(
    folder: str | Path | None, space: LiDBSpace, base: BaseModel, network: HyperNetwork, config: TrainConfig
) -> TargetStore | None:
    """Open the targets in ``folder`` for the distance to them; None if there is no such term.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the targets are of another base, seed, prompt or crop, or ``config`` does not go with them.
    """
    if bool(config.target_distance) != (folder is not None):
        raise ValueError(f"target_distance is {config.target_distance} and targets is {folder}; that term needs "
                         f"targets, and targets need a weight above 0")  # fmt: skip
    if folder is None:
        return None
    if network.bases is not None and config.compare == "factors":
        raise ValueError("compare is 'factors', which mean nothing on learned bases; choose 'updates'")
    store = TargetStore(folder, space)
    store.check_fit({"prompt": network.config.trigger, "size_px": base.size_px} | crop_fit(config))
    return store


def some_targets(store: TargetStore) -> Tensor:
    """Targets from all over the store, ``(n, L, row)``."""
    keys = sorted(store.places)
    if not keys:
        raise ValueError(f"{store.place} holds no targets yet; run hdb preoptimize first")
    return store.thetas(keys[:_SCALE_FROM])


def open_network(
    trained: Path | None,
    start: HyperNetworkConfig | None,
    encoder: str,
    base: BaseModel,
    lidb_config: LiDBConfig,
    base_model_name: str,
    seed: int,
    adapt: str = NetworkConfig.adapt,
    **options: Any,
) -> tuple[HyperNetwork, LiDBSpace]:
    """The hypernetwork to train, and the space of its predictions on ``base``.

    Args:
        trained: folder of the training to go on with; None begins one.
        start: of the hypernetwork that it begins, or began, with; None makes a fresh one around ``encoder``.
        lidb_config: of a fresh one's predictions.
        adapt: a fresh one's layers, as in `hypernet.recipe.NetworkConfig`.
        options: of a fresh one's `HyperNetworkConfig`.

    Raises:
        FileNotFoundError: it cannot be had.
        ValueError: it cannot be had, is of another base, or the one that is trained has other options.
    """
    if trained is None:
        if start is not None:
            network = load_network(start)
            return network, network.space_on(base.adapted)
        space = LiDBSpace(base.models_to_adapt(adapt), lidb_config)
        return HyperNetwork.from_encoder(encoder, space, Path(base_model_name).name, seed, **options), space
    check_resumable(trained)
    network = HyperNetwork.from_pretrained(trained / LAST)
    found = {} if start is not None else {name: getattr(network.config, name) for name in options}
    differing = [f"{name} {value} (here {options[name]})" for name, value in found.items() if value != options[name]]
    space = network.space_on(base.adapted)
    if start is None and space.layer_names != LiDBSpace(base.models_to_adapt(adapt), lidb_config).layer_names:
        differing.append(f"other layers (here those of --adapt {adapt})")
    if differing:
        raise ValueError(f"{trained} trains a hypernetwork with {', '.join(differing)}; resume with the same options")
    return network, space


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
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=list(trackers) or None,
        project_dir=out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )
    if trackers:
        settings = {name: value for name, value in asdict(config).items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("hypernetwork", settings)
    return accelerator
