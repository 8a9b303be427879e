"""Repositories of the Hugging Face hub, brought here as folders, so that they are checked as any folder is."""

from pathlib import Path

from hypernet.errors import first_sentence

HYPERNETWORK_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "model*.safetensors", "*.index.json",
    "start.safetensors",
)  # fmt: skip
"""What a hypernetwork, the start beside it, and an encoder are loaded from."""


def split_revision(source: str) -> tuple[str, str | None]:
    """Split ``owner/name@revision``, a branch, tag or commit, into both; None where there is no revision."""
    name, _, revision = source.partition("@")
    return name, revision or None


class HubError(FileNotFoundError):
    """A repository cannot be had; the message says why and what to do, to end a sentence with."""


def hub_folder(source: str, patterns: tuple[str, ...]) -> Path:
    """Return the folder of a repository, downloaded where it is not in the cache.

    Args:
        source: its id, with ``@`` and a revision where it is not to follow ``main``.
        patterns: of the names of the files that are wanted.

    Raises:
        HubError: it cannot be had, or ``source`` is no id.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import validate_repo_id

    name, revision = split_revision(source)
    try:
        validate_repo_id(name)
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except _hub_errors() as error:
        raise HubError(_reason(source, error)) from error


def local_or_hub_folder(source: str | Path, what: str, patterns: tuple[str, ...], otherwise: str = "") -> Path:
    """Return a folder as it is, and of an id `hub_folder`.

    Args:
        what: what it holds, for messages, such as "the encoder".
        otherwise: what else can be done if it cannot be had, such as "or pass --dino none".

    Raises:
        NotADirectoryError: it is a file.
        HubError: it is neither a folder nor can it be downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise NotADirectoryError(f"{source} is a file; name the folder of {what}")
    try:
        return hub_folder(str(source), patterns)
    except HubError as error:
        raise HubError(
            f"{what} {str(source)!r} is not a folder here and could not be downloaded from the Hugging Face hub: "
            f"{error}{otherwise and ', '}{otherwise}"
        ) from error


def repository_files(name: str, revision: str) -> list[str]:
    """The paths of a repository's files.

    Raises:
        HubError: the hub does not give them, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        # list_repo_files would try for half a minute where there is no connection.
        siblings = HfApi().model_info(name, revision=revision).siblings
    except _hub_errors() as error:
        raise HubError(_reason(f"{name}@{revision}", error)) from error
    return [file.rfilename for file in siblings or []]


def _hub_errors() -> tuple[type[Exception], ...]:
    """Its library's, and those of the HTTP library below, which is requests, httpx or httpx2 by version."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    bases = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    return OSError, HFValidationError, *bases


def _reason(source: str, error: Exception) -> str:
    """Why a repository cannot be had and what to do, by what the hub's library raised."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # it is not in the cache either
    name, revision = split_revision(source)
    if isinstance(error, HFValidationError):
        return "it is no id of a repository (owner/name) either; check the path"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return "HF_HUB_OFFLINE is set, so only the cache was searched; unset it to download, or check the path"
    if isinstance(error, GatedRepoError):
        return f"its terms have to be accepted; do so on https://huggingface.co/{name}, and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or it is private; check the name, or log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision or 'main'}; check what follows the @"
    if isinstance(error, HfHubHTTPError):
        return _status_reason(error.response.status_code, error)
    if isinstance(error, OSError) and error.errno:  # of this machine, such as a full disk
        return f"{first_sentence(error)}; mend that and try again"
    return f"the hub cannot be reached ({first_sentence(error)}); check the connection and the proxy, and try again"


def _status_reason(status: int, error: Exception) -> str:
    if status == 401:
        return "the hub refuses the access token, which may have expired; unset HF_TOKEN and run `hf auth login`"
    if status == 403:
        return "the access token may not read it; make one on https://huggingface.co/settings/tokens that may"
    if status == 429:
        return "the hub has had too many requests from here; wait some minutes, or log in with `hf auth login`"
    if status >= 500:
        return f"the hub itself fails now (status {status}); try again later"
    return f"the hub says: {first_sentence(error)}; check the name"
