"""Repositories of the Hugging Face hub, brought here as folders, so that they are checked as any folder is."""

from pathlib import Path

HYPERNETWORK_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "model*.safetensors", "*.index.json",
    "start.safetensors",
)  # fmt: skip
"""What a hypernetwork, the start beside it, and an encoder are loaded from."""


def split_revision(source: str) -> tuple[str, str | None]:
    """Split ``owner/name@revision``, a branch, tag or commit, into both; None where there is no revision."""
    name, _, revision = source.partition("@")
    return name, revision or None


def hub_folder(source: str, patterns: tuple[str, ...]) -> Path:
    """Return the folder of a repository, downloaded where it is not in the cache.

    Args:
        source: its id, with ``@`` and a revision where it is not to follow ``main``.
        patterns: of the names of the files that are wanted.

    Raises:
        OSError: it cannot be had.
        HFValidationError: ``source`` is no id.
    """
    from huggingface_hub import snapshot_download

    name, revision = split_revision(source)
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def repository_files(name: str, revision: str) -> list[str] | None:
    """The paths of a repository's files; None if the hub cannot be reached, so that the cache is all there is.

    Raises:
        HfHubHTTPError: the hub does not give them.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().list_repo_files(name, revision=revision)
    except HfHubHTTPError:
        raise
    except Exception:  # no network, in the words of requests or httpx; or told to stay offline
        return None
