"""Which layers of a base model are adapted, and what they are called.

A layer name is component + "." + module path in the classic naming, such as
``unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`` or
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``. ``text_model.`` is always there: the LoRA formats have
it, whatever the installed transformers calls the modules of its CLIP models (5.x dropped that level).
"""

import dataclasses
import re

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .config import LiDBConfig
from .families import FAMILIES
from .safe_read import printable

_ALL_TARGETS = frozenset().union(*(family.targets for family in FAMILIES.values()))


def default_target_modules(model: nn.Module) -> set[str]:
    """Return the suffixes of the layers that are adapted in models of the family that has ``model`` as a component.

    Those of all its components, so that one config serves the denoiser and its text encoders.

    Raises:
        ValueError: ``model`` has no family's names.
    """
    names = [clean_module_name(name) for name, _ in model.named_modules()]
    ends = {target for target in _ALL_TARGETS if any(name.endswith(f".{target}") for name in names)}
    fitting = [
        (len(component.targets), family)
        for family in FAMILIES.values()
        for component in family.components
        if component.targets and component.targets <= ends
    ]
    if not fitting:
        raise ValueError(
            "Please specify `target_modules` in `peft_config`: "
            f"{type(model).__name__} has neither a UNet's nor a CLIP text encoder's attention projections"
        )
    # One family's names may be some of another's.
    most = max(count for count, _ in fitting)
    return set(next(family for count, family in fitting if count == most).targets)


def resolve_config(config: LiDBConfig, model: nn.Module) -> LiDBConfig:
    """Return ``config``, or a copy with the default ``target_modules`` of ``model`` if it names none."""
    if config.target_modules is not None:
        return config
    return dataclasses.replace(config, target_modules=default_target_modules(model))


def clean_module_name(name: str) -> str:
    """Return a module path as it is in the base model, without what PEFT and ``torch.compile`` put around."""
    return name.removeprefix("base_model.model.").replace("_orig_mod.", "").replace(".base_layer", "")


def layer_name(component: str, module_name: str) -> str:
    """Return the classic name of the module at ``module_name`` in the model of ``component``."""
    name = clean_module_name(module_name)
    level = _level(component, name)
    # CLIP's projection stands beside text_model, and not in it.
    is_whole = name.startswith((level, "text_projection"))
    return f"{component}.{name}" if is_whole else f"{component}.{level}{name}"


def _level(component: str, path: str) -> str:
    """Return how the layer names of the component begin that has ``path``; one name may be several models' (T5)."""
    found = [part for family in FAMILIES.values() for part in family.components if part.name == component]
    own = next((part for part in found if re.search(part.path, path)), found[0] if found else None)
    return "" if own is None else own.level


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that counts: "layers.2" comes before "layers.10"."""
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"[._]|(\d+)", name) if part
    ]


def find_layers(component: str, model: nn.Module, config: LiDBConfig) -> dict[str, nn.Linear]:
    """Return the linear layers that ``config`` adapts in ``model``, by layer name, in natural order of the names.

    The order is that of the names and not of the modules, so that it cannot change with a library's version. Layers
    that carry PEFT adapters are found below them.

    Raises:
        ValueError: no layer matches, or a matching module is not linear.
    """
    config = resolve_config(config, model)
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if not name or not check_target_module_exists(config, clean_module_name(name)):
            continue
        while hasattr(module, "base_layer"):
            module = module.base_layer
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{component}.{name} is a {type(module).__name__}; target_modules must name linear layers")
        found[layer_name(component, name)] = module
    if not found:
        named = printable(repr(config.target_modules))
        raise ValueError(f"no layer of {component} matches target_modules {named}; correct the names")
    return {name: found[name] for name in sorted(found, key=natural_key)}
