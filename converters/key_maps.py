"""Names of LoRA layers: ours (classic, dotted) <-> kohya's and diffusers', both directions from the same tables.

A layer name is a component and a diffusers module path, ``unet.down_blocks.0...attn1.to_q``. kohya writes
``prefix_`` and the path with every dot an underscore, so reading one back needs the words that hold an underscore
themselves; some components moreover go by their first authors' names (SDXL's UNet: ``input_blocks_4_1_...``).
diffusers' and PEFT's names are paths like ours, except that diffusers before 0.20 named an attention's projections its
own way; ComfyUI's and OneTrainer's are the first authors' paths. The tables are the families'
(:mod:`lidb_peft.families`).
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache

from lidb_peft.families import FAMILIES, TITLES, Component, Family, get_family
from lidb_peft.naming import clean_module_name, layer_name

_PAIRS = tuple((family, component) for family in FAMILIES.values() for component in family.components)
# What trainers put around a model: PEFT, DistributedDataParallel, torch.compile, FSDP, DeepSpeed.
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.")
# Whose names begin so, as dotted paths; kohya's prefixes too, because some tools write them so.
_PATH_PREFIXES = tuple(
    (prefix, component.name)
    for _, component in _PAIRS
    for prefix in (f"{component.name}.", *component.path_prefixes, *(f"{p[:-1]}." for p in component.kohya_prefixes))
)

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
        raise ValueError(f"layer {layer} is not a module of a {family} model")
    layers = tuple(f"{component.name}.{path}" for path in place.layers)
    return Place(component.kohya_prefixes[0] + name, layers, place.widths)


def to_kohya_name(layer: str, family: str) -> str:
    """Return kohya's name of one of our layers, without ``.lora_down.weight``; see `kohya_place`."""
    return kohya_place(layer, family).name


@lru_cache(maxsize=10_000)
def read_kohya_name(name: str) -> Place:
    """Return which layers of ours a kohya name is, in any family's spelling (the first authors' names or diffusers').

    Raises:
        ValueError: the name is none of a known family's LoRA.
    """
    candidates = [(len(prefix), component) for _, component in _PAIRS for prefix in component.kohya_prefixes
                  if name.startswith(prefix)]  # fmt: skip
    for length, component in sorted(candidates, key=lambda candidate: -candidate[0]):
        path = _split_words(name[length:], component.words)
        place = None if path is None else _read_path(path, component)
        if place is not None:
            return Place(name, tuple(f"{component.name}.{path}" for path in place.layers), place.widths)
    raise ValueError(f"{name} is not a layer of a {TITLES} model")


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
    return next((component.name for _, component in _PAIRS
                 if re.search(component.path, path) or _read_path(path, component)), None)  # fmt: skip


def to_old_diffusers_name(layer: str) -> str:
    """Return the name before ``_lora.down.weight`` that diffusers < 0.20 gave one of our layers.

    Raises:
        ValueError: the layer is none of an attention's projections, which is all that those files hold.
    """
    for ours, theirs in OLD_ATTENTION:
        if layer.endswith(ours):
            return layer.removesuffix(ours) + theirs
    raise ValueError(f"layer {layer} is not an attention projection, which is all that diffusers' old LoRA files hold")


@lru_cache(maxsize=10_000)
def read_path_name(name: str, component: str = "") -> Place:
    """Return which layers of ours a dotted name is: diffusers', new or old, PEFT's, ComfyUI's, in whatever wrapping.

    Args:
        component: whose model it is in, where the name does not say.

    Raises:
        ValueError: the path is none of a known family's model.
    """
    named, path = split_path_name(name)
    # ComfyUI calls every denoiser by one name, so the path has to tell whose it is.
    owners = {
        owner for prefix, owner in _PATH_PREFIXES if named and _unwrapped(clean_module_name(name)).startswith(prefix)
    }
    for _, candidate in _PAIRS:
        if candidate.name in (owners or {component or candidate.name}):
            place = _read_path(path, candidate)
            if place is not None:
                return Place(name, tuple(f"{candidate.name}.{path}" for path in place.layers), place.widths)
    raise ValueError(f"{name} is not a layer of a {TITLES} model")


def split_path_name(name: str) -> tuple[str, str]:
    """Return the component that a dotted name begins with, "" if none, and the path without it and any wrapper."""
    path = _unwrapped(clean_module_name(name))
    fitting = [(len(prefix), component) for prefix, component in _PATH_PREFIXES if path.startswith(prefix)]
    if not fitting:
        return "", path
    length, component = max(fitting, key=lambda found: found[0])
    return component, _unwrapped(path[length:])


def from_path_name(name: str, component: str = "") -> str:
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


@lru_cache(maxsize=10_000)
def block_name(layer: str, family: str) -> str:
    """Return what block weights and statistics call the block of one of our layers, ``IN04``; "" if it is in none."""
    found = get_family(family)
    name, _, path = layer.removesuffix(".bias").partition(".")
    component = found.component(name)
    if component is None:
        return ""
    with suppress(ValueError):  # a text encoder, which is one block, goes by our paths too
        path = _original_place(path, found, component).name
    for pattern, form in component.block_names:
        match = re.match(pattern, path)
        if match:
            return form.format(*map(int, match.groups()))
    return ""


def is_original_name(name: str) -> bool:
    """Whether a kohya name is made of a component's original paths (SDXL's sgm), where kohya has those."""
    return any(
        name.startswith(f"{prefix}{word}_")
        for _, component in _PAIRS
        if component.kohya_uses_originals
        for prefix in component.kohya_prefixes
        for word in _first_words(component)
    )


def is_transposed(name: str) -> bool:
    """Whether a single-file checkpoint has the tensor ``name`` transposed, as OpenCLIP has its projection."""
    return any(name == prefix + original for _, component in _PAIRS for prefix in component.checkpoint_prefixes
               for _, original in component.transposed)  # fmt: skip


def _unwrapped(path: str) -> str:
    while path.startswith(_WRAPPERS):
        path = next(path.removeprefix(wrapper) for wrapper in _WRAPPERS if path.startswith(wrapper))
    return path


def _read_path(path: str, component: Component) -> Place | None:
    """Return our paths of a component's module, whoever named it; None if it is not a module of it."""
    if component.level:
        path = path.removeprefix(component.level)
        path = path if path.startswith("text_projection") else component.level + path
    path = next((path.removesuffix(theirs) + ours for ours, theirs in OLD_ATTENTION if path.endswith(theirs)), path)
    if is_module(path, component):
        return Place(path, (path,))
    # Tables of families with one name of a component differ in names only that no model has both ways.
    for _, other in _PAIRS:
        if other.name == component.name:
            ours = _replace_prefix(path, other.originals, source=1)
            place = _unstacked(path, other) if ours is None else Place(path, (ours,))
            if place is not None and is_module(place.layers[0], component):
                return place
    return None


def is_module(path: str, component: Component) -> bool:
    """Whether a path is one of ours in a component, and not its first authors'."""
    if component.modules:
        return re.fullmatch(component.modules, path) is not None
    is_ours = not component.kohya_uses_originals or not _is_original(path, component)
    return bool(path) and is_ours and _are_words(path, component.words) and _has_blocks(path, component)


def _checkpoint_place(path: str, component: Component) -> Place | None:
    """Return our paths of the weight that a component's checkpoint has at ``path``."""
    turned = next((ours for ours, original in component.transposed if path == original), None)
    if turned is not None:
        return Place(path, (turned,))
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
    raise ValueError(f"{path} is not a module of {family.a1111_version}'s {component.title}")


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
