"""Detecting the base model family of an adapter, from its layers or its metadata."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from converters.shapes import has_layer
from lidb_peft.families import DENOISERS, FAMILIES, Family, Mark

# Name in the file, our layer name or "" if unknown, input width or 0 if unknown.
Layer = tuple[str, str, int]
# An uncertain statement counts for a newer family, not for an older one, whose value programs write by default.
_NEWEST_FIRST = tuple(reversed(FAMILIES.values()))
_STATING = ("ss_base_model_version", "modelspec.architecture")
_REFINER = "stable-diffusion-xl-v1-refiner"
_SD3 = "stable-diffusion-3"
OTHER_MODELS = frozenset({_REFINER, _SD3})
"""Models outside the families whose modules have the names of a family's, with other widths."""
# Model -> (our layer name, its input widths), which no published model of a family has.
_OTHER_LAYERS = {
    # It is conditioned on OpenCLIP's bigG alone, and its levels with attention are 768 and 1536 wide.
    _REFINER: ((re.compile(r"attn2\.to_[kv]$"), {1280}), (re.compile(r"attn1\.to_[qkv]$"), {768, 1536})),
    # Its blocks have the names of FLUX's double ones, which are 3072 wide.
    _SD3: ((re.compile(r"transformer\.transformer_blocks\.\d+\.attn\."), {1536, 2432}),),
}


def find_base(layers: Iterable[Layer], metadata: Mapping[str, str]) -> str:
    """Return the family, another model's own name, or "" if unknown.

    Detected from names, by the depth of attention blocks and the blocks that exist; then from widths, such as those of
    cross-attention; then from the metadata.
    """
    layers = list(layers)
    fitting = _fitting(layers)
    other = next((model for model, marks in _OTHER_LAYERS.items() if _has_any(layers, marks)), "")
    if not other and _could_be_sd3(layers, metadata):
        other = _SD3
    if other:
        return other
    certain = marked_bases(layers)
    if certain:
        return certain[0]
    if _states_refiner(metadata):
        return _REFINER
    of_width = [family for family in fitting if _has_widths(layers, family)] or fitting
    if len(of_width) == 1:
        return of_width[0].name
    stated = stated_base(metadata)
    if stated:
        return stated
    families = of_width or FAMILIES.values()
    return next(_marked(layers, [family for family in _NEWEST_FIRST if family in families], is_certain=False), "")


def marked_bases(layers: Iterable[Layer]) -> list[str]:
    """Return the families for which some layer has a certain mark; more than one means that no model fits.

    A width takes precedence over a spelling, which other families may share.
    """
    layers = list(layers)
    fitting = _fitting(layers)
    by_width = list(_marked(layers, fitting, is_certain=True, has_width=True))
    return by_width or list(_marked(layers, fitting, True)) or list(_marked(layers, FAMILIES.values(), True))


def mixed_bases(layers: Iterable[Layer]) -> str:
    """Return what is wrong with layers of several families, in words; "" if they are not."""
    bases = [FAMILIES[name].title for name in marked_bases(layers)]
    return f"layers of {' and of '.join(bases)}, which no model has both" if len(bases) > 1 else ""


def _fitting(layers: Sequence[Layer]) -> list[Family]:
    """The families that have all of the recognised layers."""
    return [
        family for family in FAMILIES.values() if all(has_layer(ours, family.name) for _, ours, _ in layers if ours)
    ]


def _states_refiner(metadata: Mapping[str, str]) -> bool:
    return any(metadata.get(key, "").startswith(("sdxl_refiner", _REFINER)) for key in _STATING)


def _has_any(layers: Iterable[Layer], marks: Iterable[tuple[re.Pattern[str], set[int]]]) -> bool:
    return any(pattern.search(ours) and width in widths for _, ours, width in layers for pattern, widths in marks)


def _could_be_sd3(layers: Iterable[Layer], metadata: Mapping[str, str]) -> bool:
    """Whether a LoRA could equally be diffusers' for Stable Diffusion 3: attention in blocks that both models have.

    Unknown widths, and metadata that name no family, do not count for our family: misreading would lose data.
    """
    own = [(name, ours, width) for name, ours, width in layers if ours.partition(".")[0] in DENOISERS]
    shared = re.compile(r"[^.]+\.transformer_blocks\.\d+\.(attn|ff|ff_context|norm1|norm1_context)\.")
    if not own or not all(shared.match(ours) and "double_blocks" not in name for name, ours, _ in own):
        return False
    published = {width for family in FAMILIES.values() for width, _ in family.shapes.values()}
    attentions = {width for _, ours, width in own if ".attn." in ours}
    return bool(attentions) and not attentions & published and stated_base(metadata) not in FAMILIES


def _has_widths(layers: Sequence[Layer], family: Family) -> bool:
    """Whether the family's attention projections have the input widths of those among the layers."""
    shapes = family.shapes
    return all(shapes[ours][0] == width for _, ours, width in layers if ours in shapes)


def _marked(
    layers: Sequence[Layer], families: Iterable[Family], is_certain: bool, has_width: bool = False
) -> Iterator[str]:
    """Yield the families for which some layer has a mark; ``has_width`` accepts only marks with a width."""
    for family in families:
        marks = [mark for mark in family.marks if mark.is_certain == is_certain and (mark.in_features or not has_width)]
        if any(_has_mark(mark, *layer) for mark in marks for layer in layers):
            yield family.name


def _has_mark(mark: Mark, name: str, ours: str, in_features: int) -> bool:
    return (
        mark.component in ("", ours.partition(".")[0])
        and mark.in_features in (0, in_features)
        and re.search(mark.pattern, name) is not None
    )


def stated_base(metadata: Mapping[str, str]) -> str:
    """Return the family that the metadata names, another model's own name, or ""."""
    version, architecture = metadata.get("ss_base_model_version", ""), metadata.get("modelspec.architecture", "")
    if _states_refiner(metadata):
        return _REFINER
    for family in _NEWEST_FIRST:
        if any(metadata.get(key, "").startswith(start) for key, start in family.stated_by.items()):
            return family.name
    return architecture.partition("/")[0] or version


def shown_base(base: str) -> str:
    """Return A1111's name of a family; another model's name unchanged."""
    return FAMILIES[base].a1111_version if base in FAMILIES else base
