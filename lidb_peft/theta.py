"""The theta file: one safetensors tensor, ``theta`` ``(L, r*(a+b))``, and what is needed to use it again.

In float16 53 KB for Stable Diffusion 1.5. Another layer list, shape or basis is refused, because theta means nothing
there; another checkpoint of the same architecture, such as a finetune of the base, is a warning.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import LiDBConfig
from .files import write_safetensors
from .record import check_record, from_metadata, missing_fields, read_number, record_config, space_record, to_metadata
from .safe_read import iter_tensors, printable, read_header
from .space import LiDBSpace

FORMAT_VERSION = "1"


@dataclass(frozen=True)
class ThetaFile:
    """What a theta file holds: ``theta`` float32 ``(L, row_size)``, the config it belongs to, and its base model.

    ``record`` is what `check_record` compares with a space.
    """

    theta: Tensor
    config: LiDBConfig
    layers_hash: str
    base_model_name: str
    base_fingerprint: str
    record: Mapping[str, str]


def save_theta(
    path: str | os.PathLike,
    theta: Tensor,
    space: LiDBSpace,
    base_model_name: str = "",
    base_fingerprint: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write one identity's theta ``(L, row_size)``.

    Args:
        base_model_name: for people to read; never compared.
        base_fingerprint: as ``base_fingerprint`` gives it; None takes it from the space's models.
        dtype: float16 halves the file and costs a relative 5e-4 per number.

    Raises:
        ValueError: another shape, or values that are not finite, also after rounding to ``dtype``.
    """
    space.check_theta(theta)
    stored = theta.detach().to("cpu", dtype).contiguous()
    if stored.dim() != 2:
        raise ValueError(f"theta has shape {tuple(theta.shape)}; save one identity, (L, row_size), at a time")
    if not torch.isfinite(stored).all():
        raise ValueError(f"theta holds values that are not finite in {dtype}; the fit has diverged")
    record = {"format": FORMAT_VERSION, **space_record(space, base_model_name, base_fingerprint)}
    write_safetensors(path, {"theta": stored}, to_metadata(record))


def load_theta(path: str | os.PathLike, space: LiDBSpace | None = None) -> ThetaFile:
    """Read a theta file and check it, against ``space`` if there is one.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: it is damaged, no theta file, or made for other layers, shapes or bases.
    """
    path = Path(path)
    stored, record = _read(path)
    if record["format"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {printable(record['format'])}; this version of lidb-peft reads 1")
    config = record_config(record, str(path))
    num_layers = read_number(record, "num_layers", int, str(path))
    expected = (num_layers, config.r * (config.down_dim + config.up_dim))
    if tuple(stored.shape) != expected or not stored.dtype.is_floating_point:
        raise ValueError(
            f"{path} holds a {stored.dtype} theta of shape {tuple(stored.shape)} but says {expected}; it is damaged"
        )
    theta = stored.float()
    if not torch.isfinite(theta).all():
        raise ValueError(f"{path} holds values that are not finite; the fit that wrote it had diverged")
    if space is not None:
        check_record(record, space, str(path))
    return ThetaFile(
        theta, config, record["layers_hash"], record["base_model_name"], record["base_fingerprint"], record
    )


def _read(path: Path) -> tuple[Tensor, dict[str, str]]:
    """Return the tensor and the record; all its fields are there."""
    header = read_header(path)
    found = from_metadata(header.metadata)
    missing = [name for name in ("format", *missing_fields(found)) if name not in found]
    if set(header.tensors) != {"theta"} or missing:
        names = [printable(name) for name in sorted(header.tensors)[:4]]
        raise ValueError(f"{path} is not a theta file: tensors {names}, missing metadata {missing}")
    ((_, theta),) = iter_tensors(path)
    return theta, found
