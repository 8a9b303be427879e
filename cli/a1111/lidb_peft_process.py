"""``hdb`` as a process of its own Python, from a webui that has other packages. Imports neither of them."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# What would lead a Python of another environment to the webui's packages.
_OF_THE_WEBUI = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")
_MISSING = "run hdb a1111 install with this webui's folder again, in the Python where lidb-peft is installed"
_NO_FILE_NAME = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')


class Hdb:
    """One run at a time."""

    def __init__(self, python: "str | None" = None) -> None:
        self.python = hdb_python() if python is None else python
        self._process: subprocess.Popen[str] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def run(self, arguments: Sequence[str]) -> Iterator[str]:
        """Yield what hdb prints, line by line.

        Raises:
            ValueError: it runs already, cannot be started, or fails; the last line that it printed says why.
        """
        if self.is_running:
            raise ValueError("a LoRA is being made already; wait until it is done, or press Stop")
        environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_WEBUI}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}
        try:
            self._process = subprocess.Popen(
                [self.python, "-m", "lidb_peft", *arguments], env=environment, text=True, encoding="utf-8",
                errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                cwd=str(_HERE),
            )  # fmt: skip
        except OSError as error:
            raise ValueError(f"hdb cannot be started with {self.python} ({error.strerror}); {_MISSING}") from error
        process, last = self._process, ""
        for line in process.stdout:
            last = line.strip() or last
            yield line.rstrip()
        code = process.wait()
        if code:
            raise ValueError(last.removeprefix("Error: ") or f"hdb ended with the code {code}")

    def stop(self) -> None:
        """Ask it to end: hdb takes this signal as Ctrl-C, also where the webui, in the background, ignores Ctrl-C."""
        if self.is_running:
            self._process.terminate()


def hdb_python() -> str:
    """The Python that the installation noted, else this one."""
    noted = _HERE / "python.txt"
    return noted.read_text(encoding="utf-8").strip() if noted.is_file() else sys.executable


def why_hdb_cannot_run() -> str:
    """A sentence; "" if there is a Python that has lidb-peft."""
    python = hdb_python()
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lidb_peft') is None)"
    environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_WEBUI}
    try:
        found = subprocess.run([python, "-c", code], env=environment, cwd=str(_HERE), capture_output=True).returncode
    except OSError:
        found = 1
    return f"{python} has no lidb-peft; {_MISSING}" if found else ""


def file_name(text: str) -> str:
    """``text`` as a name that every file system and the webui's prompts can hold."""
    return _NO_FILE_NAME.sub("-", text or "").strip(". ") or "me"
