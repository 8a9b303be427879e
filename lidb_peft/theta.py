"""The theta file: one safetensors tensor, ``theta`` ``(L, r*(a+b))``, and what is needed to use it again.

In float16 53 KB for Stable Diffusion 1.5. Another layer list, shape or basis is refused, because theta means nothing
there; another checkpoint of the same architecture, such as a finetune of the base, is a warning.
"""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .bases import BASIS_VERSION, BasisKey, basis_fingerprint, basis_probes, check_basis, get_basis
from .config import LiDBConfig
from .files import atomic_path, to_bytes
from .naming import clean_module_name, natural_key
from .space import LiDBSpace

FORMAT_VERSION = "1"
_PREFIX = "lidb."
_CONFIG_FIELDS = {"r": int, "down_dim": int, "up_dim": int, "scale": float, "seed": int, "basis": str}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ThetaFile:
    """What a theta file holds: ``theta`` float32 ``(L, row_size)``, the config it belongs to, and its base model."""

    theta: Tensor
    config: LiDBConfig
    layers_hash: str
    base_model_name: str
    base_fingerprint: str


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
    stored = theta.detach().to(_CPU, dtype).contiguous()
    if stored.dim() != 2:
        raise ValueError(f"theta has shape {tuple(theta.shape)}; save one identity, (L, row_size), at a time")
    if not torch.isfinite(stored).all():
        raise ValueError(f"theta holds values that are not finite in {dtype}; the fit has diverged")
    config = {name: getattr(space.config, name) for name in _CONFIG_FIELDS}
    metadata = {
        "format": FORMAT_VERSION,
        "basis_version": BASIS_VERSION,
        "base_model_name": base_model_name,
        "base_fingerprint": _fingerprint(space) if base_fingerprint is None else base_fingerprint,
        "layers_hash": space.layers_hash,
        "num_layers": space.num_layers,
        "bases": json.dumps(_basis_records(space)),
        **config,
    }
    # To bytes first: save_file would report a full disk as a SafetensorError.
    blob = to_bytes({"theta": stored}, {_PREFIX + key: str(value) for key, value in metadata.items()})
    with atomic_path(path) as temporary:
        temporary.write_bytes(blob)


def load_theta(path: str | os.PathLike, space: LiDBSpace | None = None) -> ThetaFile:
    """Read a theta file and check it, against ``space`` if there is one.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: it is damaged, no theta file, or made for other layers, shapes or bases.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a theta file")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a theta file")
    stored, metadata = _read(path)
    if metadata["format"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {metadata['format']}; this version of lidb-peft reads 1")
    config = _parse_config(path, metadata)
    num_layers = _number(path, metadata, "num_layers", int)
    expected = (num_layers, config.r * (config.down_dim + config.up_dim))
    if tuple(stored.shape) != expected or not stored.dtype.is_floating_point:
        raise ValueError(
            f"{path} holds a {stored.dtype} theta of shape {tuple(stored.shape)} but says {expected}; it is damaged"
        )
    theta = stored.float()
    if not torch.isfinite(theta).all():
        raise ValueError(f"{path} holds values that are not finite; the fit that wrote it had diverged")
    if space is not None:
        _check_space(path, config, metadata, space)
    return ThetaFile(theta, config, metadata["layers_hash"], metadata["base_model_name"], metadata["base_fingerprint"])


def _read(path: Path) -> tuple[Tensor, dict[str, str]]:
    """Return the tensor and the metadata without the prefix; all keys are there."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found = {k.removeprefix(_PREFIX): v for k, v in (file.metadata() or {}).items() if k.startswith(_PREFIX)}
            stored = file.get_tensor("theta") if "theta" in names else None
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); get it again") from error
    needed = ["format", "basis_version", "base_model_name", "base_fingerprint", "layers_hash", "num_layers", "bases"]
    missing = [key for key in [*needed, *_CONFIG_FIELDS] if key not in found]
    if stored is None or len(names) != 1 or missing:
        raise ValueError(f"{path} is not a theta file: tensors {sorted(names)[:4]}, missing metadata {missing}")
    return stored, found


