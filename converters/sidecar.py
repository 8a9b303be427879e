"""What A1111 looks for beside a LoRA: the sidecar ``<name>.json`` and a preview ``<name>.png``.

Trigger words reach its prompt only through the sidecar.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.metadata import KohyaMetadata
from lidb_peft.families import FAMILIES, get_family
from lidb_peft.files import atomic_path
from lidb_peft.outputs import OVERWRITE, check_not_an_input, check_output
from lidb_peft.safe_read import read_header

if TYPE_CHECKING:
    from PIL.Image import Image

# What marks a preview as ours, so that a photo of the same name is never overwritten.
_PREVIEW_SOFTWARE = "lidb-peft"
_SIDECAR_KEYS = frozenset(
    {"description", "sd version", "activation text", "preferred weight", "negative text", "notes"}
)


@dataclass(frozen=True)
class Companions:
    """Sidecar entries and preview inherited from the LoRA files that another is made from.

    Args:
        entries: the entries that all of their sidecars share.
        pictured: the file whose preview to use; None if there are several, since none of them shows the result.
    """

    entries: Mapping[str, object]
    pictured: Path | None


def check_companions(
    lora_path: Path,
    trigger: str = "",
    inputs: Iterable[str | Path | None] = (),
    preview: bool = False,
    sheet: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Raise now what would be lost, or not be written, where a LoRA gets a sidecar and pictures.

    Args:
        trigger: the activation text that the sidecar would say.
        inputs: as for `check_output`.
        preview: `write_preview` will be called.
        sheet: a picture that is written beside it, which another of ours may be replaced by.

    Raises:
        FileExistsError: a file of somebody else's is in the way, and is not to be overwritten.
        ValueError, OSError: as `check_output`.
    """
    inputs, path = list(inputs), lora_path.with_suffix(".json")
    check_not_an_input(path, inputs)
    earlier = read_sidecar(lora_path)
    if earlier is None and not overwrite:
        raise FileExistsError(f"{path} is not a sidecar of A1111 and is kept; choose another output, or move it")
    text = str((earlier or {}).get("activation text") or "")
    if text and (not trigger or trigger not in text) and not overwrite and not lora_path.exists():
        raise FileExistsError(
            f"{path} is the sidecar of another LoRA, whose activation text would be lost; choose another output, or "
            f"{OVERWRITE}"
        )
    if preview:
        picture = _free_preview_path(lora_path)
        if picture is not None:
            check_not_an_input(picture, inputs)
        elif not overwrite:
            names = " and ".join(map(str, _preview_paths(lora_path)))
            raise FileExistsError(
                f"{names} are other pictures and are kept; choose another output, or do without a preview"
            )
    if sheet is not None:
        check_output(sheet, inputs, ".png", overwrite or is_our_picture(sheet))


def read_companions(sources: Sequence[Path]) -> Companions:
    """Return what stands beside all of ``sources``; beside what is no file, such as PEFT's folder, is nothing."""
    first, *others = [(read_sidecar(path) or {}) if path.is_file() else {} for path in sources]
    alike = {key: value for key, value in first.items() if all((key, value) in other.items() for other in others)}
    return Companions(alike, sources[0] if not others and sources[0].is_file() else None)


@contextmanager
def companions_first(lora_path: Path) -> Iterator[None]:
    """For a block that writes a LoRA's companions and then the LoRA: if that fails, those that are new are removed."""
    paths = [lora_path.with_suffix(".json"), *_preview_paths(lora_path)]
    new = [path for path in paths if not os.path.lexists(path)]
    try:
        yield
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise


def write_companions(lora_path: Path, metadata: KohyaMetadata, companions: Companions) -> list[Path]:
    """Put a sidecar beside a LoRA, if there is anything to say, and the preview that comes along; return the files."""
    written = []
    if companions.entries or metadata.trigger:
        written.append(write_sidecar(lora_path, metadata, companions.entries))
    if companions.pictured:
        written.append(copy_preview(companions.pictured, lora_path))
    return [path for path in written if path is not None]


def write_sidecar(lora_path: Path, metadata: KohyaMetadata, carried: Mapping[str, object] | None = None) -> Path | None:
    """Write A1111's ``<name>.json`` beside a LoRA; what the user has put into an earlier one stays.

    Args:
        carried: entries of another LoRA's sidecar, which count more than ``metadata``.

    Returns None, with a warning, when a JSON file of that name is something else.
    """
    path = lora_path.with_suffix(".json")
    earlier = read_sidecar(lora_path)
    if earlier is None:
        warnings.warn(
            f"{path} is not an A1111 sidecar and was left alone; the activation text was not written", stacklevel=2
        )
        return None
    ours = {
        "description": metadata.description,
        "sd version": get_family(metadata.family).a1111_version,
        "activation text": metadata.trigger,
        "preferred weight": metadata.preferred_weight,
    }
    ours |= _changed_by_the_user(lora_path, earlier, ours)
    text = json.dumps({"notes": ""} | earlier | ours | dict(carried or {}), indent=4, ensure_ascii=False)
    with atomic_path(path) as temporary:
        # Half of a character, which JSON may hold, becomes JSON's own escape.
        temporary.write_bytes((text + "\n").encode("utf-8", errors="backslashreplace"))
    return path


