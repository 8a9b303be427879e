"""What a theta belongs to, as text: settings, bases, layers and base model.

Every file that holds thetas, or what predicts them, carries such a record. Another layer list, shape or basis is
refused, because theta means nothing there; another checkpoint of the same architecture, such as a finetune of the base,
is a warning.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .bases import BASIS_VERSION, basis_fingerprint, basis_probes, check_basis, get_basis
from .config import LiDBConfig
from .layout import distinct_basis_keys
from .naming import clean_module_name, natural_key
from .patterns import PATTERN_FIELDS, check_patterns
from .safe_read import printable
from .space import LiDBSpace

_SETTINGS = {"r": int, "down_dim": int, "up_dim": int, "scale": float, "seed": int, "basis": str}
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_OTHERS = ("basis_version", "base_model_name", "base_fingerprint", "layers_hash", "num_layers", "bases")
_PREFIX = "lidb."
_CPU = torch.device("cpu")
MALFORMED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)
"""What a field raises that is no JSON, or JSON of another shape; nested too deeply it is a RecursionError."""


def space_record(space: LiDBSpace, base_model_name: str = "", base_fingerprint: str | None = None) -> dict[str, str]:
    """Return what defines the thetas of ``space``, ready for a file's metadata or a JSON object.

    Args:
        base_model_name: for people to read; never compared.
        base_fingerprint: as ``base_fingerprint`` gives it; None takes it from the space's models.
    """
    chosen = {name: getattr(space.config, name) for name in _TARGETS if getattr(space.config, name) is not None}
    return {
        "basis_version": str(BASIS_VERSION),
        "base_model_name": base_model_name,
        "base_fingerprint": _fingerprint(space) if base_fingerprint is None else base_fingerprint,
        "layers_hash": space.layers_hash,
        "num_layers": str(space.num_layers),
        "bases": json.dumps(_basis_records(space)),
        **({"targets": json.dumps(chosen, default=sorted)} if chosen else {}),
        **{name: str(getattr(space.config, name)) for name in _SETTINGS},
    }


def to_metadata(record: Mapping[str, str]) -> dict[str, str]:
    """Return a record under the names that its fields have among a safetensors file's other metadata."""
    return {_PREFIX + name: value for name, value in record.items()}


def from_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the record in a file's metadata; {} where there is none."""
    return {name.removeprefix(_PREFIX): value for name, value in metadata.items() if name.startswith(_PREFIX)}


def missing_fields(record: Mapping[str, str]) -> list[str]:
    """Return the fields that every record has and this one lacks."""
    return [name for name in (*_OTHERS, *_SETTINGS) if name not in record]


def record_config(record: Mapping[str, str], source: str) -> LiDBConfig:
    """Return the config that a record describes.

    Raises:
        ValueError: it lacks a field or describes no LiDB; the message begins with ``source``.
    """
    missing = missing_fields(record)
    if missing:
        raise ValueError(f"{source} does not say what its theta belongs to: it lacks {missing}; it is damaged")
    values: dict[str, Any] = {name: read_number(record, name, kind, source) for name, kind in _SETTINGS.items()}
    try:
        targets = json.loads(record.get("targets", "{}"))
        for name in _TARGETS:
            if name != "layers_to_transform" and name in targets:
                check_patterns(targets[name], f"its {name}")
        return LiDBConfig(**values, **{name: targets[name] for name in _TARGETS if name in targets})
    except MALFORMED as error:
        raise ValueError(f"{source} describes no LiDB this version knows: {printable(str(error))}") from error


def read_peft_config(settings: Mapping[str, Any], source: str) -> LiDBConfig:
    """Return the config that is in an ``adapter_config.json`` of PEFT's.

    Raises:
        ValueError: it describes no LiDB, or names layers by patterns that can take forever; the message begins with
            ``source``.
    """
    try:
        config = LiDBConfig.from_peft_type(**settings)
        for name in PATTERN_FIELDS:
            check_patterns(getattr(config, name), f"its {name}")
    except MALFORMED as error:
        raise ValueError(f"{source} describes no LiDB this version knows: {printable(str(error), 300)}") from error
    return config


