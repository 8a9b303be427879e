"""``hdb inspect``: what a LoRA or theta file is, whoever made it, and what is wrong with it."""

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .adapter_checks import ModuleFacts, base_from_metadata, base_from_shapes, block_norms, find_warnings
from .adapter_config import METADATA_KEY
from .adapter_layout import AdapterModule, Layout, read_layout
from .algebra import update_norm
from .metadata import read_sidecar
from .safe_read import PICKLE_SUFFIXES, Header, iter_tensors, printable, read_header, read_json_object

THETA_PREFIX = "lidb."
_FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_CHECKPOINT_STARTS = (
    "model.diffusion_model.",
    "first_stage_model.",
    "conv_in.weight",
    "down_blocks.0.resnets.0.norm1.weight",
)
# Metadata that one program alone writes.
_PROGRAMS = {"ss_sd_scripts_commit_hash": "kohya sd-scripts", "ot_revision": "OneTrainer", METADATA_KEY: "diffusers"}
_NUM_TAGS = 5
_PIECE = 1 << 22


@dataclass(frozen=True)
class FileDescription:
    """What :func:`describe` found.

    Args:
        path: the file that was read (inside a folder, if one was given).
        made_by: the program that wrote it, where it says so.
        kind: e.g. ``kohya LoRA``, ``diffusers LoRA``, ``PEFT LoRA``, ``kohya LoHa``, ``LiDB theta``.
        base: ``SD1``, ``SD2``, ``SDXL``, another model's own name, or None.
        base_model_name: the checkpoint it was made on, if it says so.
        ranks, alphas: every value that occurs, ascending; readers take a missing alpha as the rank.
        layers: component -> number of adapted layers.
        norms: block of the UNet, or text encoder -> Frobenius norm of its updates; LoRA only.
        dtypes: dtypes of its tensors, e.g. ``float16``.
        num_parameters, size_bytes: numbers stored, bytes on disk.
        title, trigger_words: what it calls itself, what to write in a prompt.
        hashes: ``sha256`` of the file, ``sshs_model_hash`` of its tensors, ``a1111`` the short hash that A1111 shows.
        warnings: one sentence for each thing that a reader would stumble over.
        metadata: the file's own, as it is.
    """

    path: str
    made_by: str
    kind: str
    base: str | None
    base_model_name: str
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    layers: dict[str, int]
    norms: dict[str, float]
    dtypes: tuple[str, ...]
    num_parameters: int
    size_bytes: int
    title: str
    trigger_words: tuple[str, ...]
    hashes: dict[str, str]
    warnings: tuple[str, ...]
    metadata: dict[str, str] = field(repr=False)

    def to_dict(self) -> dict[str, object]:
        """Everything as plain JSON values; an alpha that is not finite becomes text."""
        entries = asdict(self)
        alphas = [alpha if math.isfinite(alpha) else str(alpha) for alpha in self.alphas]
        return (
            entries
            | {key: list(entries[key]) for key in ("ranks", "dtypes", "trigger_words", "warnings")}
            | {"alphas": alphas}
        )


def describe(path: str | os.PathLike) -> FileDescription:
    """Describe a LoRA or theta file, or a folder that PEFT or diffusers saved one in.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a pickle, a damaged file, a whole checkpoint, or anything else that is no adapter.
    """
    file, configs = _locate(Path(path))
    header = read_header(file)
    metadata = header.metadata
    if set(header.tensors) == {"theta"} and any(key.startswith(THETA_PREFIX) for key in metadata):
        return _describe_theta(file, header)
    layout = read_layout(list(header.tensors))
    if not layout.modules:
        raise ValueError(f"{file} is {_what_instead(header)}; name a LoRA or theta file")
    configs = configs or _diffusers_configs(metadata)
    modules = _gather_facts(file, header, layout, configs)
    hashes = _hashes(file, header)
    warnings = find_warnings(layout, modules, metadata) + _hash_warnings(hashes, metadata)
    sidecar = read_sidecar(file) or {}
    peft_type = next((str(config["peft_type"]) for config in configs.values() if "peft_type" in config), "")
    algorithm = layout.algorithm or peft_type
    return FileDescription(
        path=str(file),
        made_by=_made_by(metadata),
        kind=f"{layout.style} {algorithm}",
        base=base_from_shapes(modules) or base_from_metadata(metadata),
        base_model_name=_base_model_name(metadata, configs),
        ranks=tuple(sorted({module.rank for module in modules if module.rank})),
        alphas=tuple(sorted({module.alpha for module in modules if module.alpha is not None})),
        layers=dict(Counter(module.component for module in modules)),
        norms=block_norms(modules),
        dtypes=_dtypes(header),
        num_parameters=_num_parameters(header),
        size_bytes=file.stat().st_size,
        title=metadata.get("modelspec.title") or metadata.get("ss_output_name", ""),
        trigger_words=_trigger_words(metadata, sidecar),
        hashes=hashes,
        warnings=tuple(warnings),
        metadata=metadata,
    )


