"""Which device and which precision: `auto` chooses and says what it chose; anything else is taken or refused."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OUT_OF_MEMORY = "turn --gradient-checkpointing on, or pass a smaller --batch-size (if there is one) or --precision bf16"
"""What helps."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(device: str = "auto") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps`` into a device that is there.

    Raises:
        ValueError: the device was asked for by name and is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device!r} is not a device; choose auto, cpu, cuda, cuda:N or mps") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device} was asked for, but this torch ({torch.__version__}) sees no CUDA device; "
            f"install a CUDA build of torch and a driver, or pass --device auto"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device} was asked for, but there are {torch.cuda.device_count()} CUDA devices")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps was asked for, but this machine has no Apple GPU; pass --device auto")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {device!r} is not supported; choose auto, cpu, cuda, cuda:N or mps")
    return chosen


def use_device(device: torch.device) -> None:
    """Make ``cuda:1`` the card that plain ``cuda`` means: accelerate, in a process by itself, computes there."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def tune_device(device: torch.device) -> None:
    """Set what all work on a CUDA device gains from.

    Shapes are the same in every step, so that cuDNN's search for the fastest kernels pays, and cards of the GTX 16
    series compute NaN in fp16 without it. Drivers for Windows put into the system's memory what the card has no room
    for, so that nothing ever fails and everything crawls: there a process takes no more than nearly all that is free.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = True
    if sys.platform == "win32" and _card(device) not in _memory_limits:
        limit_memory(device, int(_SHARE_ON_WINDOWS * (free_bytes(device) + torch.cuda.memory_allocated(device))))


def release_memory(device: torch.device) -> None:
    """Give back what a failed attempt held: tensors in cycles, and what the allocator keeps for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The base model's dtype: ``auto`` is bf16 on CUDA cards that have it, fp16 on older ones, fp32 elsewhere.

    Raises:
        ValueError: an unknown name, or fp16 on a CPU.
    """
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if has_bf16(device) else torch.float16
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision!r} is unknown; choose auto, {', '.join(PRECISIONS)}")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 does not train on a CPU; choose fp32 or bf16, or a CUDA device")
    return PRECISIONS[precision]


def has_bf16(device: torch.device) -> bool:
    """Whether a CUDA device computes in bf16 by itself; `torch.cuda.is_bf16_supported` counts slow emulation too."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


_SHARE_ON_WINDOWS = 0.95
_memory_limits: dict[int, int] = {}  # card -> bytes


def limit_memory(device: torch.device, num_bytes: int) -> None:
    """Let this process take no more than ``num_bytes`` of a CUDA device, as if the card had no more.

    Raises:
        ValueError: the device is not CUDA, or has less.
    """
    if device.type != "cuda":
        raise ValueError(f"a limit for the memory of {device} was asked for; only a CUDA device has one: leave "
                         f"--max-vram out")  # fmt: skip
    total = torch.cuda.get_device_properties(device).total_memory
    if num_bytes > total:
        raise ValueError(f"--max-vram is {num_bytes / 1e9:.1f} GB, and {device} has {total / 1e9:.1f} GB; pass less, "
                         f"or leave it out")  # fmt: skip
    card = _card(device)
    torch.cuda.set_per_process_memory_fraction(num_bytes / total, card)
    _memory_limits[card] = num_bytes


@contextmanager
def memory_limited(device: torch.device, num_bytes: int) -> Iterator[None]:
    """`limit_memory` for a block."""
    card = _card(device)
    before = _memory_limits.get(card)
    limit_memory(device, num_bytes)
    try:
        yield
    finally:
        limit_memory(device, before or torch.cuda.get_device_properties(device).total_memory)
        if before is None:
            del _memory_limits[card]


def free_bytes(device: torch.device) -> int:
    """How much memory of a CUDA device this process can still take, by `limit_memory` too."""
    taken = torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - taken
    return min(free, _memory_limits.get(_card(device), free + taken) - taken)


def _card(device: torch.device) -> int:
    """The number of a CUDA device; ``cuda`` is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def describe_choice(device: torch.device, dtype: torch.dtype) -> str:
    """The choice in words, for people: ``cuda (NVIDIA GeForce RTX 3060), bf16``."""
    name = f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return f"{name}, {precision_name(dtype)}"


def precision_name(dtype: torch.dtype) -> str:
    """What ``--precision`` calls a dtype."""
    return next(name for name, value in PRECISIONS.items() if value == dtype)
