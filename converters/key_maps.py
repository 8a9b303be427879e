"""Names of LoRA layers: ours (classic, dotted) <-> kohya's and diffusers', both directions from the same tables.

A layer name is a component and a diffusers module path, ``unet.down_blocks.0...attn1.to_q``. kohya writes
``prefix_`` and the path with every dot an underscore, so reading one back needs the words that hold an underscore
themselves; some components moreover go by their first authors' names (SDXL's UNet: ``input_blocks_4_1_...``).
diffusers' and PEFT's names are paths like ours, except that diffusers before 0.20 named an attention's projections its
own way. The tables are the families' (:mod:`lidb_peft.families`).
"""

import re

from lidb_peft.families import FAMILIES, TITLES, Component, Family, get_family
from lidb_peft.naming import clean_module_name, layer_name

_PAIRS = tuple((family, component) for family in FAMILIES.values() for component in family.components)
_BY_PREFIX = {prefix: component.name for _, component in _PAIRS for prefix in component.kohya_prefixes}
_WORDS = frozenset().union(*(component.words for _, component in _PAIRS))
_LONGEST_WORD = max(word.count("_") + 1 for word in _WORDS)

# (ours, theirs) at the end of a path: the projections of diffusers' LoRA attention processors.
OLD_ATTENTION = (
    *((f".{ours}", f".processor.{theirs}") for ours, theirs in
      (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out"))),
    *((f".self_attn.{ours}", f".self_attn.{theirs}") for ours, theirs in
      (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out"))),
)  # fmt: skip


def to_kohya_name(layer: str, family: str) -> str:
    """Return kohya's name of one of our layers, without ``.lora_down.weight``; ``family`` is one of ``FAMILIES``.

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
    if component.role == "text encoder" and not path.startswith(("text_model.", "text_projection")):
        raise ValueError(f"layer {layer} lacks 'text_model.'; without it kohya, A1111 and ComfyUI skip the layer")
    if component.kohya_uses_originals:
        path = _to_original(path, found, component)
    name = path.replace(".", "_")
    if not path or _split_words(name) != path:
        raise ValueError(f"layer {layer} is no module of a {family} model")
    return component.kohya_prefixes[0] + name


def from_kohya_name(name: str) -> str:
    """Return our layer name of a kohya name, in any family's spelling (SDXL's sgm or diffusers names).

    Raises:
        ValueError: the name is none of a known family's LoRA.
    """
    prefix = next((prefix for prefix in _BY_PREFIX if name.startswith(prefix)), None)
    path = None if prefix is None else _split_words(name.removeprefix(prefix))
    if path is None:
        raise ValueError(f"{name} is no layer of a {TITLES} model")
    for family, component in _PAIRS:
        if component.kohya_uses_originals and prefix in component.kohya_prefixes and _is_original(path, component):
            path = _from_original(path, family, component)
            break
    return f"{_BY_PREFIX[prefix]}.{path}"


def to_old_diffusers_name(layer: str) -> str:
    """Return the name before ``_lora.down.weight`` that diffusers < 0.20 gave one of our layers.

    Raises:
        ValueError: the layer is none of an attention's projections, which is all that those files hold.
    """
    for ours, theirs in OLD_ATTENTION:
        if layer.endswith(ours):
            return layer.removesuffix(ours) + theirs
    raise ValueError(f"layer {layer} is no attention projection, which is all that diffusers' old LoRA files hold")


def from_path_name(name: str, component: str) -> str:
    """Return our layer name of a dotted one: diffusers', new or old, or PEFT's; ``component`` is whose model it is in.

    Raises:
        ValueError: the path is none of a known family's model.
    """
    path = clean_module_name(name).removeprefix(f"{component}.")
    path = next((path.removesuffix(theirs) + ours for ours, theirs in OLD_ATTENTION if path.endswith(theirs)), path)
    if not path or not all(word in _WORDS or word.isdecimal() for word in path.split(".")):
        raise ValueError(f"{name} is no layer of a {TITLES} model")
    return layer_name(component, path)


def from_checkpoint_name(name: str) -> tuple[str, ...]:
    """Return the layers whose weight is the tensor ``name`` of a single-file checkpoint of any family.

    Several are stacked along axis 0 (OpenCLIP's q, k, v). Empty for what is no layer's weight that a LoRA could change.
    """
    # Tables of families with one prefix differ in names only that no model has both ways.
    for _, component in _PAIRS:
        for prefix in component.checkpoint_prefixes:
            found = _checkpoint_paths(name.removeprefix(prefix), component) if name.startswith(prefix) else ()
            if found:
                return tuple(layer_name(component.name, path) for path in found)
    return ()


def is_original_name(name: str) -> bool:
    """Whether a kohya name is made of a component's original paths (SDXL's sgm), where kohya has those."""
    return any(
        name.startswith(f"{prefix}{word}_")
        for _, component in _PAIRS
        if component.kohya_uses_originals
        for prefix in component.kohya_prefixes
        for word in _first_words(component)
    )


def _checkpoint_paths(path: str, component: Component) -> tuple[str, ...]:
    """Return our paths of the weight that a component's checkpoint has at ``path``."""
    for ours, original in component.stacked:
        match = re.fullmatch(re.escape(original).replace(r"\{\}", r"(\d+)"), path)
        if match:
            return tuple(template.format(*match.groups()) for template in ours)
    if component.stacked or not path.endswith(".weight"):
        return ()
    path = path.removesuffix(".weight")
    if not component.originals:
        return (path,)
    ours = _replace_prefix(path, component.originals, source=1)
    return () if ours is None else (ours,)


def _is_original(path: str, component: Component) -> bool:
    return path.partition(".")[0] in _first_words(component)


def _first_words(component: Component) -> set[str]:
    return {original.partition(".")[0] for _, original in component.originals}


def _to_original(path: str, family: Family, component: Component) -> str:
    return _known(_replace_prefix(path, component.originals, source=0), path, family, component)


def _from_original(path: str, family: Family, component: Component) -> str:
    return _known(_replace_prefix(path, component.originals, source=1), path, family, component)


def _known(found: str | None, path: str, family: Family, component: Component) -> str:
    if found is None:
        raise ValueError(f"{path} is no module of {family.a1111_version}'s {component.title}")
    return found


def _replace_prefix(path: str, table: tuple[tuple[str, str], ...], source: int) -> str | None:
    for pair in table:
        if path == pair[source] or path.startswith(pair[source] + "."):
            return pair[1 - source] + path.removeprefix(pair[source])
    return None


def _split_words(text: str) -> str | None:
    """Put the dots back: the longest known word first; None when some part is no known word."""
    pieces, words, at = text.split("_"), [], 0
    while at < len(pieces):
        for length in range(min(_LONGEST_WORD, len(pieces) - at), 0, -1):
            word = "_".join(pieces[at : at + length])
            if word in _WORDS or (word.isascii() and word.isdecimal()):
                words.append(word)
                at += length
                break
        else:
            return None
    return ".".join(words)
