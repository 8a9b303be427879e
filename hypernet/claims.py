"""Pieces of work that any number of processes share through a folder, on one machine or many.

Whoever is free claims the next piece, so that a slow machine does not decide when the work is done, and what a dead one
had claimed is taken over. A claim says who is at work, no more: a process that was only suspended goes on after another
has taken over. So a piece must be the same whoever makes it, and be written whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from filelock import SoftFileLease, Timeout

EXPIRY_S = 60.0
"""A claim that was not refreshed for so long is void; that of a process of this machine is void once it is dead."""
LOOK_S = 0.5
"""How often somebody who has nothing left to claim looks whether the others are done, or dead."""


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Make a folder, and let one process after the other do something in it, such as begin what they will share."""
    folder.mkdir(parents=True, exist_ok=True)
    with SoftFileLease(folder / ".begin.claim", lease_duration=EXPIRY_S, poll_interval=LOOK_S):
        yield


class Sharing(Protocol):
    """How processes agree on who makes which piece."""

    waits: bool
    """Whether pieces that others have may still come to this process."""

    def take(self, piece: int) -> bool: ...

    def release(self, piece: int) -> None: ...

    def release_all(self) -> None: ...


def take_missing(sharing: Sharing, piece: int, is_made: Callable[[int], bool]) -> bool:
    """Claim a piece that is not made, not even in the moment before the claim; see `Claims.take`."""
    if is_made(piece) or not sharing.take(piece):
        return False
    if is_made(piece):
        sharing.release(piece)
        return False
    return True


class Claims:
    """The pieces that this process has claimed, each by a file in ``folder`` that it keeps refreshing."""

    waits = True

    def __init__(self, folder: Path, expiry_s: float | None = None) -> None:
        """Claim pieces of the work in ``folder``; all who share it must name one ``expiry_s``."""
        self.folder, self.expiry_s = folder, expiry_s or EXPIRY_S
        self._leases: dict[int, SoftFileLease] = {}

    def take(self, piece: int) -> bool:
        """Claim a piece, unless another process, or this one, has it.

        Raises:
            OSError: the folder cannot be written.
        """
        lease = self._leases.get(piece)  # it knows since when another's claim has not been refreshed
        if lease is None:
            # The thread that looks ahead claims what the main thread releases.
            lease = self._leases[piece] = SoftFileLease(
                self.folder / f".{piece:05}.claim", lease_duration=self.expiry_s, timeout=0, thread_local=False
            )
        if lease.is_locked:
            return False
        try:
            lease.acquire()
        except Timeout:
            return False
        return True

    def release(self, piece: int) -> None:
        """Give up a claim, now that the piece is there."""
        self._leases.pop(piece).release()

    def release_all(self) -> None:
        """Give up every claim, so that nobody waits for its expiry, and remove those that the dead have left."""
        for piece in list(self._leases):
            self.release(piece)
        for piece in [int(file.name[1:-6]) for file in self.folder.glob(".*.claim") if file.name[1:-6].isdecimal()]:
            if self.take(piece) or self.take(piece):  # the first may only find out that it is void
                self.release(piece)


class Shares:
    """Every ``world``-th piece from the ``rank``-th on: where nothing can be claimed, as in an object store."""

    waits = False

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def take(self, piece: int) -> bool:
        return piece % self.world == self.rank

    def release(self, piece: int) -> None:
        """Nothing was claimed."""

    def release_all(self) -> None:
        """Nothing was claimed."""