def read_number(record: Mapping[str, str], name: str, kind: type, source: str) -> int | float | str:
    """Return a field as ``kind``.

    Raises:
        ValueError: it is something else.
    """
    try:
        return kind(record[name])
    except ValueError as error:
        found = printable(repr(record[name]))
        raise ValueError(f"{source} says {name} is {found}, which is not a number; it is damaged") from error


def check_record(record: Mapping[str, str], space: LiDBSpace, source: str) -> None:
    """Compare a record with a space; warn if only the base model's weights differ.

    Args:
        source: the file, for messages.

    Raises:
        ValueError: other settings, layers or bases, or the record is damaged.
    """
    config = record_config(record, source)
    differences = [
        f"{name} {getattr(config, name)} (here {getattr(space.config, name)})"
        for name in _SETTINGS
        if getattr(config, name) != getattr(space.config, name)
    ]
    if differences:
        raise ValueError(f"{source} was made with {', '.join(differences)}; use its own settings")
    if record["layers_hash"] != space.layers_hash:
        of = f", that of {printable(record['base_model_name'])}" if record["base_model_name"] else ""
        theirs = f"{printable(record['num_layers'])} layers (hash {printable(record['layers_hash'])})"
        raise ValueError(
            f"{source} belongs to another list of {theirs} than "
            f"this model's {space.num_layers} (hash {space.layers_hash}); use the architecture it was made for{of}"
        )
    _check_bases(record, space, source)
    fingerprint = _fingerprint(space)
    if record["base_fingerprint"] and fingerprint and not same_base(record["base_fingerprint"], fingerprint):
        name = printable(record["base_model_name"]) or "another base model"
        warnings.warn(
            f"{source} was made on {name}, whose weights differ from this model's; expect a weaker likeness",
            stacklevel=3,
        )


def _basis_records(space: LiDBSpace) -> dict[str, list]:
    """Return, per distinct basis, the fingerprint of its integers and a few of its values."""
    return {
        key.label: [basis_fingerprint(key), *[round(v, 9) for v in basis_probes(get_basis(key, _CPU)).tolist()]]
        for key in distinct_basis_keys(space.shapes, space.config)
    }


def _check_bases(record: Mapping[str, str], space: LiDBSpace, source: str) -> None:
    try:
        bases = json.loads(record["bases"])
        parsed = {label: (str(b[0]), torch.tensor([float(v) for v in b[1:]])) for label, b in bases.items()}
    except MALFORMED as error:
        raise ValueError(
            f"{source} has no readable record of its bases ({printable(str(error))}); it is damaged"
        ) from error
    for key in distinct_basis_keys(space.shapes, space.config):
        if key.label not in parsed:
            raise ValueError(f"{source} has no record of the {key.label} basis; it is damaged")
        check_basis(key, *parsed[key.label], source=source)


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


def fingerprint_components(fingerprint: str, source: str) -> tuple[str, ...]:
    """Return the components that a result of ``base_fingerprint`` is of, in their order; none for "".

    Raises:
        ValueError: it is something else; the message begins with ``source``.
    """
    if not fingerprint:
        return ()
    try:
        return tuple(json.loads(fingerprint).keys())
    except MALFORMED as error:
        raise ValueError(f"{source} has a base fingerprint that names no components; it is damaged") from error


def recorded_models(models: Mapping[str, nn.Module], fingerprint: str, source: str) -> dict[str, nn.Module]:
    """Return those of ``models`` that a result of ``base_fingerprint`` is of.

    All of them if it does not say, or names one that is not there: then a comparison of layers tells.
    """
    names = fingerprint_components(fingerprint, source)
    is_told = bool(names) and set(names) <= set(models)
    return {name: model for name, model in models.items() if not is_told or name in names}


def _fingerprint(space: LiDBSpace) -> str:
    return base_fingerprint(space.models)


def same_base(first: str, second: str) -> bool:
    """Tell whether two results of ``base_fingerprint`` agree within the rounding of half precision."""
    if first == second:
        return True
    try:
        ours, theirs = (
            {name: torch.tensor(v, dtype=torch.float32) for name, v in json.loads(text).items()}
            for text in (first, second)
        )
    except MALFORMED:  # not what base_fingerprint writes
        return False
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape and torch.allclose(ours[name], theirs[name], rtol=0.006, atol=1e-7)
        for name in ours
    )
