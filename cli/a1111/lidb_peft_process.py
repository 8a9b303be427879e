"""``hdb`` as a process of its own Python, from a webui that has other packages. Imports neither of them."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_POLL_S = 0.2
_OF_THE_WEBUI = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")
_MISSING = "run hdb a1111 install with this webui's folder again, in the Python where lidb-peft is installed"
_NO_FILE_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')


class Hdb:
    """One run at a time."""

    def __init__(self, python: "str | None" = None) -> None:
        self.python = hdb_python() if python is None else python
        self._lock = threading.Lock()
        self._run: Run | None = None

    @property
    def is_running(self) -> bool:
        return self._run is not None and self._run.is_alive()

    def start(self, arguments: Sequence[str], surroundings: "AbstractContextManager | None" = None) -> "Run":
        """Start hdb; raises ValueError if it runs already.

        Args:
            surroundings: entered before the process starts, which may take a while, and left after it.
        """
        with self._lock:
            if self.is_running:
                raise ValueError("a LoRA is being made already; wait until it is done, or press Stop")
            self._run = Run([self.python, "-m", "lidb_peft", *arguments], surroundings or nullcontext())
            self._run.start()
            return self._run

    def stop(self) -> None:
        if self._run is not None:
            self._run.stop()


class Run(threading.Thread):
    """A process of hdb, and the lines that it has printed. It goes on when nobody watches: a page may be closed."""

    def __init__(self, command: Sequence[str], surroundings: AbstractContextManager) -> None:
        super().__init__(daemon=True)
        self.lines: list[str] = []
        self._command, self._surroundings = command, surroundings
        self._problem, self._is_cancelled = "", False
        self._process: subprocess.Popen[str] | None = None
        self._starting = threading.Lock()  # so that no process starts after it was stopped

    def run(self) -> None:
        try:
            with self._surroundings:
                self._follow_process()
        except Exception as error:  # of the webui, when it moves its model: whoever watches is told
            self._problem = str(error) or type(error).__name__

    def watch(self) -> "Iterator[list[str]]":
        """Yield the lines so far whenever there are more.

        Raises:
            ValueError: it could not be started, was stopped, or failed; the last line that it printed says why.
        """
        shown = 0
        while self.is_alive():
            self.join(_POLL_S)
            if len(self.lines) > shown:
                shown = len(self.lines)
                yield self.lines[:shown]
        if self._problem:
            raise ValueError(self._problem)

    def stop(self) -> None:
        """Ask it to end: hdb takes this signal as Ctrl-C, also where the webui, in the background, ignores Ctrl-C."""
        with self._starting:
            self._is_cancelled = True
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()

    def _follow_process(self) -> None:
        with self._starting:
            if self._is_cancelled:
                raise ValueError("stopped before it started; nothing was made")
            self._process = self._start_process()
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
        code = self._process.wait()
        if code:
            last = next((line.strip() for line in reversed(self.lines) if line.strip()), "")
            raise ValueError(last.removeprefix("Error: ") or f"hdb ended with the code {code}")

    def _start_process(self) -> "subprocess.Popen[str]":
        try:
            return subprocess.Popen(
                self._command, env=_environment(), text=True, encoding="utf-8", errors="replace",
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=str(_HERE),
            )  # fmt: skip
        except OSError as error:
            python = self._command[0]
            raise ValueError(f"hdb cannot be started with {python} ({error.strerror}); {_MISSING}") from error


def _environment() -> "dict[str, str]":
    """The webui's, without what would lead a Python of another environment to the webui's packages."""
    kept = {name: value for name, value in os.environ.items() if name not in _OF_THE_WEBUI}
    return {**kept, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}


def hdb_python() -> str:
    """The Python that the installation noted, else this one."""
    noted = _HERE / "python.txt"
    return noted.read_text(encoding="utf-8").strip() if noted.is_file() else sys.executable


def why_hdb_cannot_run() -> str:
    """A sentence; "" if there is a Python that has lidb-peft."""
    python = hdb_python()
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lidb_peft') is None)"
    try:
        found = subprocess.run([python, "-c", code], env=_environment(), cwd=str(_HERE), capture_output=True).returncode
    except OSError:
        found = 1
    return f"{python} has no lidb-peft; {_MISSING}" if found else ""


def file_name(text: str) -> str:
    """``text`` as a name that every file system and the webui's prompts can hold."""
    return _NO_FILE_NAME.sub("-", text or "").strip(". ") or "me"