def _locate(path: Path) -> tuple[Path, dict[str, dict]]:
    """Return the file to read, and PEFT's config beside it (for every component, under the key ``""``)."""
    if path.is_dir():
        file = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
        if file is None:
            pickled = [entry.name for entry in sorted(path.iterdir()) if entry.suffix in PICKLE_SUFFIXES]
            hint = f"; {pickled[0]} is pickled and not read" if pickled else ""
            raise ValueError(f"{path} is a folder without {' or '.join(_FOLDER_FILES)}{hint}; name a LoRA file")
        path = file
    config_path = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not config_path.is_file():
        return path, {}
    return path, {"": read_json_object(config_path, "save the adapter again")}


def _diffusers_configs(metadata: dict[str, str]) -> dict[str, dict]:
    """Component -> LoraConfig fields, from the text that diffusers >= 0.34 keeps in its files' metadata."""
    try:
        entries = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    configs: dict[str, dict] = {}
    if isinstance(entries, dict):
        for key, value in entries.items():
            component, _, name = key.partition(".")
            configs.setdefault(component, {})[name] = value
    return configs


def _gather_facts(file: Path, header: Header, layout: Layout, configs: dict[str, dict]) -> list[ModuleFacts]:
    """Read every tensor once, one at a time, and say what each layer's tensors hold."""
    non_finite, zero, alphas = set(), set(), {}
    alpha_names = {name for module in layout.modules.values() for name in module.parts.get("alpha", ())}
    for name, tensor in iter_tensors(file):
        if name in alpha_names:
            alphas[name] = tensor.flatten()[0].double().item() if tensor.numel() else math.nan
        elif not _is_finite(tensor):
            non_finite.add(name)
        elif not tensor.any():
            zero.add(name)
    facts = []
    for module in layout.modules.values():
        alpha_name = next(iter(module.parts.get("alpha", ())), None)
        down, up = (next(iter(module.parts.get(role, ())), None) for role in ("down", "up"))
        shape = header.tensors[down].shape if down else ()
        alpha = alphas[alpha_name] if alpha_name else _configured(module, configs, "lora_alpha")
        names = [name for part in module.parts.values() for name in part]
        factors = [name for role in ("down", "up", "lidb") for name in module.parts.get(role, ())]
        facts.append(
            ModuleFacts(
                name=module.name,
                component=module.component,
                rank=shape[0] if shape else int(_configured(module, configs, "r") or 0),
                in_features=shape[1] if len(shape) > 1 else 0,
                alpha=alpha,
                alpha_is_scalar=alpha_name is None or header.tensors[alpha_name].shape == (),
                has_non_finite=not non_finite.isdisjoint(names),
                is_zero=not zero.isdisjoint(factors),
                is_complete=(down is None) == (up is None),
                norm=_norm(file, header, down, up, alpha) if non_finite.isdisjoint(names) else None,
            )
        )
    return facts


def _norm(file: Path, header: Header, down: str | None, up: str | None, alpha: float | None) -> float | None:
    """The norm of ``alpha / rank * up @ down``; None if these two are no product."""
    if down is None or up is None:
        return None
    down_shape, up_shape = header.tensors[down].shape, header.tensors[up].shape
    if len(down_shape) < 2 or up_shape[1:] != (down_shape[0], *(1 for _ in down_shape[2:])) or not down_shape[0]:
        return None
    with safe_open(file, framework="pt") as stored:
        norm = update_norm(*(stored.get_tensor(name).double().flatten(1) for name in (down, up)))
    norm *= 1.0 if alpha is None else abs(alpha) / down_shape[0]
    return norm if math.isfinite(norm) else None


