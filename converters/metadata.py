"""What a LoRA file says about itself: kohya's ``ss_*`` keys, ModelSpec and hashes.

kohya and A1111 read ``ss_*``; ModelSpec is the Stability AI standard that newer tools show.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lidb_peft.families import FAMILIES, get_family
from lidb_peft.files import Tensors, header_bytes, tensor_infos
from lidb_peft.safe_read import Header

# ModelSpec's names of diffusers' prediction types; it has none for flow matching.
_PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}
# What kohya's older hash is of: 64 KB from 1 MB on.
_LEGACY_BYTES = range(0x100000, 0x110000)


@dataclass(frozen=True)
class KohyaMetadata:
    """What a LoRA file should tell its readers; all of it optional but the family of the base model.

    Args:
        family: name of one of ``lidb_peft.families``; A1111 hides a LoRA whose family is not the loaded model's.
        v_prediction: the base model predicts v (Stable Diffusion 2 at 768); None where that is not known, which then
            leaves out what would tell it, and the resolution.
        output_name: the ``name`` of A1111's ``<lora:name:1>``; the file's own name when empty.
        trigger: activation text, e.g. ``a sks face``.
        base_model_name: the checkpoint it was trained on.
        resolution_px: side of the training pictures; the family's own when 0.
        num_photos: photos it was trained on.
        title, author, description, license, date: free text for ModelSpec; ``date`` in ISO 8601.
        preferred_weight: strength that A1111 inserts; 0 leaves it to the user's setting.
        extra: further keys, written as they are.
    """

    family: str = next(iter(FAMILIES))
    v_prediction: bool | None = False
    output_name: str = ""
    trigger: str = ""
    base_model_name: str = ""
    resolution_px: int = 0
    num_photos: int = 0
    title: str = ""
    author: str = ""
    description: str = ""
    license: str = ""
    date: str = ""
    preferred_weight: float = 1.0
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        get_family(self.family)
        if set(self.output_name) & set("<>:"):
            raise ValueError(
                f"output_name is {self.output_name!r}; leave out < > and :, which <lora:name:1> cannot hold"
            )
        reserved = sorted(key for key in self.extra if key.startswith(("ss_", "sshs_", "modelspec.", "__")))
        if reserved:
            raise ValueError(f"extra holds {', '.join(reserved)}, which the file's own fields set; choose other names")
        if not all(isinstance(value, str) for pair in self.extra.items() for value in pair):
            raise ValueError("extra must map text to text; convert its numbers with str()")


def build_metadata(metadata: KohyaMetadata, file_stem: str, rank: int) -> dict[str, str]:
    """Return the text-to-text metadata of a file of one ``rank`` and alpha = rank, hashes not included."""
    family = get_family(metadata.family)
    version = family.version("v_prediction" if metadata.v_prediction else "")
    name = metadata.output_name or "".join("_" if character in "<>:" else character for character in file_stem)
    is_known = metadata.v_prediction is not None
    # Where the family's models have one name, whatever they predict, the name is told all the same.
    is_named = is_known or len({version.architecture for version in family.versions}) == 1
    side = metadata.resolution_px or (version.size_px if is_known else 0)
    entries = {
        "ss_output_name": name,
        **family.metadata,
        "ss_base_model_version": version.base_version if is_named else "",
        "ss_network_module": family.network_module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": "{}",
        "ss_resolution": f"({side}, {side})" if side else "",
        "ss_sd_model_name": metadata.base_model_name,
        "ss_num_train_images": str(metadata.num_photos) if metadata.num_photos else "",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{version.architecture}/lora" if is_named else "",
        "modelspec.implementation": family.implementation,
        "modelspec.title": metadata.title or name,
        "modelspec.resolution": f"{side}x{side}" if side else "",
        "modelspec.prediction_type": _PREDICTION_TYPES.get(version.prediction_type, "") if is_known else "",
        "modelspec.author": metadata.author,
        "modelspec.description": metadata.description,
        "modelspec.license": metadata.license,
        "modelspec.date": metadata.date,
        **trigger_entries(metadata.trigger, metadata.num_photos),
        **metadata.extra,
    }
    return {key: value for key, value in entries.items() if value}


def stated_v_prediction(metadata: Mapping[str, str]) -> bool | None:
    """Return whether a file's metadata say that its base model predicts v; None where they say nothing of it."""
    stated, version = metadata.get("modelspec.prediction_type", ""), metadata.get("ss_base_model_version", "")
    if stated in ("v", "v_prediction"):
        return True
    if stated == "epsilon":
        return False
    if version.endswith("_v"):
        return True
    return False if version == "sd_v2" else None


def trigger_entries(trigger: str, num_photos: int = 0) -> dict[str, str]:
    """Return what names the activation text: ModelSpec's phrase, and kohya's tags, which A1111 shows to be clicked."""
    if not trigger:
        return {}
    tags = {f"1_{trigger}": {trigger: max(num_photos, 1)}}
    return {"modelspec.trigger_phrase": trigger, "ss_tag_frequency": json.dumps(tags, ensure_ascii=False)}


def legacy_hash(path: Path, header: Header) -> str:
    """Return the ``sshs_legacy_hash`` of a file, as `KohyaHashes` does; "" if it were of metadata, in random order."""
    kept = {key: value for key, value in header.metadata.items() if key.startswith("ss_")}
    skipped = _LEGACY_BYTES.start - len(header_bytes(header.tensors, kept))
    if skipped < 0:
        return ""
    with open(path, "rb") as file:
        file.seek(header.data_offset + skipped)
        return hashlib.sha256(file.read(len(_LEGACY_BYTES))).hexdigest()[:8]


class KohyaHashes:
    """kohya's ``sshs_model_hash`` and ``sshs_legacy_hash`` of a file, computed of its bytes as they are written.

    kohya hashes a file that has only the ``ss_*`` keys: all of it after the header, or a piece of it.
    """

    def __init__(self, tensors: Tensors, metadata: Mapping[str, str]) -> None:
        self._model, self._legacy = hashlib.sha256(), hashlib.sha256()
        kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
        self._position = 0
        self._update_legacy(header_bytes(tensor_infos(tensors), kept))

    def update(self, chunk: bytes | memoryview) -> None:
        self._model.update(chunk)
        self._update_legacy(chunk)

    def entries(self) -> dict[str, str]:
        return {"sshs_model_hash": self._model.hexdigest(), "sshs_legacy_hash": self._legacy.hexdigest()[:8]}

    def _update_legacy(self, chunk: bytes | memoryview) -> None:
        start, stop = (max(end - self._position, 0) for end in (_LEGACY_BYTES.start, _LEGACY_BYTES.stop))
        self._legacy.update(chunk[start:stop])
        self._position += len(chunk)