def _number(path: Path, metadata: dict[str, str], key: str, kind: type) -> int | float | str:
    try:
        return kind(metadata[key])
    except ValueError as error:
        raise ValueError(f"{path} says {key} is {metadata[key]!r}, which is not a number; it is damaged") from error


def _parse_config(path: Path, metadata: dict[str, str]) -> LiDBConfig:
    values = {key: _number(path, metadata, key, kind) for key, kind in _CONFIG_FIELDS.items()}
    try:
        return LiDBConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path} describes no LiDB this version knows: {error}") from error


def _distinct_keys(space: LiDBSpace) -> list[BasisKey]:
    return sorted({key for index in range(space.num_layers) for key in space.basis_keys(index)})


def _basis_records(space: LiDBSpace) -> dict[str, list]:
    """Return, per distinct basis, the fingerprint of its integers and a few of its values."""
    return {
        key.label: [basis_fingerprint(key), *[round(v, 9) for v in basis_probes(get_basis(key, _CPU)).tolist()]]
        for key in _distinct_keys(space)
    }


def _check_space(path: Path, config: LiDBConfig, metadata: dict[str, str], space: LiDBSpace) -> None:
    differences = [
        f"{name} {getattr(config, name)} (here {getattr(space.config, name)})"
        for name in _CONFIG_FIELDS
        if getattr(config, name) != getattr(space.config, name)
    ]
    if differences:
        raise ValueError(f"{path} was made with {', '.join(differences)}; use its own settings")
    if metadata["layers_hash"] != space.layers_hash:
        raise ValueError(
            f"{path} belongs to another list of {metadata['num_layers']} layers (hash {metadata['layers_hash']}) than "
            f"this model's {space.num_layers} (hash {space.layers_hash}); use the architecture it was made for"
        )
    _check_bases(path, metadata, space)
    fingerprint = _fingerprint(space)
    if metadata["base_fingerprint"] and fingerprint and not same_base(metadata["base_fingerprint"], fingerprint):
        name = metadata["base_model_name"] or "another base model"
        warnings.warn(
            f"{path} was made on {name}, whose weights differ from this model's; expect a weaker likeness", stacklevel=3
        )


def _check_bases(path: Path, metadata: dict[str, str], space: LiDBSpace) -> None:
    try:
        records = json.loads(metadata["bases"])
        parsed = {
            label: (str(record[0]), torch.tensor([float(v) for v in record[1:]])) for label, record in records.items()
        }
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"{path} has no readable record of its bases ({error}); it is damaged") from error
    for key in _distinct_keys(space):
        if key.label not in parsed:
            raise ValueError(f"{path} has no record of the {key.label} basis; it is damaged")
        check_basis(key, *parsed[key.label], source=str(path))


def base_fingerprint(models: dict[str, nn.Module]) -> str:
    """Return a few of the base models' weights as text; "" if they are on the meta device.

    Weights and not a hash, so that one checkpoint loaded in float32, float16 and bfloat16 is recognised as the same.
    """
    probes: dict[str, list[float]] = {}
    for component, model in models.items():
        parameters = {
            clean_module_name(name): parameter
            for name, parameter in model.named_parameters()
            if parameter.dim() >= 2 and parameter.is_floating_point() and "lora_" not in name and "lidb_" not in name
        }
        names = sorted(parameters, key=natural_key)
        chosen = [parameters[name] for name in names[:: max(1, len(names) // 16)]]
        if any(parameter.is_meta for parameter in chosen):
            return ""
        values = torch.stack([p.detach().reshape(-1)[p.numel() // 3].float().cpu() for p in chosen])
        probes[component] = [float(f"{value:.5g}") for value in values.tolist()]
    return json.dumps(probes)


def _fingerprint(space: LiDBSpace) -> str:
    return base_fingerprint(space.models)


def same_base(first: str, second: str) -> bool:
    """Tell whether two results of ``base_fingerprint`` agree within the rounding of half precision."""
    if first == second:
        return True
    try:
        ours, theirs = ({name: torch.tensor(v) for name, v in json.loads(text).items()} for text in (first, second))
    except (ValueError, TypeError, AttributeError, RuntimeError):  # not what base_fingerprint writes
        return False
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape and torch.allclose(ours[name], theirs[name], rtol=0.006, atol=1e-7)
        for name in ours
    )
