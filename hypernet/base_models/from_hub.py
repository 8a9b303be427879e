"""A base model of the Hugging Face hub as a folder: what is needed of it and nothing else, checked as any folder is."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hypernet.base_models.folders import choose_weights, parts_of, pipeline_family
from hypernet.hub import HubError, hub_folder, repository_files, split_revision
from lidb_peft.families import Family
from lidb_peft.safe_read import read_json_object

INDEX = "model_index.json"
_SETTINGS = (".json", ".txt", ".model")  # of configs, indices of shards and tokenizers


def download_base(source: str, check: Callable[[Family], None]) -> tuple[Path, str]:
    """Bring a base model here, or find it in the cache.

    Args:
        source: its id, with ``@`` and a revision where it is not to follow ``main``.
        check: called with a family that is loaded alike before gigabytes are downloaded; it may raise ValueError.

    Returns:
        The folder, in diffusers' layout, and why the hub could not be asked for what it may lack; "" if it could.

    Raises:
        FileNotFoundError: it cannot be had.
        ValueError: it is no base model of a known family, or has no weights in safetensors.
    """
    name, _ = split_revision(source)
    try:
        folder = hub_folder(source, (INDEX,))
        files, why_not = _files_of(name, folder.name)  # of the same commit, whatever is pushed meanwhile
        if not (folder / INDEX).is_file():
            raise HubError(why_not) if why_not else ValueError(_no_index(source, files))
        family = pipeline_family(source, read_json_object(folder / INDEX, "get it again"))
        check(family)
        if why_not:
            return folder, why_not
        return hub_folder(f"{name}@{folder.name}", tuple(_needed(source, family, files))), ""
    except HubError as error:
        raise FileNotFoundError(unavailable(source, str(error))) from error


def unavailable(source: str, reason: str) -> str:
    """The message for a base that is not local and cannot be downloaded, for a reason that says what to do."""
    return (
        f"the base model {source!r} is not a local folder or file and could not be downloaded from the Hugging Face "
        f"hub: {reason}, or pass --base with a diffusers folder or a .safetensors checkpoint that you have, or --base "
        f"testbed for the miniature that ships with this package"
    )


def _files_of(name: str, revision: str) -> tuple[list[str], str]:
    """A repository's files, or none and why the hub does not give them."""
    try:
        return repository_files(name, revision), ""
    except HubError as error:
        return [], str(error)


def _needed(source: str, family: Family, files: Sequence[str]) -> list[str]:
    """Of a repository's files those that the pipeline is loaded from; raises as `choose_weights`."""
    weighted, *others = parts_of(family)
    in_parts = {part: [name for name in files if name.rpartition("/")[0] == part] for part in weighted}
    _, weights = choose_weights(source, in_parts)
    parts = {*weighted, *(part for group in others for part in group)}
    settings = [name for name in files if name.rpartition("/")[0] in parts and name.endswith(_SETTINGS)]
    return [INDEX, *settings, *weights]


def _no_index(source: str, files: Sequence[str]) -> str:
    single = [name for name in sorted(files) if "/" not in name and name.endswith(".safetensors")]
    hint = f"; download {single[0]} from it and pass the file" if single else "; pass another base model"
    return f"{source} on the Hugging Face hub is not in diffusers' layout: it has no {INDEX}{hint}"
