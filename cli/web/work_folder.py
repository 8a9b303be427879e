"""The folder that the page works in: the only one whose files it serves."""

import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from lidb_peft.files import atomic_path
from lidb_peft.outputs import NO_FILE_NAME, check_output

_LONGEST_NAME = 100
# Where programs look for LoRAs, below their own folder.
LORA_FOLDERS = {"Automatic1111, Forge": Path("models/Lora"), "ComfyUI": Path("models/loras")}


class WorkFolder:
    """``uploads`` holds what browsers sent, ``runs`` what was made, each in a folder that nobody guesses."""

    def __init__(self, path: str | Path) -> None:
        """Make the folder where it is not there.

        Raises:
            OSError: it cannot be made.
        """
        self.path = Path(path).resolve()
        for name in ("uploads", "runs"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    @property
    def uploads(self) -> Path:
        return self.path / "uploads"

    def new_run(self, name: str) -> Path:
        """A new folder for what is made."""
        when = time.strftime("%Y%m%d-%H%M%S")
        folder = self.path / "runs" / f"{when}-{file_name(name)}-{secrets.token_hex(8)}"
        folder.mkdir()
        return folder


def file_name(text: str, default: str = "me") -> str:
    """``text`` as a name that every file system and A1111 can hold."""
    return NO_FILE_NAME.sub("-", text).strip(". ")[:_LONGEST_NAME].strip(". ") or default


def find_lora_folder(program: str | Path) -> Path:
    """Where a program has its LoRAs: in its own folder, or ``program`` is that very folder.

    Raises:
        ValueError: neither.
    """
    path = Path(program).expanduser()
    for folder in LORA_FOLDERS.values():
        if (path / folder).is_dir():
            return path / folder
        if path.is_dir() and path.parts[-2:] == folder.parts:
            return path
    below = " or ".join(str(folder) for folder in LORA_FOLDERS.values())
    raise ValueError(f"{path} is not a folder of Automatic1111, Forge or ComfyUI: it has no {below}; name theirs")


def copy_lora(lora: Path, folder: Path, name: str) -> list[Path]:
    """Copy a LoRA, its sidecar and its preview picture, whole or not at all, and over nothing.

    Raises:
        OSError: something is there already, or cannot be written.
    """
    pairs = [(lora.with_suffix(suffix), folder / f"{name}{suffix}") for suffix in (".safetensors", ".json", ".png")]
    pairs = [(source, target) for source, target in pairs if source.exists()]
    for source, target in pairs:
        check_output(target, [source], target.suffix)
    for source, target in pairs:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    return [target for _, target in pairs]


def companions(lora: Path) -> list[str]:
    """A LoRA with what lies beside it, as files to download."""
    files = [lora.with_suffix(suffix) for suffix in (".safetensors", ".json", ".png")]
    return [str(file) for file in files if file.exists()]


def lines(text: str) -> Sequence[str]:
    """The lines of a text field that say something."""
    return [line.strip() for line in text.splitlines() if line.strip()]
