"""The formats of adapters, detected from their content, and conversion between them.

Everything that both formats can hold is preserved bit for bit. The rest is folded into what the target can hold, which
the notes report, or the conversion is refused.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from converters.arithmetic.low_rank import to_low_rank
from converters.formats.diffusers import diffusers_tensors, old_diffusers_tensors
from converters.formats.family import stated_base
from converters.formats.foreign import name_foreign
from converters.formats.kohya import kohya_layers, kohya_tensors, write_tensors
from converters.formats.layout import SPELLINGS
from converters.formats.lidb import LiDBWeights, read_lidb_folder, read_theta
from converters.formats.peft import PEFT_CONFIG, PEFT_WEIGHTS, peft_folders
from converters.formats.reading import Source, find_sources, is_adapter_folder, read_sources
from converters.key_maps import kohya_place
from converters.layer import DTYPES, is_power_of_two
from converters.lora import BECOMES_FLOAT32, Lora, to_dtype, with_one_alpha, with_shared_alphas
from converters.metadata import KohyaMetadata, build_metadata, stated_v_prediction, trigger_entries
from converters.shapes import fit_shapes, has_layer, kernel_side
from converters.sidecar import Companions, check_companions, companions_first, read_companions, write_companions
from lidb_peft.families import FAMILIES, get_family
from lidb_peft.files import Tensors, atomic_folder, write_safetensors
from lidb_peft.outputs import OVERWRITE, check_output, check_output_folder
from lidb_peft.safe_read import count, examples

# Name -> what it is; LiDB's two hold what a LoRA cannot become without loss.
LIDB_FORMATS = {"theta": "LiDB weights in one file", "lidb": "LiDB weights in the folders that PEFT saves"}
FORMATS = {
    "kohya": "one file, for Automatic1111, Forge, ComfyUI, kohya sd-scripts and diffusers",
    "diffusers": "one file with diffusers' names since 0.20",
    "diffusers-old": "one file with diffusers' names before 0.20, which ComfyUI reads too",
    "peft": "a folder for each model, with PEFT's config",
    **LIDB_FORMATS,
}
READ_ONLY = {"comfyui": "ComfyUI's own"}
"""Formats that are read and not written."""
_FOLDER_FORMATS = frozenset({"peft", "lidb"})
# What of a file's metadata says which models it is for.
_FAMILY_KEYS = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.implementation")
_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready: ``source`` is in the format ``found``; ``write`` writes it and returns the files."""

    found: str
    notes: tuple[str, ...]
    write: Callable[[], list[Path]]


def detect_format(path: str | os.PathLike) -> str:
    """Return which of ``FORMATS`` an adapter is in, or of ``READ_ONLY``.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is a damaged file, or no adapter of a known format.
    """
    return _format_of(find_sources(Path(path))[0])


def _format_of(source: Source) -> str:
    names, layout = list(source.header.tensors), source.layout
    if names == ["theta"]:
        return "theta"
    if not layout.modules:
        raise ValueError(f"{source.file} is {name_foreign(names, source.header.metadata)}; name a LoRA or theta file")
    if layout.style == "PEFT":
        return "lidb" if layout.algorithm == "LiDB" else "peft"
    old = SPELLINGS["diffusers-old"]["lora_A"]
    return "diffusers-old" if any(name.endswith(old) for name in names) else layout.style.lower()


def is_folder_format(name: str) -> bool:
    """Whether a format is a folder and not a file."""
    return name in _FOLDER_FORMATS


