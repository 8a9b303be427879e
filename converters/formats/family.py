"""Which base models an adapter is for: by its layers, or by what its metadata says."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lidb_peft.families import FAMILIES, Family, Mark

# What is uncertain tells a newer family from an older one, not the reverse: the older one's is written by default.
_NEWEST_FIRST = tuple(reversed(FAMILIES.values()))


def find_base(layers: Iterable[tuple[str, str, int]], metadata: Mapping[str, str]) -> str:
    """Return the family, another model's own name, or "" where nothing tells.

    Args:
        layers: ``(name, component, in_features)`` of each layer, named as in the file.
    """
    layers = list(layers)
    certain = marked_bases(layers)
    return next(iter(certain), "") or stated_base(metadata) or next(_marked(layers, _NEWEST_FIRST, False), "")


def marked_bases(layers: Iterable[tuple[str, str, int]]) -> list[str]:
    """Return the families of which some layer has a mark that is certain; more than one is none that a model has."""
    return list(_marked(list(layers), FAMILIES.values(), is_certain=True))


def mixed_bases(layers: Iterable[tuple[str, str, int]]) -> str:
    """Return what is wrong with layers of several families, in words; "" if they are not."""
    bases = [FAMILIES[name].title for name in marked_bases(layers)]
    return f"layers of {' and of '.join(bases)}, which no model has both" if len(bases) > 1 else ""


def _marked(layers: Sequence[tuple[str, str, int]], families: Iterable[Family], is_certain: bool) -> Iterator[str]:
    """Yield the families of which some layer has a mark."""
    for family in families:
        marks = [mark for mark in family.marks if mark.is_certain == is_certain]
        if any(_has_mark(mark, *layer) for mark in marks for layer in layers):
            yield family.name


def _has_mark(mark: Mark, name: str, component: str, in_features: int) -> bool:
    return (
        mark.component in ("", component)
        and mark.in_features in (0, in_features)
        and re.search(mark.pattern, name) is not None
    )


def stated_base(metadata: Mapping[str, str]) -> str:
    """Return the family that the metadata names, another model's own name, or ""."""
    for family in _NEWEST_FIRST:
        if any(metadata.get(key, "").startswith(start) for key, start in family.stated_by.items()):
            return family.name
    version, architecture = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    return architecture.partition("/")[0] or version


def shown_base(base: str) -> str:
    """Return a family as A1111 calls it; another model's name as it is."""
    return FAMILIES[base].a1111_version if base in FAMILIES else base
