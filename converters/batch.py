"""Converting many adapters: which file becomes which, and one outcome for each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.convert import is_folder_format, prepare_conversion
from converters.formats.reading import is_adapter_folder
from lidb_peft.outputs import check_not_an_input


@dataclass(frozen=True)
class Outcome:
    """What became of one adapter.

    Args:
        source, target: as planned.
        found: the format of ``source``; "" where nothing was read.
        notes: what the target's format took, see `Conversion`.
        written: files; none in a dry run, or where ``kept`` or ``error``.
        kept: an earlier output was there.
        error: why it could not be converted; None if it could.
    """

    source: Path
    target: Path
    found: str = ""
    notes: tuple[str, ...] = ()
    written: tuple[Path, ...] = ()
    kept: bool = False
    error: Exception | None = None


def plan_batch(sources: Sequence[Path], out: Path, to: str) -> list[tuple[Path, Path]]:
    """Return ``(source, target)`` for each adapter among ``sources``, as `cp` would name them.

    One adapter becomes ``out``, or goes into it if that is a folder; several go into ``out``, those of a folder as they
    lie there.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: there is no adapter in a folder, two would become the same file, or ``out`` is in a source.
    """
    if len(sources) == 1 and _is_adapter(sources[0]) and (not out.is_dir() or is_adapter_folder(out)):
        return [(sources[0], out)]
    check_not_an_input(out, sources, may_hold=True)
    jobs = []
    for source in sources:
        adapters = [source] if _is_adapter(source) else _adapters_below(source)
        if not adapters:
            raise ValueError(f"{source} holds no .safetensors file; name a LoRA, or a folder of LoRAs")
        jobs += [(adapter, out / _target_name(adapter, source, to)) for adapter in adapters]
    by_target: dict[Path, Path] = {}
    for source, target in jobs:
        if target in by_target:
            raise ValueError(f"{by_target[target]} and {source} would both become {target}; convert them apart")
        by_target[target] = source
    return jobs


def convert_batch(
    jobs: Sequence[tuple[Path, Path]], to: str, overwrite: bool = False, dry_run: bool = False, **options: Any
) -> Iterator[Outcome]:
    """Convert each ``(source, target)``; one that fails does not stop the others.

    Args:
        overwrite: replace outputs that are there; else they are kept and nothing is read.
        dry_run: do everything but write.
        options: as `prepare_conversion` takes them.
    """
    for source, target in jobs:
        if not overwrite and (is_adapter_folder(target) if target.is_dir() else target.exists()):
            yield Outcome(source, target, kept=True)
            continue
        try:
            conversion = prepare_conversion(source, target, to, overwrite=overwrite, **options)
            if not dry_run:
                target.parent.mkdir(parents=True, exist_ok=True)
            written = () if dry_run else tuple(conversion.write())
        except (ValueError, OSError) as error:
            yield Outcome(source, target, error=error)
        else:
            yield Outcome(source, target, conversion.found, conversion.notes, written)


def _is_adapter(path: Path) -> bool:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; name a LoRA, or a folder of LoRAs")
    return not path.is_dir() or is_adapter_folder(path)


def _adapters_below(folder: Path) -> list[Path]:
    """Return the adapters in a folder, however deep; an adapter's own folder is one, and not its files."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += [path] if is_adapter_folder(path) else _adapters_below(path)
        elif path.suffix.lower() == ".safetensors":
            found.append(path)
    return found


def _target_name(adapter: Path, source: Path, to: str) -> Path:
    name = adapter.name if adapter.is_dir() else adapter.stem
    folder = Path() if adapter == source else adapter.parent.relative_to(source)
    return folder / (name if is_folder_format(to) else f"{name}.safetensors")