def prepare_conversion(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    dtype: torch.dtype | None = None,
    family: str = "",
    trigger: str = "",
    v_prediction: bool | None = None,
    models: Mapping[str, nn.Module] | None = None,
    rank: int | None = None,
    drop_nan: bool = False,
    alpha: float | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Read an adapter and prepare its conversion to ``target``; nothing is written until ``write`` is called.

    A1111's sidecar and preview are copied along with a kohya file, the activation text with any format.

    Args:
        to: one of ``FORMATS``.
        dtype: dtype of the tensors; None keeps it.
        family: name of one of ``lidb_peft.families``, if it cannot be detected from the adapter.
        trigger: activation text, e.g. ``a sks face``.
        v_prediction: whether the base model predicts v, if the adapter does not say; None makes no claim.
        models: component -> model of the base, for LiDB weights of no known family.
        rank: rank of the LoRA that LoHa, LoKr and full differences are approximated by.
        drop_nan, alpha: as `read_lora`.
        overwrite: replace an existing ``target``.

    Raises:
        OSError: ``source`` does not exist, or ``target`` cannot be written or exists already.
        ValueError: ``source`` cannot be read, ``target`` is not a valid output, or ``to`` cannot hold the adapter.
    """
    source, target = Path(source), Path(target)
    _check_choices(to, dtype, family)
    check_target(target, [source], to, overwrite, parents=True)
    sources = find_sources(source)
    found = _format_of(sources[0])
    if to in LIDB_FORMATS:
        if found not in LIDB_FORMATS:
            raise ValueError(
                f"{source} is a LoRA; LiDB weights only come near to one, by projection, and lose: hdb project"
            )
        weights = _read_lidb(found, source, models)
        return Conversion(found, (), lambda: _write_lidb(target, weights, to, dtype))
    if found in LIDB_FORMATS:
        lora = _read_lidb(found, source, models).to_lora()
    else:
        lora = _as_lora(read_sources(source, sources, rank is not None, drop_nan, alpha), source, rank, dtype)
    lora, companions = _with_companions(replace(lora, family=family or lora.family), [source], trigger)
    lora, notes = _fit_to(lora, to, dtype)
    return Conversion(found, notes, _writer(target, lora, to, companions, v_prediction, overwrite))


def check_target(
    target: str | os.PathLike,
    sources: Sequence[str | os.PathLike],
    to: str = "",
    overwrite: bool = False,
    parents: bool = False,
) -> None:
    """Raise now what writing an adapter to ``target`` in the format ``to`` would raise after the work.

    Args:
        sources: what it is made of, of which the first has the format if ``to`` is empty.
        overwrite, parents: as for `check_output`.

    Raises:
        ValueError, OSError: as `check_output`, or a first source that is no adapter.
    """
    if is_folder_format(to or detect_format(sources[0])):
        check_output_folder(target, sources)
        if any(Path(target).glob("*")):
            if not is_adapter_folder(Path(target)):
                raise FileExistsError(f"{target} is a folder of something else; name a new one")
            if not overwrite:
                raise FileExistsError(f"{target} exists and is kept; choose another output, or {OVERWRITE}")
    else:
        check_output(target, sources, overwrite=overwrite, parents=parents)


def prepare_writing(
    lora: Lora,
    sources: Sequence[str | os.PathLike],
    target: str | os.PathLike,
    to: str = "",
    overwrite: bool = False,
    v_prediction: bool | None = None,
    family: str = "",
) -> Conversion:
    """Make of a LoRA that was computed from ``sources`` what ``target`` shall hold, as `prepare_conversion`.

    Of several sources' sidecars, what all say alike comes along, and no preview.

    Args:
        to: one of ``FORMATS``; that of the first source if empty.
        overwrite: what is at ``target`` may be replaced.
        v_prediction, family: as for `prepare_conversion`.

    Raises:
        ValueError: the format cannot hold it.
        ValueError, OSError: as `check_target`.
    """
    paths, target, to = [Path(source) for source in sources], Path(target), to or detect_format(sources[0])
    if to in READ_ONLY:
        to, lora = "kohya", replace(lora, notes=(*lora.notes, f"its names are {READ_ONLY[to]}; kohya's are written"))
    _check_choices(to, family=family)
    check_target(target, paths, to, overwrite)
    lora, companions = _with_companions(replace(lora, family=family or lora.family), paths)
    lora, notes = _fit_to(lora, to, _one_dtype(lora))
    return Conversion(to, notes, _writer(target, lora, to, companions, v_prediction, overwrite))


def _one_dtype(lora: Lora) -> torch.dtype | None:
    """The dtype of a LoRA that was computed, which folding its alphas is not to widen; None if there are several."""
    dtypes = {tensor.dtype for layer in lora.layers.values() for tensor in layer.tensors()}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(DTYPES) else None


def _check_choices(to: str, dtype: torch.dtype | None = None, family: str = "") -> None:
    if to not in FORMATS:
        raise ValueError(f"the format is {to!r}; choose one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; choose one of {', '.join(str(dtype) for dtype in DTYPES)}")
    if family:
        get_family(family)


def _read_lidb(found: str, source: Path, models: Mapping[str, nn.Module] | None) -> LiDBWeights:
    return (read_theta if found == "theta" else read_lidb_folder)(source, models)


def _as_lora(lora: Lora, source: Path, rank: int | None, dtype: torch.dtype | None) -> Lora:
    """Make LoRA of ``rank`` of what is none, if there is such."""
    if rank is None:
        return lora
    if not lora.full_updates:
        raise ValueError(f"{source} is a LoRA, which keeps its rank; hdb resize changes it")
    try:
        return to_low_rank(lora, rank, dtype)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _with_companions(lora: Lora, sources: Sequence[Path], trigger: str = "") -> tuple[Lora, Companions]:
    """Read what stands beside the sources; the LoRA says its activation text too, unless it says one itself."""
    companions = read_companions(sources)
    if trigger:
        companions = replace(companions, entries={**companions.entries, "activation text": trigger})
    activation = str(companions.entries.get("activation text") or "")
    return replace(lora, metadata=trigger_entries(activation) | lora.metadata | trigger_entries(trigger)), companions


def _fit_to(lora: Lora, to: str, dtype: torch.dtype | None = None) -> tuple[Lora, tuple[str, ...]]:
    """Make a LoRA what a format can hold, in ``dtype``; and say what that took."""
    notes = list(lora.notes)
    if dtype is None and any(
        tensor.dtype == torch.float64 for layer in lora.layers.values() for tensor in layer.tensors()
    ):
        raise ValueError("its numbers are float64, which no reader of LoRA files needs; choose a dtype: --dtype fp32")
    lora = fit_shapes(lora, for_kohya=to == "kohya")
    if dtype is not None:  # folding then rounds as little as it can
        lora = replace(lora, layers={name: layer.widened(dtype) for name, layer in lora.layers.items()})
    reads_mixed_ranks = bool(lora.family) and get_family(lora.family).reads_mixed_ranks
    scale = _stated_scale(lora) if to == "kohya" else 1.0
    if to != "peft" and scale is not None:
        lora, taken = with_one_alpha(lora, scale, one_rank=to != "kohya" and not reads_mixed_ranks)
        notes += taken
    if to == "kohya" and not reads_mixed_ranks:
        lora, taken = with_shared_alphas(lora)
        notes += taken
    if dtype is not None and BECOMES_FLOAT32 in notes:  # on the way to what was asked for
        notes.remove(BECOMES_FLOAT32)
    if to == "kohya" and reads_mixed_ranks:
        notes += _notes_on_stacks(lora)
    notes += _notes_on_readers(lora, to)
    if to != "kohya" and lora.embeddings:
        notes.append(f"{count(list(lora.embeddings), 'tensor')} of embeddings left out, which only kohya's files hold:"
                     f" {examples(list(lora.embeddings))}")  # fmt: skip
    dora = [layer for layer in lora.layers.values() if layer.magnitude is not None]
    if to == "kohya" and not all(layer.has_input_magnitude for layer in dora):
        notes.append(
            "it is DoRA, which none of these programs applies from a kohya file as it was trained: ComfyUI and Forge"
            " divide by the norm of the base weight, A1111 by that of the other axis, kohya's networks.lora and"
            " diffusers leave dora_scale out; diffusers and PEFT apply it from their own formats, and hdb merge --into"
        )
    if to != "peft" and stated_base(lora.metadata) not in ("", lora.family) and lora.family:
        wrong = [key for key in _FAMILY_KEYS if key in lora.metadata]
        lora = replace(lora, metadata={key: value for key, value in lora.metadata.items() if key not in wrong})
        notes.append(f"its metadata were of another model than its layers: left out {', '.join(wrong)}")
    return lora if dtype is None else to_dtype(lora, dtype), tuple(notes)


def _notes_on_stacks(lora: Lora) -> list[str]:
    """Say which layers are one module in kohya, and of which rank, where that is not theirs."""
    stacks = {name: layer.rank for name, layer in kohya_layers(lora, lora.family).items()}
    own = {kohya_place(name, lora.family).name: layer.rank for name, layer in lora.layers.items()}
    grown = [name for name, rank in stacks.items() if rank != own[name]]
    if not grown:
        return []
    ranks = ", ".join(f"{before} to {after}" for before, after in sorted({(own[name], stacks[name]) for name in grown}))
    return [
        f"{count(grown, 'module')} of kohya's hold several layers block by block, exactly; their ranks go from {ranks}"
    ]


def _notes_on_readers(lora: Lora, to: str) -> list[str]:
    """Say which layers diffusers does not read."""
    if not lora.family:
        return []
    if to == "kohya":
        names = [name for name in lora.layers
                 if kernel_side(name, lora.family) != kernel_side(name, lora.family, for_kohya=True)]  # fmt: skip
        said = (
            f"{count(names, 'layer')} written as the convolution that sd-scripts has there, which diffusers loads from"
        )
        return [f"{said} its own format only: {examples(names)}"] if names else []
    unread = [part for part in get_family(lora.family).text_encoders if not part.targets]
    names = [name for name in lora.layers for part in unread if name.startswith(f"{part.name}.")]
    said = f"{count(names, 'layer')} of a text encoder that diffusers loads no LoRA of: {examples(names)}"
    return [said] if names else []


def _stated_scale(lora: Lora) -> float | None:
    """The scale that a kohya file had before another format made it 1, so that its numbers come back as they were."""
    alpha, dim = lora.metadata.get("ss_network_alpha", ""), lora.metadata.get("ss_network_dim", "")
    if not (_NUMBER.fullmatch(alpha) and _NUMBER.fullmatch(dim)) or not float(alpha) or not float(dim):
        return None
    scale = float(alpha) / float(dim)
    return scale if is_power_of_two(scale) and all(layer.scale == 1 for layer in lora.layers.values()) else None


def _writer(
    target: Path,
    lora: Lora,
    to: str,
    companions: Companions,
    v_prediction: bool | None = None,
    overwrite: bool = False,
) -> Callable[[], list[Path]]:
    if to == "peft":
        folders = peft_folders(lora)
        return lambda: _write_folders(target, folders, lora.metadata)
    if to == "kohya":
        if not lora.family:
            fitting = [name for name in FAMILIES if all(has_layer(layer, name) for layer in lora.layers)] or FAMILIES
            raise ValueError(f"its layers do not show its model family; pass --family {', '.join(fitting)}")
        tensors = {**kohya_tensors(lora, lora.family), **lora.embeddings}
        trigger = lora.metadata.get("modelspec.trigger_phrase", "")
        if companions.entries or trigger:
            check_companions(target, str(companions.entries.get("activation text") or trigger), overwrite=overwrite)
        return lambda: _write_kohya(target, tensors, lora, companions, v_prediction)
    written = (old_diffusers_tensors if to == "diffusers-old" else diffusers_tensors)(lora)
    return lambda: _write_file(target, written, lora.metadata)


def _write_kohya(
    target: Path, tensors: Tensors, lora: Lora, companions: Companions, v_prediction: bool | None
) -> list[Path]:
    ((rank, alpha), _) = Counter((layer.rank, layer.alpha) for layer in lora.layers.values()).most_common(1)[0]
    stated = stated_v_prediction(lora.metadata)
    about = KohyaMetadata(
        family=lora.family,
        v_prediction=v_prediction if stated is None else stated,
        trigger=lora.metadata.get("modelspec.trigger_phrase", ""),
        base_model_name=lora.metadata.get("ss_sd_model_name", ""),
    )
    sizes = {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    with companions_first(target):
        written = write_companions(target, about, companions)
        write_tensors(target, tensors, build_metadata(about, target.stem, rank) | lora.metadata | sizes)
    return [target, *written]


def _write_file(target: Path, tensors: Tensors, metadata: dict[str, str]) -> list[Path]:
    write_safetensors(target, tensors, {"format": "pt"} | metadata)
    return [target]


def _write_lidb(target: Path, weights: LiDBWeights, to: str, dtype: torch.dtype | None) -> list[Path]:
    if to == "lidb":
        return _write_folders(target, weights.peft_folders(), {})
    weights.save_theta(target, dtype)
    return [target]


def _write_folders(
    target: Path, folders: Mapping[str, tuple[dict[str, object], Tensors]], metadata: dict[str, str]
) -> list[Path]:
    """Write ``target/component`` for each, all of them or none; what else an earlier adapter's folder holds stays."""
    with atomic_folder(target, overwrite=True) as whole:
        if target.is_dir():
            shutil.copytree(target, whole, ignore=shutil.ignore_patterns(PEFT_CONFIG, PEFT_WEIGHTS), dirs_exist_ok=True)
        for component, (config, tensors) in folders.items():
            (whole / component).mkdir(exist_ok=True)
            _write_file(whole / component / PEFT_WEIGHTS, tensors, metadata)
            text = json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n"
            (whole / component / PEFT_CONFIG).write_text(text, encoding="utf-8")
    return [target / component / name for component in folders for name in (PEFT_WEIGHTS, PEFT_CONFIG)]
