"""Reading a LoRA of any author: kohya's, diffusers' and PEFT's differ in names, and in where they keep alpha."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from converters.formats.diffusers import DIFFUSERS_WEIGHTS
from converters.formats.family import find_base
from converters.formats.layout import AdapterModule, read_layout
from converters.formats.lora_config import METADATA_KEY, check_config, layer_alpha, metadata_configs
from converters.formats.peft import PEFT_CONFIG, PEFT_WEIGHTS
from converters.key_maps import from_kohya_name, from_path_name
from converters.lora import Lora, LoraLayer
from lidb_peft.families import COMPONENTS, FAMILIES, TITLES
from lidb_peft.safe_read import PICKLE_SUFFIXES, printable, read_json_object, read_tensors

# A LoRA of another model family has thousands of keys, all of them unknown.
_MAX_KEYS_SHOWN = 20
# What a format needs for itself, or computes anew.
_OWN_METADATA = frozenset({"format", METADATA_KEY, "sshs_model_hash", "sshs_legacy_hash"})


@dataclass(frozen=True)
class Source:
    """One file of tensors, PEFT's config beside it if there is one, and the component its folder is named for."""

    file: Path
    config: Mapping[str, object] | None = None
    component: str = ""

    def configs(self, metadata: Mapping[str, str]) -> Mapping[str, Mapping[str, object]]:
        """Return component -> ``LoraConfig`` fields, "" for any; from the file's ``metadata`` if none is beside it.

        Raises:
            ValueError: the metadata is not what diffusers writes.
        """
        return {"": self.config} if self.config else metadata_configs(metadata, str(self.file))


def read_lora(path: str | os.PathLike) -> Lora:
    """Read a LoRA of any author: kohya's file, diffusers' (old and new names), or a folder that PEFT saved.

    A PEFT adapter of several models is a folder of such folders, named ``unet``, ``text_encoder``, ``text_encoder_2``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or one that holds anything that a `Lora` cannot; what it is, is named.
    """
    layers: dict[str, LoraLayer] = {}
    metadata: dict[str, str] = {}
    widths: list[tuple[str, str, int]] = []
    for source in find_sources(Path(path)):
        tensors, entries = read_tensors(source.file)
        modules = _read_modules(source, list(tensors))
        configs = source.configs(entries)
        for component, config in configs.items():
            check_config(config, f"{source.file} {component}".rstrip())
        for name, module in modules:
            if name in layers:
                raise ValueError(f"{path} holds layer {name} twice, the second time as {module.name}; remove one")
            layers[name] = _read_layer(source.file, name, module, tensors, configs)
            widths.append((module.name, name.partition(".")[0], layers[name].lora_A.shape[1]))
        metadata |= {key: value for key, value in entries.items() if key not in _OWN_METADATA}
        if source.config and source.config.get("base_model_name_or_path"):
            metadata.setdefault("ss_sd_model_name", str(source.config["base_model_name_or_path"]))
    base = find_base(widths, metadata)
    return Lora(layers, base if base in FAMILIES else "", metadata)