def _configured(module: AdapterModule, configs: dict[str, dict], name: str) -> float | None:
    """``r`` or ``lora_alpha`` by a PEFT or diffusers config, the layer's own where the config has one."""
    config = configs.get(module.component, configs.get("", {}))
    pattern = config.get("rank_pattern" if name == "r" else "alpha_pattern")
    own = [value for key, value in pattern.items() if module.name.endswith(key)] if isinstance(pattern, dict) else []
    value = own[0] if own else config.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _describe_theta(file: Path, header: Header) -> FileDescription:
    """A native theta file: one row per layer, and what it was made with in the metadata."""
    metadata, info = header.metadata, header.tensors["theta"]
    theta = dict(iter_tensors(file))["theta"]
    warnings = []
    if len(info.shape) != 2:
        warnings.append(f"theta has shape {info.shape}; it must be (layers, numbers per layer)")
    stated = metadata.get(THETA_PREFIX + "num_layers")
    if stated is not None and info.shape and stated != str(info.shape[0]):
        warnings.append(f"its metadata says {stated} layers and theta has {info.shape[0]} rows")
    if not _is_finite(theta):
        warnings.append("theta holds NaN or infinity, which makes black pictures")
    rank = metadata.get(THETA_PREFIX + "r", "")
    return FileDescription(
        path=str(file),
        made_by="lidb-peft",
        kind="LiDB theta",
        base=base_from_metadata(metadata),
        base_model_name=metadata.get(THETA_PREFIX + "base_model_name", ""),
        ranks=(int(rank),) if rank.isdecimal() and len(rank) < 6 else (),
        alphas=(),
        layers={"all": info.shape[0]} if info.shape else {},
        norms={},
        dtypes=_dtypes(header),
        num_parameters=_num_parameters(header),
        size_bytes=file.stat().st_size,
        title=metadata.get("modelspec.title", ""),
        trigger_words=_trigger_words(metadata, {}),
        hashes=_hashes(file, header),
        warnings=tuple(warnings),
        metadata=metadata,
    )


def _hashes(file: Path, header: Header) -> dict[str, str]:
    """sha256 of the file and of its tensors alone, in one pass."""
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    with open(file, "rb") as stream:
        whole.update(stream.read(header.data_offset))
        while block := stream.read(1 << 20):
            whole.update(block)
            tensors.update(block)
    model_hash = tensors.hexdigest()
    shown = header.metadata.get("sshs_model_hash") or model_hash
    return {"sha256": whole.hexdigest(), "sshs_model_hash": model_hash, "a1111": shown[:12]}


def _hash_warnings(hashes: dict[str, str], metadata: dict[str, str]) -> list[str]:
    stated = metadata.get("sshs_model_hash")
    if not stated or stated == hashes["sshs_model_hash"]:
        return []
    return ["sshs_model_hash in its metadata is not the hash of its tensors: they were changed after it was written"]


def _trigger_words(metadata: dict[str, str], sidecar: dict[str, object]) -> tuple[str, ...]:
    """The sidecar's activation text, ModelSpec's trigger phrase, else the most frequent training tags."""
    words = [str(sidecar.get("activation text") or ""), metadata.get("modelspec.trigger_phrase", "")]
    if not any(words):
        try:
            folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        except (ValueError, RecursionError):
            folders = {}
        counts: Counter[str] = Counter()
        for tags in folders.values() if isinstance(folders, dict) else ():
            if isinstance(tags, dict):
                counts.update({tag.strip(): count for tag, count in tags.items() if isinstance(count, int)})
        words = [tag for tag, _ in counts.most_common(_NUM_TAGS)]
    return tuple(dict.fromkeys(word for word in words if word))


def _base_model_name(metadata: dict[str, str], configs: dict[str, dict]) -> str:
    named = (str(config.get("base_model_name_or_path") or "") for config in configs.values())
    return metadata.get("ss_sd_model_name", "") or next((name for name in named if name), "")


def _made_by(metadata: dict[str, str]) -> str:
    program = next((program for key, program in _PROGRAMS.items() if key in metadata), "")
    return "LyCORIS" if metadata.get("ss_network_module", "").startswith("lycoris") else program


def _what_instead(header: Header) -> str:
    names = list(header.tensors)
    if any(name.startswith(_CHECKPOINT_STARTS) for name in names):
        return "a whole model, not an adapter"
    if {"emb_params"} & set(names) or {"clip_l", "clip_g"} & set(names):
        return "a textual inversion embedding, not a LoRA"
    return f"no adapter that is known here: it holds {', '.join(printable(name) for name in names[:3]) or 'no tensors'}"


def _dtypes(header: Header) -> tuple[str, ...]:
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    return tuple(sorted({names.get(info.dtype, info.dtype.lower()) for info in header.tensors.values()}))


def _num_parameters(header: Header) -> int:
    return sum(math.prod(info.shape) for info in header.tensors.values())


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    pieces = tensor.flatten().split(_PIECE)  # torch.isfinite makes copies, and knows no float8
    return all(bool(torch.isfinite(piece.float() if piece.element_size() == 1 else piece).all()) for piece in pieces)