def _changed_by_the_user(
    lora_path: Path, earlier: Mapping[str, object], ours: Mapping[str, object]
) -> dict[str, object]:
    """Return those of the entries of ``ours`` that somebody has edited: they are not as the earlier LoRA has them.

    An activation text goes with the words that were trained: an edited one stays only if those are the same still.
    """
    written = {"preferred weight": KohyaMetadata.preferred_weight, "description": ""} | _entries_of(lora_path)
    kept = {key: earlier[key] for key in ours if key in earlier and earlier[key] != written.get(key, earlier[key])}
    text, trigger = earlier.get("activation text"), ours["activation text"]
    kept.pop("activation text", None)
    if (
        isinstance(text, str)
        and isinstance(trigger, str)
        and trigger
        and (trigger in text or written.get("activation text") == trigger)
    ):
        kept["activation text"] = text
    return kept


def _entries_of(lora_path: Path) -> dict[str, object]:
    """What `write_sidecar` has written beside the LoRA that is there, as far as its metadata tell."""
    try:
        metadata = read_header(lora_path).metadata
    except (OSError, ValueError):
        return {}
    stated = metadata.get("ss_base_model_version")
    families = (
        family for family in FAMILIES.values() if stated in [version.base_version for version in family.versions]
    )
    family = next(families, None)
    return {
        "activation text": metadata.get("modelspec.trigger_phrase", ""),
        "description": metadata.get("modelspec.description", ""),
        **({"sd version": family.a1111_version} if family else {}),
    }


def read_sidecar(lora_path: Path) -> dict[str, object] | None:
    """Return A1111's sidecar of a LoRA, ``{}`` where there is none, None where the file is something else."""
    path = lora_path.with_suffix(".json")
    if not path.exists():
        return {}
    if not path.is_file() or path.stat().st_size > 10_000_000:
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return entries if isinstance(entries, dict) and (not entries or _SIDECAR_KEYS & entries.keys()) else None


def write_preview(lora_path: Path, preview: "Image", parameters: str = "") -> Path | None:
    """Write the picture that A1111 shows for a LoRA: ``<name>.png``, or ``<name>.preview.png`` where that is taken.

    A picture that this function did not write is never overwritten: it may be the photo that the LoRA was made from.
    Returns None, with a warning, when both names are taken.
    """
    path = _free_preview_path(lora_path)
    if path is None:
        warnings.warn(f"{lora_path.with_suffix('.png')} is another picture; the preview was not written", stacklevel=2)
        return None
    write_our_picture(preview.convert("RGB"), path, parameters)
    return path


def write_our_picture(picture: "Image", path: Path, parameters: str = "") -> None:
    """Write a PNG that belongs to a LoRA, marked so that it may be replaced with it; see `is_our_picture`.

    Args:
        parameters: what it was drawn with, as Automatic1111 writes it.
    """
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text("Software", _PREVIEW_SOFTWARE)
    if parameters:
        mark.add_itxt("parameters", parameters)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=mark)


def has_preview(lora_path: Path) -> bool:
    """Tell whether a LoRA has a preview of ours, or both of its names are taken by other pictures."""
    paths = _preview_paths(lora_path)
    return any(map(is_our_picture, paths)) or all(path.exists() for path in paths)


def copy_preview(source: Path, target: Path) -> Path | None:
    """Copy the preview of one LoRA beside another, whose own stays; return the copy, or None if there is none."""
    if any(path.exists() for path in _preview_paths(target)):
        return None
    for preview, copy in zip(_preview_paths(source), _preview_paths(target), strict=True):
        if preview.is_file():
            with atomic_path(copy) as temporary:
                shutil.copyfile(preview, temporary)
            return copy
    return None


def _preview_paths(lora_path: Path) -> tuple[Path, Path]:
    return lora_path.with_suffix(".png"), lora_path.with_suffix(".preview.png")


def _free_preview_path(lora_path: Path) -> Path | None:
    return next((path for path in _preview_paths(lora_path) if not path.exists() or is_our_picture(path)), None)


def is_our_picture(path: Path) -> bool:
    """Whether `write_our_picture` wrote the file."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == _PREVIEW_SOFTWARE
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return False
