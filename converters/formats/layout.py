"""Assigning the tensors of an adapter file to layers, for every layout in use: kohya, diffusers old and new, PEFT.

Only names are considered here; the contents are described by :mod:`converters.inspection.describe`.
"""

import re
from dataclasses import dataclass, field

from converters.key_maps import component_of_kohya_name, component_of_path, split_path_name

# Endings of a layer's tensor names in each format, for writing and reading.
SPELLINGS = {
    "kohya": {"lora_A": ".lora_down.weight", "lora_B": ".lora_up.weight", "alpha": ".alpha", "dora": ".dora_scale"},
    "diffusers": {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "dora": ".lora_magnitude_vector"},
    "diffusers-old": {"lora_A": "_lora.down.weight", "lora_B": "_lora.up.weight"},
    "diffusers-old text encoder": {
        "lora_A": ".lora_linear_layer.down.weight",
        "lora_B": ".lora_linear_layer.up.weight",
    },
}
# Ending of tensor names -> role; the longest match counts.
ENDINGS = {
    **{ending: role for spelling in SPELLINGS.values() for role, ending in spelling.items()},
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".lora_layer.down.weight": "lora_A",
    ".lora_layer.up.weight": "lora_B",
    ".lora_A": "lora_A",
    ".lora_B": "lora_B",
    "_lora.alpha": "alpha",
    ".lora_embedding_A": "token lora_A",
    ".lora_embedding_B": "token lora_B",
    ".lora_magnitude_vector.weight": "dora",
    ".lora_mid.weight": "mid",
    **{f".{name}": name for name in ("diff", "diff_b", "w_norm", "b_norm")},
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    **dict.fromkeys((".oft_blocks", ".oft_diag", ".oft_R.weight"), "oft"),
    **{f".{part}.weight": f"glora_{part}" for part in ("a1", "a2", "b1", "b2")},
    ".on_input": "ia3",
    ".lidb_down": "lidb",
    ".lidb_up": "lidb",
}
# Prefix of a role -> algorithm; the first one in a file counts.
_ALGORITHMS = {"hada": "LoHa", "lokr": "LoKr", "oft": "OFT", "glora": "GLoRA", "ia3": "(IA)^3", "lidb": "LiDB",
               "dora": "DoRA", "diff": "full difference", "w_norm": "full difference",
               "b_norm": "full difference"}  # fmt: skip
# The adapter name, which is part of tensor names in PEFT's models but not in its files.
_ADAPTER = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.([^.]+)(\.weight)?$")
STYLES = ("kohya", "PEFT", "ComfyUI", "diffusers")
# Endings of names without an adapter name, which are most names.
_WHOLE = (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight")
# LiDB's bases, or their fingerprints; layers share them.
BASIS_START = "lidb_basis."
EMBEDDING_START = "bundle_emb."
# Part after the last dot of a name -> possible endings, the longest first.
_BY_LAST_WORD: dict[str, list[str]] = {}
for _ending in sorted(ENDINGS, key=len, reverse=True):
    _BY_LAST_WORD.setdefault(_ending.rpartition(".")[2], []).append(_ending)

_COMFY_STARTS = ("diffusion_model.", "text_encoders.")


@dataclass
class AdapterModule:
    """One adapted layer: its name in the file, and role (``lora_A``, ``lora_B``, ``alpha`` ...) -> tensor names."""

    name: str
    component: str
    parts: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Layout:
    """The layout of a file.

    Args:
        style: one of ``STYLES``, or ``""`` if none is detected.
        algorithm: ``LoRA`` or another one that some of its layers have.
        modules: name of a module in the file -> its parts.
        embeddings: names of tensors of textual inversions.
        adapters: PEFT's adapter names; a model may hold several.
        unknown: names that fit no layout.
    """

    style: str
    algorithm: str
    modules: dict[str, AdapterModule]
    embeddings: list[str]
    adapters: list[str]
    unknown: list[str]


def read_layout(names: list[str]) -> Layout:
    """Sort a file's tensor names into layers; names that fit no layout are listed in ``unknown``."""
    layout = Layout("", "", {}, [], [], [])
    styles = set()
    for name in names:
        if name.removeprefix("base_model.model.").startswith(BASIS_START):
            continue
        if name.startswith(EMBEDDING_START):
            layout.embeddings.append(name)
            continue
        plain, adapter = _without_adapter(name)
        endings = _BY_LAST_WORD.get(plain.rpartition(".")[2], ())
        ending = next((ending for ending in endings if plain.endswith(ending)), None)
        module = plain.removesuffix(ending) if ending else ""
        if ending is None or not module:
            layout.unknown.append(name)
            continue
        if adapter and adapter not in layout.adapters:
            layout.adapters.append(adapter)
        style, component = _style_and_component(module)
        styles.add(style)
        entry = layout.modules.setdefault(module, AdapterModule(module, component))
        entry.parts.setdefault(ENDINGS[ending], []).append(name)
    layout.style = next((style for style in STYLES if style in styles), "")
    layout.algorithm = _algorithm(layout.modules)
    return layout


def _without_adapter(name: str) -> tuple[str, str]:
    """Return a tensor's name as PEFT's files have it, and the adapter's name that was in it, "" if none was."""
    match = _ADAPTER.search(name) if ".lora_" in name and not name.endswith(_WHOLE) else None
    if match is None or match[2] in ("weight", "bias"):
        return name, ""
    return name[: match.start()] + match[1] + (match[3] or ""), match[2]


def _style_and_component(module: str) -> tuple[str, str]:
    prefix = re.match(r"(?:lora|lycoris)_([a-z]+\d?)_", module)
    if prefix and "." not in module:
        return "kohya", component_of_kohya_name(module) or prefix[1]
    component, path = split_path_name(module)
    component = component or component_of_path(path) or "model"
    if module.startswith("base_model."):
        return "PEFT", component
    return "ComfyUI" if module.startswith(_COMFY_STARTS) else "diffusers", component


def _algorithm(modules: dict[str, AdapterModule]) -> str:
    roles = {role for module in modules.values() for role in module.parts}
    found = (name for start, name in _ALGORITHMS.items() if any(role.startswith(start) for role in roles))
    return next(found, "LoRA" if roles & {"lora_A", "lora_B"} else "")
