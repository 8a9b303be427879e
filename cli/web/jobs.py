"""Work that takes long, in a queue: one at a time, whoever asked for it, whether or not their page is still open."""

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.web.sentences import sentence

LOG = logging.getLogger(__name__)
WAITING, RUNNING, DONE, STOPPED, FAILED = "waiting", "running", "done", "stopped", "failed"
_MOST_WAITING = 20
_MOST_KEPT = 200


class StoppedError(Exception):
    """Somebody pressed Stop."""


@dataclass
class Job:
    """Something to be done, and what became of it; the worker writes it, pages read it.

    Attributes:
        key: what a page knows it by; nobody guesses it.
        folder: where its files are.
        state: ``waiting``, ``running``, ``done``, ``stopped`` or ``failed``.
        stage, step, steps: what is being done, how much is, and of how much; 0 if nobody knows.
        losses: ``(step, loss)``.
        samples: pictures of the way, ``(file, caption)``.
        notes: sentences that people should read.
        error: why it failed, in a sentence.
        results: what else it found; see who made the job.
        was_stopped: it ended before its time, because somebody pressed Stop.
        version: grows whenever something changes.
    """

    title: str
    folder: Path
    key: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    state: str = WAITING
    stage: str = ""
    step: int = 0
    steps: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    samples: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    version: int = 0
    began: float = 0.0
    seconds: float = 0.0
    was_stopped: bool = False
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def is_over(self) -> bool:
        return self.state in (DONE, STOPPED, FAILED)

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Say how far a stage is; what the API calls its progress.

        Raises:
            StoppedError: somebody wants it to stop, which the API does not notice itself.
        """
        self.stage, self.step, self.steps = stage, done, total or 0
        self.changed()

    def check_stopped(self) -> None:
        if self.stop.is_set():
            raise StoppedError

    def changed(self) -> None:
        self.seconds = time.monotonic() - self.began if self.began else 0.0
        self.version += 1


class Jobs:
    """A queue and its one worker, which starts with the first job."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Job, Callable[[Job], None]]] = queue.Queue()
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None

    def add(self, job: Job, work: Callable[[Job], None]) -> Job:
        """Put a job at the end of the queue.

        Raises:
            ValueError: the queue is full.
        """
        with self._lock:
            if self._queue.qsize() >= _MOST_WAITING:
                raise ValueError(f"{_MOST_WAITING} fits are waiting already; try again when some of them are done")
            for key in [key for key, old in self._jobs.items() if old.is_over][: len(self._jobs) - _MOST_KEPT + 1]:
                del self._jobs[key]
            self._jobs[job.key] = job
            self._queue.put((job, work))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="hdb ui", daemon=True)
                self._worker.start()
        return job

    def find(self, key: str) -> Job | None:
        return self._jobs.get(key)

    def ahead(self, job: Job) -> int:
        """How many jobs come before a waiting one."""
        unfinished = [other.key for other in list(self._jobs.values()) if not other.is_over]
        return unfinished.index(job.key) if job.key in unfinished else 0

    def check_free(self, key: str) -> None:
        """Raise ValueError if a page's own job is not over yet."""
        job = self.find(key)
        if job is not None and not job.is_over:
            raise ValueError(f"{job.title} is {job.state} already; wait until it is done, or press Stop first")

    def _work(self) -> None:
        while True:
            job, work = self._queue.get()
            job.began = time.monotonic()
            job.state = STOPPED if job.stop.is_set() else RUNNING
            job.changed()
            if job.state == RUNNING:
                job.state, job.error = _outcome(job, work)
            job.changed()


def _outcome(job: Job, work: Callable[[Job], None]) -> tuple[str, str]:
    """Do a job; its state, and why it failed."""
    try:
        work(job)
    except StoppedError:
        return STOPPED, ""
    except Exception as error:  # whatever it is, the next one in the queue has its turn
        LOG.warning("%s failed", job.title, exc_info=error)
        return FAILED, sentence(error)
    return (STOPPED if job.was_stopped or job.stop.is_set() else DONE), ""