def find_sources(path: Path) -> list[Source]:
    """Return the files of the adapter at ``path``.

    Raises:
        ValueError: a folder without any.
    """
    if not path.is_dir():
        config = path.with_name(PEFT_CONFIG)
        return [_peft_source(path.parent)] if path.name == PEFT_WEIGHTS and config.is_file() else [Source(path)]
    folders = [folder for folder in (path, *(path / name for name in COMPONENTS)) if (folder / PEFT_CONFIG).is_file()]
    if folders:
        return [_peft_source(folder) for folder in folders]
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return [Source(path / DIFFUSERS_WEIGHTS)]
    pickled = [entry.name for entry in sorted(path.iterdir()) if entry.suffix in PICKLE_SUFFIXES]
    hint = f"; {pickled[0]} is pickled and not read" if pickled else ""
    raise ValueError(f"{path} is a folder without {PEFT_CONFIG} or {DIFFUSERS_WEIGHTS}{hint}; name a LoRA file")


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder is one adapter, as PEFT or diffusers saves it."""
    configs = (path / PEFT_CONFIG, *(path / name / PEFT_CONFIG for name in COMPONENTS))
    return any(file.is_file() for file in (*configs, path / DIFFUSERS_WEIGHTS))


def _peft_source(folder: Path) -> Source:
    config = read_json_object(folder / PEFT_CONFIG, "save the adapter again")
    # What is pickled is named where it is refused.
    names = [name for name in (PEFT_WEIGHTS, "adapter_model.bin") if (folder / name).is_file()] or [PEFT_WEIGHTS]
    return Source(folder / names[0], config, folder.name if folder.name in COMPONENTS else "")


def _read_modules(source: Source, names: list[str]) -> list[tuple[str, AdapterModule]]:
    """Sort tensor names into modules of plain LoRA or DoRA, each with our name; anything else is refused by name."""
    file, layout = source.file, read_layout(names)
    if layout.style == "PEFT" and source.config is None:
        raise ValueError(f"{file} has PEFT's names but no {PEFT_CONFIG} beside it, which says its alpha; add it")
    if layout.algorithm not in ("", "LoRA", "DoRA"):
        raise ValueError(f"{file} is {layout.algorithm}, not LoRA; it cannot be converted without loss")
    known, unknown = [], [*layout.unknown, *(name for name in names if "lora_embedding_" in name)]
    for module in layout.modules.values():
        is_lora = not {"mid", "full"} & module.parts.keys() and all(len(found) == 1 for found in module.parts.values())
        name = _known_name(source, module) if is_lora else None
        if name is not None:
            known.append((name, module))
        else:
            unknown += [name for found in module.parts.values() for name in found]
    if unknown:
        more = f" and {len(unknown) - _MAX_KEYS_SHOWN} more" if len(unknown) > _MAX_KEYS_SHOWN else ""
        raise ValueError(
            f"{file} holds {len(unknown)} keys that are no LoRA of {TITLES}:"
            f" {', '.join(printable(name) for name in sorted(unknown)[:_MAX_KEYS_SHOWN])}{more}"
        )
    if not known:
        raise ValueError(f"{file} holds no LoRA layers")
    return known


def _known_name(source: Source, module: AdapterModule) -> str | None:
    try:
        return layer_of(source, module)
    except ValueError:
        return None


def layer_of(source: Source, module: AdapterModule) -> str:
    """Return our name of a module of a file.

    Raises:
        ValueError: it is none of a Stable Diffusion 1, 2 or XL model.
    """
    if "." in module.name:
        return from_path_name(module.name, source.component or module.component)
    return from_kohya_name(module.name)


def _read_layer(
    file: Path, name: str, module: AdapterModule, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping]
) -> LoraLayer:
    where = f"{file}: {module.name}"
    parts = {role: tensors[found[0]] for role, found in module.parts.items()}
    missing = [role for role in ("lora_A", "lora_B") if role not in parts]
    if missing:
        raise ValueError(f"{where} has no {' and no '.join(missing)}; the file is incomplete")
    rank = parts["lora_A"].shape[0] if parts["lora_A"].dim() else 0
    component, _, path = name.partition(".")
    config = configs.get(component, configs.get(""))
    if "alpha" in parts:
        alpha = parts["alpha"]
        if alpha.numel() != 1 or alpha.is_complex():
            raise ValueError(f"{where} has an alpha of {alpha.dtype} and shape {tuple(alpha.shape)}; it must be one"
                             " real number")  # fmt: skip
        alpha = alpha.double().item()
    else:
        alpha = layer_alpha(config, path, rank, str(file)) if config else float(rank)
    try:
        magnitude = (
            _magnitude(module.parts["dora"][0], parts["dora"], len(parts["lora_B"])) if "dora" in parts else None
        )
        return LoraLayer(parts["lora_A"], parts["lora_B"], alpha, magnitude)
    except ValueError as error:
        raise ValueError(f"{where} has {error}") from error


def _magnitude(name: str, magnitude: Tensor, num_outputs: int) -> Tensor:
    """DoRA's magnitudes as ``(out,)``; PEFT has a convolution's on axis 1 of ``(1, out, 1, 1)``, others on axis 0."""
    if name.endswith(".dora_scale") and magnitude.shape[:1] != (num_outputs,):
        raise ValueError(f"DoRA magnitudes of shape {tuple(magnitude.shape)}; only those of the outputs can be carried")
    return magnitude.flatten()
