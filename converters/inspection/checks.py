"""Problems of a LoRA file, as text: what makes readers skip layers, scale them wrongly or hide the file."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from converters.formats.family import shown_base, stated_base
from converters.formats.layout import Layout
from converters.inspection.facts import ModuleFacts
from converters.key_maps import is_original_name
from converters.shapes import kernel_side
from lidb_peft.families import DENOISERS, FAMILIES, TEXT_ENCODERS
from lidb_peft.safe_read import count, examples, printable

# What A1111 tells apart.
_A1111_VERSIONS = ("SD1", "SD2", "SDXL")
_FUSED_QKVO = ("q_proj", "k_proj", "v_proj", "out_proj")


def find_warnings(
    layout: Layout, modules: Sequence[ModuleFacts], metadata: Mapping[str, str], base: str, sd_version: str = ""
) -> list[str]:
    """Return one sentence for each thing that a reader of the file, made for ``base``, would stumble over.

    ``sd_version`` is what the sidecar says, which A1111 heeds before the metadata.
    """
    found = [*_value_warnings(modules), *_scale_warnings(layout, modules)]
    if layout.style == "kohya":
        found += [*_kohya_warnings(modules, base), *_diffusers_warnings(modules, base)]
    if base in FAMILIES and layout.style != "PEFT":
        found += _a1111_warnings(metadata, base, sd_version)
    name = metadata.get("ss_output_name", "")
    if set(name) & set("<>:/\\") or not name.isprintable():
        found.append(f"ss_output_name is {printable(repr(name))}, which is no name for <lora:name:1>, nor for a file")
    stated = stated_base(metadata)
    if stated and base != stated:
        found.append(f"its layers are {shown_base(base)}'s but its metadata says {shown_base(stated)}")
    if layout.unknown:
        found.append(f"{count(layout.unknown, 'tensor')} of unknown meaning: {examples(layout.unknown)}")
    return found


def _value_warnings(modules: Sequence[ModuleFacts]) -> Iterator[str]:
    bad = [module.name for module in modules if module.has_non_finite]
    if bad:
        yield f"{count(bad, 'layer')} with NaN or infinity, which makes black pictures: {examples(bad)}"
    if modules and all(module.is_zero for module in modules):  # some are common: a text encoder that was not trained
        yield "every layer changes nothing (all zeros)"
    partial = [module.name for module in modules if not module.is_complete]
    if partial:
        yield f"{count(partial, 'layer')} with only one of lora_A and lora_B: {examples(partial)}"


def _scale_warnings(layout: Layout, modules: Sequence[ModuleFacts]) -> Iterator[str]:
    """Alphas and ranks that readers take differently."""
    without = [module.name for module in modules if module.alpha is None and module.rank]
    if layout.style == "kohya" and without:
        yield f"{count(without, 'layer')} without alpha, which is read as scale 1: {examples(without)}"
    odd = [module.name for module in modules if module.alpha is not None and not _is_usable(module.alpha)]
    if odd:
        yield f"{count(odd, 'layer')} with alpha 0 or not finite, which readers take differently: {examples(odd)}"
    contradicted = [module.config_error for module in modules if module.config_error]
    if contradicted:
        yield f"{count(contradicted, 'layer')} at odds with PEFT's config: {examples(contradicted[:1])}"
    shaped = [module.name for module in modules if not module.alpha_is_scalar]
    if shaped:
        yield f"{count(shaped, 'layer')} whose alpha is not 0-d, on which kohya fails: {examples(shaped)}"


def _kohya_warnings(modules: Sequence[ModuleFacts], base: str) -> Iterator[str]:
    """Names and metadata that kohya, A1111 or ComfyUI miss without a word."""
    family = FAMILIES.get(base)
    others = {part.name for part in family.text_encoders if not part.level} if family else set()
    clip = [module.name for module in modules if module.component in TEXT_ENCODERS and module.component not in others]
    bare = [name for name in clip if "_text_model_" not in name and "text_projection" not in name]
    if bare:
        yield (
            f"{count(bare, 'text-encoder layer')} without 'text_model_', which kohya, A1111 and ComfyUI skip:"
            f" {examples(bare)}"
        )
    for component in family.components if family else ():
        written, *also_read = component.kohya_prefixes
        for prefix in also_read:
            odd = [name for name in clip if name.startswith(prefix)]
            if odd:
                where = f"named {prefix} in a LoRA of {shown_base(base)}"
                yield f"{count(odd, 'layer')} {where}, which kohya drops: they must be {written}"
    denoiser = [module.name for module in modules if module.component in DENOISERS]
    if len({is_original_name(name) for name in denoiser if "_blocks_" in name or "_block_" in name}) > 1:
        yield "UNet layers in both diffusers' and sgm's spelling: diffusers drops the latter"
    split = _split_attentions(clip, base)
    if split:
        yield (
            f"{count(split, 'attention')} without all of q, k, v and out, whose layers A1111 skips in OpenCLIP:"
            f" {examples(split)}"
        )


def _a1111_warnings(metadata: Mapping[str, str], base: str, sd_version: str) -> Iterator[str]:
    """Whether A1111 hides the file from the models that it is for; a file that says nothing at all is always shown."""
    version = metadata.get("ss_base_model_version", "")
    seen = "SDXL" if version.startswith("sdxl_") else "SD2" if metadata.get("ss_v2") == "True" else "SD1"
    own = FAMILIES[base].a1111_version
    seen = sd_version if sd_version in _A1111_VERSIONS else seen
    if (metadata or sd_version in _A1111_VERSIONS) and own in _A1111_VERSIONS and own != seen:
        yield f"A1111 takes it for {seen} and hides it from {own} models: its metadata lack what says {own}"


def _diffusers_warnings(modules: Sequence[ModuleFacts], base: str) -> Iterator[str]:
    """What diffusers (0.42, run) does not load, or applies wrongly.

    It fills its modules, which factors of other dimensions do not fit; and it heeds alphas of their own but for
    attentions and text encoders.
    """
    known = [module for module in modules if module.layer and module.rank] if base in FAMILIES else []
    sides = {module.name: kernel_side(module.layer, base) for module in known}
    odd = [module.name for module in known if sides[module.name] is not None and module.num_dims in (2, 4)
           and (module.num_dims == 4) != bool(sides[module.name])]  # fmt: skip
    if odd:
        yield (
            f"{count(odd, 'layer')} with factors of other dimensions than diffusers' modules have (convolutions 1x1 for"
            f" linear layers, or the reverse), which it does not load: hdb convert --to diffusers: {examples(odd)}"
        )
    for component in dict.fromkeys(module.component for module in modules):
        own = [module for module in modules if module.component == component and module.layer]
        alphas = Counter(module.alpha for module in own if module.alpha is not None)
        if not alphas:
            continue
        ((common, _),) = alphas.most_common(1)
        wrong = [
            module.name
            for module in own
            if (module.alpha is None and module.rank != common)
            or (module.alpha not in (None, common) and (component in TEXT_ENCODERS or ".attn" in module.layer))
        ]
        if wrong:
            yield (
                f"{count(wrong, 'layer')} of the {component} without the alpha that most have, {common:g}, with which"
                f" diffusers applies them: convert it to diffusers' own format: {examples(wrong)}"
            )


def _split_attentions(clip: Sequence[str], base: str) -> list[str]:
    """Names of OpenCLIP attentions (SD2's encoder, SDXL's second) that lack one of the four projections."""
    family = FAMILIES.get(base)
    stacked = [component for component in family.text_encoders if component.stacked] if family else []
    prefixes = tuple(prefix for component in stacked for prefix in component.kohya_prefixes)
    groups: dict[str, set[str]] = {}
    for name in clip:
        projection = next((projection for projection in _FUSED_QKVO if name.endswith("_" + projection)), None)
        if projection and name.startswith(prefixes):
            groups.setdefault(name.removesuffix("_" + projection), set()).add(projection)
    return [name for name, present in groups.items() if len(present) < len(_FUSED_QKVO)]


def _is_usable(alpha: float) -> bool:
    return alpha != 0 and math.isfinite(alpha)
