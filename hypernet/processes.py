"""Processes that a launcher has started and that work together: they meet, wait for each other, and notice a death."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from hypernet.devices import use_device
from hypernet.errors import first_sentence

if TYPE_CHECKING:
    from accelerate import PartialState

WAIT = timedelta(minutes=30)
"""How long a process waits for another, which may be drawing sample pictures or be dead."""
JOIN_WAIT = timedelta(minutes=1)
"""How long a process waits for the others to be started."""
_SIGNS = ("connection", "timed out", "gloo", "nccl", "peer")


def join_processes(device: torch.device) -> "PartialState":
    """Meet the other processes, if a launcher started some, before a base is loaded onto ``PartialState.device``.

    Raises:
        ConnectionError: not all of them have come within a minute.
    """
    from accelerate import PartialState
    from torch.distributed import distributed_c10d

    use_device(device)
    try:
        state = PartialState(cpu=device.type == "cpu", timeout=JOIN_WAIT)
    except RuntimeError as error:  # torch's own error is one
        where = f"process {int(os.environ.get('RANK', 0)) + 1} of {os.environ.get('WORLD_SIZE', 1)}"
        raise ConnectionError(
            f"{where} has waited for the others, and not all of them have come within {JOIN_WAIT.seconds} seconds "
            f"({first_sentence(error)}); see what they said, and start all of them again"
        ) from error
    if state.num_processes > 1:  # from now on one may wait for another that works
        distributed_c10d._set_pg_timeout(WAIT)
        distributed_c10d._get_default_store().set_timeout(WAIT)
        atexit.register(state.destroy_process_group)  # or torch warns
    return state


def wait_for_others(state: "PartialState") -> None:
    """Wait until all processes have done their share, however long that takes."""
    from torch.distributed import distributed_c10d

    if state.num_processes > 1:
        distributed_c10d._set_pg_timeout(timedelta(days=7))
        state.wait_for_everyone()


@contextmanager
def told_of_the_dead(what: str, remedy: str) -> Iterator[None]:
    """Say in a sentence that another process has gone; torch says where in its code the connection broke.

    Args:
        what: the processes do together, such as "training".
        remedy: what to do about it.

    Raises:
        ConnectionError: another process has died or hangs.
    """
    try:
        yield
    except RuntimeError as error:
        if not tells_of_the_dead(error):
            raise
        raise ConnectionError(
            f"another process of this {what} has died or hangs ({first_sentence(error)}); see what it said, and "
            f"{remedy}"
        ) from error


def tells_of_the_dead(error: BaseException) -> bool:
    """Whether the connection to another process broke: by the error's type or, for gloo's are plain RuntimeErrors, by
    what it says."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
