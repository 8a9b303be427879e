"""A folder at a URL that `fsspec` opens, such as ``s3://bucket/targets``, and its copy on this machine.

Files are read from the copy and written there first. They reach the URL under a temporary name and are renamed, so that
there too each is whole or not there. No process can claim or lock anything at a URL.
"""

import hashlib
import json
import re
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock

from hypernet.errors import first_sentence
from lidb_peft.files import atomic_path

_KEYS = ".fetched.json"  # of each file of the copy, which version it is of


def is_url(folder: str | Path) -> bool:
    """Whether a folder is somewhere else, and not on a disk of this machine."""
    return "://" in str(folder)


class Mirror:
    """The folder at a URL.

    Attributes:
        folder: the copy, in the Hugging Face cache (``HF_ASSETS_CACHE``).
        lock: held by the one process of this machine that changes the copy; the system releases it when that ends.
    """

    def __init__(self, url: str, files: re.Pattern[str]) -> None:
        """Find the folder at ``url``, which need not be there yet.

        Args:
            files: the names of those that are copied.

        Raises:
            ValueError: nothing opens such URLs, or its package is not installed.
        """
        import fsspec
        from huggingface_hub import constants

        try:
            self.fs, self.path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url} cannot be opened: {first_sentence(error)}") from error
        self.url, self.files = url, files
        name = hashlib.sha256(url.encode()).hexdigest()[:32]
        self.folder = Path(constants.HF_ASSETS_CACHE) / "lidb-peft" / "mirrors" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock")

    def fetch(self) -> None:
        """Bring the copy up to date: files that are new or changed at the URL come, those that are gone go.

        Raises:
            OSError: the URL cannot be read.
        """
        with self.lock:
            there = self._listed()
            keys = self._keys()
            for file in self.folder.iterdir():
                if not file.name.startswith(".") and file.name not in there:
                    file.unlink(missing_ok=True)
            for name, key in there.items():
                if keys.get(name) != key or not (self.folder / name).exists():
                    with atomic_path(self.folder / name) as temporary:
                        self.fs.get_file(f"{self.path}/{name}", str(temporary))
            self._note(there)

    def send(self, file: Path) -> None:
        """Bring a file of the copy to the URL, whole or not at all; ``lock`` is to be held since before it was written.

        Raises:
            OSError: the URL cannot be written.
        """
        target, temporary = f"{self.path}/{file.name}", f"{self.path}/.{file.name}.{uuid.uuid4().hex}"
        self.fs.makedirs(self.path, exist_ok=True)
        try:
            self.fs.put_file(str(file), temporary)
            self.fs.mv(temporary, target)
        except BaseException:
            if self.fs.exists(temporary):
                self.fs.rm_file(temporary)
            raise
        self.fs.invalidate_cache(self.path)
        self._note(self._keys() | {file.name: str(self.fs.ukey(target))})

    def _listed(self) -> dict[str, str]:
        """The files at the URL, and which version of each is there."""
        self.fs.invalidate_cache(self.path)
        if not self.fs.exists(self.path):
            return {}
        entries = (entry for entry in self.fs.ls(self.path, detail=True) if entry["type"] == "file")
        names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in entries)
        return {name: str(self.fs.ukey(f"{self.path}/{name}")) for name in names if self.files.fullmatch(name)}

    def _keys(self) -> dict[str, Any]:
        path = self.folder / _KEYS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _note(self, keys: dict[str, Any]) -> None:
        with atomic_path(self.folder / _KEYS) as temporary:
            temporary.write_text(json.dumps(keys), encoding="utf-8")
