"""What only we write and read again: tensors and plain values in a safetensors file, with a checksum over all of it.

Nothing is unpickled, and a bit that has flipped since is an error.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .files import safetensors_chunks, write_safetensors
from .safe_read import printable, read_tensors

_CHECKSUM = "sha256"
_TREE = "tree"


def write_sealed(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and text whole or not at all, with their checksum."""
    write_safetensors(path, tensors, {**metadata, _CHECKSUM: _checksum(tensors, metadata)})


def read_sealed(path: str | os.PathLike, is_required: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what ``write_sealed`` has written.

    Args:
        is_required: a file without a checksum, of before there was one, is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; the message names it.
    """
    tensors, metadata = read_tensors(path)
    metadata = dict(metadata)
    checksum = metadata.pop(_CHECKSUM, None)
    if checksum is None and is_required:
        raise ValueError(f"{path} is damaged: it has no checksum")
    if checksum is not None and checksum != _checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged: its bytes are not those of its checksum")
    return tensors, metadata


def write_tree(path: str | os.PathLike, tree: Mapping[str, object]) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, text, True, False and None, with their checksum.

    Raises:
        TypeError: there is something else in it.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_flatten(tree, tensors))
    write_sealed(path, tensors, {_TREE: text})


def read_tree(path: str | os.PathLike) -> dict[str, Any]:
    """Return what ``write_tree`` has written; tuples have become lists.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or something else; the message names it.
    """
    tensors, metadata = read_sealed(path)
    try:
        tree = _restore(json.loads(metadata[_TREE]), tensors)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: what it holds is no tree ({printable(str(error))})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is damaged: what it holds is no tree")
    return tree


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for chunk in safetensors_chunks(tensors, metadata):
        digest.update(chunk)
    return digest.hexdigest()


def _flatten(value: object, tensors: dict[str, Tensor]) -> object:
    """Return JSON of ``value``, whose tensors go into ``tensors`` under numbers."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):  # the keys of an optimizer's state are numbers
        return {"dict": [[key, _flatten(own, tensors)] for key, own in value.items()]}
    if isinstance(value, list | tuple):
        return [_flatten(own, tensors) for own in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be written; only tensors and plain values can")


def _restore(value: object, tensors: Mapping[str, Tensor]) -> object:
    if isinstance(value, list):
        return [_restore(own, tensors) for own in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind != "dict":
        raise ValueError(f"{printable(repr(kind))} is not known")
    return {key: _restore(own, tensors) for key, own in content}


def same_kind(ours: object, theirs: object) -> bool:
    """Tell whether two trees have the same keys and lengths, tensors of one shape, and numbers where numbers are."""
    if isinstance(ours, Tensor):
        return isinstance(theirs, Tensor) and ours.shape == theirs.shape
    if isinstance(ours, Mapping):
        return (
            isinstance(theirs, Mapping)
            and ours.keys() == theirs.keys()
            and all(same_kind(own, theirs[key]) for key, own in ours.items())
        )
    if isinstance(ours, list | tuple):
        return isinstance(theirs, list | tuple) and len(ours) == len(theirs) and all(map(same_kind, ours, theirs))
    if isinstance(ours, int | float) and not isinstance(ours, bool):
        return isinstance(theirs, int | float) and not isinstance(theirs, bool)
    return type(ours) is type(theirs)
