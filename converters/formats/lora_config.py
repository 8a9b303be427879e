"""A layer's scale from PEFT's ``LoraConfig``, which PEFT stores next to the tensors, diffusers in their metadata."""

import json
import math
import sys
from collections.abc import Mapping

from peft import LoraConfig

from lidb_peft.patterns import find_pattern
from lidb_peft.safe_read import printable

# Where diffusers >= 0.34 stores the configs of all components, as one JSON object with keys such as "unet.lora_alpha".
METADATA_KEY = "lora_adapter_metadata"
# Read below, implied by the tensors themselves, or without effect on the update.
_UNDERSTOOD = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
     "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules", "exclude_modules",
     "layers_to_transform", "layers_pattern", "lora_dropout", "runtime_config", "eva_config"}
)  # fmt: skip
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
# Initialisations derived from the base model that leave it unchanged; the others change it, and so the update.
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def metadata_configs(metadata: Mapping[str, str], source: str) -> dict[str, dict]:
    """Return component -> ``LoraConfig`` fields of a diffusers file; "" stands for a model saved on its own.

    Raises:
        ValueError: the metadata is not what diffusers writes; the message begins with ``source``.
    """
    try:
        entries = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} has unreadable {METADATA_KEY} ({error}); save the LoRA again") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{source} has {METADATA_KEY} that is not a JSON object; save the LoRA again")
    configs: dict[str, dict] = {}
    for key, value in entries.items():
        component, _, name = key.rpartition(".")
        configs.setdefault(component, {})[name] = value
    return configs


def check_config(config: Mapping[str, object], source: str) -> None:
    """Refuse settings that would change the update and cannot be represented.

    Raises:
        ValueError: such a field is set; the message begins with ``source``.
    """
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(
            f"{source} is {printable(str(config['peft_type']))}, not LoRA; it cannot be converted without loss"
        )
    defaults = vars(LoraConfig())
    odd = [name for name in config if name not in _UNDERSTOOD and config[name] and config[name] != defaults.get(name)]
    if config.get("init_lora_weights", True) in _HARMLESS_STARTS and "init_lora_weights" in odd:
        odd.remove("init_lora_weights")
    if odd:
        found = printable(", ".join(f"{name} {config[name]!r}" for name in odd))
        raise ValueError(f"{source} is a LoRA with {found}, which cannot be carried; save it without")


def layer_alpha(config: Mapping[str, object], path: str, rank: int, source: str) -> float:
    """Return the alpha of the layer at module ``path``, by PEFT's rules; the rank if the config has none.

    Raises:
        ValueError: the config's rank is not that of the tensors, or a value is not a number; the message begins with
            ``source``.
    """
    stated, alpha = (stated_number(config, name, path, source) for name in ("r", "lora_alpha"))
    if stated not in (None, rank):
        raise ValueError(f"{source} says rank {stated:g} for {path}, whose tensors have rank {rank}; it is damaged")
    alpha = float(rank) if alpha is None else alpha
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def stated_number(config: Mapping[str, object], name: str, path: str, source: str) -> float | None:
    """Return ``r`` or ``lora_alpha`` of the layer at module ``path``, by PEFT's rules; None if it is not set.

    Raises:
        ValueError: it is not a finite number; the message begins with ``source``.
    """
    own = config.get(_PATTERNS[name]) or {}
    where = f"{source}: its {_PATTERNS[name]}"
    value = own.get(find_pattern(own, path, where), config.get(name)) if isinstance(own, dict) else own
    if value is None:
        return None
    # The comparison takes integers beyond float's range, and refuses NaN.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(
            f"{source} has a {name} for {path} that is not a number: {printable(repr(value))}; it is damaged"
        )
    return float(value)
