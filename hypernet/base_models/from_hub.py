"""A base model of the Hugging Face hub as a folder: what is needed of it and nothing else, checked as any folder is."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hypernet.base_models.folders import choose_weights, parts_of, pipeline_family
from hypernet.errors import first_sentence
from hypernet.hub import hub_folder, repository_files, split_revision
from lidb_peft.families import Family
from lidb_peft.safe_read import read_json_object

INDEX = "model_index.json"
_SETTINGS = (".json", ".txt", ".model")  # of configs, indices of shards and tokenizers


def download_base(source: str, check: Callable[[Family], None]) -> tuple[Path, bool]:
    """Bring a base model here, or find it in the cache.

    Args:
        source: its id, with ``@`` and a revision where it is not to follow ``main``.
        check: called with a family that is loaded alike before gigabytes are downloaded; it may raise ValueError.

    Returns:
        The folder, in diffusers' layout, and whether the hub was reached: what was not, may lack files.

    Raises:
        FileNotFoundError: it cannot be had.
        ValueError: it is no base model of a known family, or has no weights in safetensors.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name, _ = split_revision(source)
    try:
        validate_repo_id(name)
        folder = hub_folder(source, (INDEX,))
        files = repository_files(name, folder.name)  # of the same commit, whatever is pushed meanwhile
        if not (folder / INDEX).is_file() and files is not None:
            raise ValueError(_no_index(source, files))
        family = pipeline_family(source, read_json_object(folder / INDEX, "get it again"))
        check(family)
        if files is None:
            return folder, False
        return hub_folder(f"{name}@{folder.name}", tuple(_needed(source, family, files))), True
    except (HFValidationError, OSError) as error:
        is_telling = isinstance(error, HfHubHTTPError) or getattr(error, "errno", None)  # gated, disk full
        raise FileNotFoundError(unavailable(source, first_sentence(error) if is_telling else "")) from error


def unavailable(source: str, reason: str = "") -> str:
    """The message for a base that is not local and cannot be downloaded."""
    return (
        f"the base model {source!r} is not a local folder or file and could not be downloaded from the Hugging Face "
        f"hub; connect to the internet and try again, or pass --base with a diffusers folder or a .safetensors "
        f"checkpoint that you have, or pass --base testbed for the miniature that ships with this package"
        + (f" ({reason})" if reason else "")
    )


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
