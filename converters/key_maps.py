"""Names of LoRA layers: ours (classic, dotted) <-> kohya's and diffusers', both directions from the same tables.

A layer name is a component and a diffusers module path, ``unet.down_blocks.0...attn1.to_q``. kohya writes
``prefix_`` and the path with every dot an underscore, so reading one back needs the words that hold an underscore
themselves; some components moreover go by their first authors' names (SDXL's UNet: ``input_blocks_4_1_...``).
diffusers' and PEFT's names are paths like ours, except that diffusers before 0.20 named an attention's projections its
own way. The tables are the families' (:mod:`lidb_peft.families`).
"""

import re
from dataclasses import dataclass
from functools import cache, lru_cache

from lidb_peft.families import FAMILIES, TITLES, Component, Family, get_family
from lidb_peft.naming import clean_module_name, layer_name

_PAIRS = tuple((family, component) for family in FAMILIES.values() for component in family.components)
# What ComfyUI puts before the original paths of a denoiser.
_COMFY_PREFIX = "diffusion_model."

# (ours, theirs) at the end of a path: the projections of diffusers' LoRA attention processors.
OLD_ATTENTION = (
    *((f".{ours}", f".processor.{theirs}") for ours, theirs in
      (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out"))),
    *((f".self_attn.{ours}", f".self_attn.{theirs}") for ours, theirs in
      (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out"))),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where another naming has layers of ours.

    Args:
        name: the module there.
        layers: ours that it is; several are stacked, their rows below each other.
        widths: their numbers of rows, relative to each other.
    """

    name: str
    layers: tuple[str, ...]
    widths: tuple[int, ...] = (1,)


def kohya_place(layer: str, family: str) -> Place:
    """Return where kohya's files for ``family``, one of ``FAMILIES``, have one of our layers.

    Raises:
        ValueError: the family is unknown, or has no such component or module.
    """
    found = get_family(family)
    component_name, _, path = layer.partition(".")
    component = found.component(component_name)
    if component is None:
        raise ValueError(
            f"layer {layer} belongs to {component_name!r}, which {family} does not have; choose the right family"
        )
    if component.level and not path.startswith((component.level, "text_projection")):
        raise ValueError(f"layer {layer} lacks 'text_model.'; without it kohya, A1111 and ComfyUI skip the layer")
    _check_blocks(path, component, layer)
    place = _original_place(path, found, component) if component.kohya_uses_originals else Place(path, (path,))
    name = place.name.replace(".", "_")
    if not path or _split_words(name, component.words) != place.name:
        raise ValueError(f"layer {layer} is no module of a {family} model")
    layers = tuple(f"{component.name}.{path}" for path in place.layers)
    return Place(component.kohya_prefixes[0] + name, layers, place.widths)


def to_kohya_name(layer: str, family: str) -> str:
    """Return kohya's name of one of our layers, without ``.lora_down.weight``; see `kohya_place`."""
    return kohya_place(layer, family).name


def read_kohya_name(name: str) -> Place:
    """Return which layers of ours a kohya name is, in any family's spelling (SDXL's sgm or diffusers names).

    Raises:
        ValueError: the name is none of a known family's LoRA.
    """
    plain: Place | None = None
    for family, component in _PAIRS:
        prefix = next((prefix for prefix in component.kohya_prefixes if name.startswith(prefix)), None)
        path = None if prefix is None else _split_words(name.removeprefix(prefix), component.words)
        if path is None:
            continue
        if component.kohya_uses_originals and _is_original(path, component):
            place = _from_original(path, family, component)
            return Place(name, tuple(f"{component.name}.{path}" for path in place.layers), place.widths)
        if plain is None and _has_blocks(path, component):
            plain = Place(name, (f"{component.name}.{path}",))
    if plain is None:
        raise ValueError(f"{name} is no layer of a {TITLES} model")
    return plain


def from_kohya_name(name: str) -> str:
    """Return our one layer of a kohya name; see `read_kohya_name`.

    Raises:
        ValueError: the name is none of a known family's LoRA, or is several layers of ours.
    """
    layers = read_kohya_name(name).layers
    if len(layers) > 1:
        raise ValueError(f"{name} is {len(layers)} layers, {', '.join(layers)}; read it with read_kohya_name")
    return layers[0]


def component_of_kohya_name(name: str) -> str | None:
    """Return the component that a kohya name is of, by its prefix where its path is unknown; None if that is too."""
    try:
        return read_kohya_name(name).layers[0].partition(".")[0]
    except ValueError:
        known = (part.name for _, part in _PAIRS for prefix in part.kohya_prefixes if name.startswith(prefix))
        return next(known, None)


def component_of_path(path: str) -> str | None:
    """Return the component that a dotted path is of; None if it is of none."""
    return next((component.name for _, component in _PAIRS if re.search(component.path, path)), None)


def to_old_diffusers_name(layer: str) -> str:
    """Return the name before ``_lora.down.weight`` that diffusers < 0.20 gave one of our layers.

    Raises:
        ValueError: the layer is none of an attention's projections, which is all that those files hold.
    """
    for ours, theirs in OLD_ATTENTION:
        if layer.endswith(ours):
            return layer.removesuffix(ours) + theirs
    raise ValueError(f"layer {layer} is no attention projection, which is all that diffusers' old LoRA files hold")


def read_path_name(name: str, component: str) -> Place:
    """Return which layers of ours a dotted name is: diffusers', new or old, PEFT's, or ComfyUI's of original paths.

    Args:
        component: whose model the name is in.

    Raises:
        ValueError: the path is none of a known family's model.
    """
    path = clean_module_name(name).removeprefix(f"{component}.").removeprefix(_COMFY_PREFIX)
    path = next((path.removesuffix(theirs) + ours for ours, theirs in OLD_ATTENTION if path.endswith(theirs)), path)
    for family, found in _named(component):
        if not path or not _are_words(path, found.words):
            continue
        if found.kohya_uses_originals and found.stacked and _is_original(path, found):
            place = _from_original(path, family, found)
            return Place(name, tuple(layer_name(found.name, path) for path in place.layers), place.widths)
        if _has_blocks(path, found):
            return Place(name, (layer_name(component, path),))
    raise ValueError(f"{name} is no layer of a {TITLES} model")


def from_path_name(name: str, component: str) -> str:
    """Return our one layer of a dotted name; see `read_path_name`.

    Raises:
        ValueError: the path is none of a known family's model, or is several layers of ours.
    """
    layers = read_path_name(name, component).layers
    if len(layers) > 1:
        raise ValueError(f"{name} is {len(layers)} layers, {', '.join(layers)}; read it with read_path_name")
    return layers[0]


def read_checkpoint_name(name: str) -> Place | None:
    """Return which layers' weight the tensor ``name`` of a single-file checkpoint of any family is.

    None for what is no layer's weight that a LoRA could change.
    """
    # Tables of families with one prefix differ in names only that no model has both ways.
    for _, component in _PAIRS:
        for prefix in component.checkpoint_prefixes:
            place = _checkpoint_place(name.removeprefix(prefix), component) if name.startswith(prefix) else None
            if place is not None:
                return Place(name, tuple(layer_name(component.name, path) for path in place.layers), place.widths)
    return None


def from_checkpoint_name(name: str) -> tuple[str, ...]:
    """Return the layers that `read_checkpoint_name` finds, () if none."""
    place = read_checkpoint_name(name)
    return () if place is None else place.layers


def is_original_name(name: str) -> bool:
    """Whether a kohya name is made of a component's original paths (SDXL's sgm), where kohya has those."""
    return any(
        name.startswith(f"{prefix}{word}_")
        for _, component in _PAIRS
        if component.kohya_uses_originals
        for prefix in component.kohya_prefixes
        for word in _first_words(component)
    )


def _named(component: str) -> tuple[tuple[Family, Component], ...]:
    """Components of that name; all of them if there is none, because a model saved by itself does not say its name."""
    return tuple(pair for pair in _PAIRS if pair[1].name == component) or _PAIRS


def _checkpoint_place(path: str, component: Component) -> Place | None:
    """Return our paths of the weight that a component's checkpoint has at ``path``."""
    found = _unstacked(path, component) or _unstacked(path.removesuffix(".weight"), component)
    if found is not None or component.stacked or not path.endswith(".weight"):
        return found
    path = path.removesuffix(".weight")
    ours = _replace_prefix(path, component.originals, source=1) if component.originals else path
    return None if ours is None else Place(path, (ours,))


def _is_original(path: str, component: Component) -> bool:
    return path.partition(".")[0] in _first_words(component)


@lru_cache
def _first_words_of(originals: tuple[str, ...]) -> frozenset[str]:
    return frozenset(original.partition(".")[0] for original in originals)


def _first_words(component: Component) -> frozenset[str]:
    stacked = (found.original for found in component.stacked)
    return _first_words_of((*(original for _, original in component.originals), *stacked))


def _original_place(path: str, family: Family, component: Component) -> Place:
    """Return where the first authors' model has our path."""
    original = _replace_prefix(path, component.originals, source=0)
    if original is not None:
        return Place(original, (path,))
    for found in component.stacked:
        for template in found.ours:
            numbers = _numbers(template, path)
            if numbers is not None:
                ours = tuple(other.format(*numbers) for other in found.ours)
                return Place(found.original.format(*numbers), ours, found.widths or (1,) * len(ours))
    raise ValueError(f"{path} is no module of {family.a1111_version}'s {component.title}")


def _from_original(path: str, family: Family, component: Component) -> Place:
    """Return our paths of what the first authors' model has at ``path``."""
    ours = _replace_prefix(path, component.originals, source=1)
    place = _unstacked(path, component) if ours is None else Place(path, (ours,))
    if place is None or not _has_blocks(place.layers[0], component):
        raise ValueError(f"{path} is no module of {family.a1111_version}'s {component.title}")
    return place


def _unstacked(path: str, component: Component) -> Place | None:
    for found in component.stacked:
        numbers = _numbers(found.original, path)
        if numbers is not None:
            ours = tuple(template.format(*numbers) for template in found.ours)
            return Place(path, ours, found.widths or (1,) * len(ours))
    return None


def _numbers(template: str, path: str) -> tuple[str, ...] | None:
    """Return what a path has for the ``{}`` of a template; None if it is another path."""
    match = _pattern(template).fullmatch(path)
    return None if match is None else match.groups()


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))


def _has_blocks(path: str, component: Component) -> bool:
    """Whether the published model has as many blocks as a path says."""
    first, _, rest = path.partition(".")
    number = rest.partition(".")[0]
    return not number.isdecimal() or int(number) < component.num_blocks.get(first, int(number) + 1)


def _check_blocks(path: str, component: Component, layer: str) -> None:
    if not _has_blocks(path, component):
        first = path.partition(".")[0]
        raise ValueError(f"layer {layer} is beyond the {component.num_blocks[first]} {first} that the model has")


def _replace_prefix(path: str, table: tuple[tuple[str, str], ...], source: int) -> str | None:
    for pair in table:
        if path == pair[source] or path.startswith(pair[source] + "."):
            return pair[1 - source] + path.removeprefix(pair[source])
    return None


def _are_words(path: str, words: frozenset[str]) -> bool:
    return all(word in words or word.isdecimal() for word in path.split("."))


def _split_words(text: str, known: frozenset[str]) -> str | None:
    """Put the dots back: the longest known word first; None when some part is no known word."""
    pieces, words, at = text.split("_"), [], 0
    longest = _longest(known)
    while at < len(pieces):
        for length in range(min(longest, len(pieces) - at), 0, -1):
            word = "_".join(pieces[at : at + length])
            if word in known or (word.isascii() and word.isdecimal()):
                words.append(word)
                at += length
                break
        else:
            return None
    return ".".join(words)


@lru_cache
def _longest(words: frozenset[str]) -> int:
    return max(word.count("_") + 1 for word in words)
