"""A base model in a folder, in diffusers' layout, checked before anything is loaded: a broken download is one sentence.

Only headers and JSON are read here. What the libraries do with broken folders otherwise: an empty tokenizer/ or a text
encoder without some of its weights loads without a word, and a truncated file is reported without its name.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lidb_peft.families import FAMILIES, TITLES, Family, families_of_pipeline
from lidb_peft.safe_read import PICKLE_SUFFIXES, check_indices, iter_tensors, read_header, read_json_object

_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
_CLIP_LEVEL = "text_model."


def check_folder(folder: Path, without: Sequence[str] = ()) -> tuple[Family, str | None]:
    """Check a folder in diffusers' layout.

    Args:
        without: components whose weights are not needed.

    Returns:
        A family that is loaded as the folder's pipeline, and the variant of its weights: None or ``fp16``.

    Raises:
        ValueError: it is of no known family, is not complete, or a file in it is damaged.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is not a Stable Diffusion in diffusers' layout, nor another base model: it has no "
            f"model_index.json; pass the folder that holds unet/ or transformer/, vae/ and text_encoder/"
        )
    family = pipeline_family(str(folder), _read_json(folder / "model_index.json"))
    weighted = [component.name for component in family.components] + ["vae"]
    tokenizers = [component.tokenizer for component in family.text_encoders]
    for part in (*weighted, *tokenizers, "scheduler"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} is not complete: it has no {part}/ folder; download the base model again")
    for name in (*(f"{part}/config.json" for part in weighted), "scheduler/scheduler_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not complete: it has no {name}; download the base model again")
        _read_json(folder / name)
    weighted = [part for part in weighted if part not in without]
    for name in weighted:
        check_indices(folder / name, "download the base model again")
    for name in tokenizers:
        _check_tokenizer(folder / name)
    for variant in (None, "fp16"):
        found = [weight_files(folder / part, variant) for part in weighted]
        if all(found):
            for files in found:
                for file in files:
                    read_header(file)
            return family, variant
    missing = next(part for part in weighted if not weight_files(folder / part))
    pickled = [file.name for file in sorted((folder / missing).iterdir()) if file.suffix in PICKLE_SUFFIXES]
    hint = f" ({pickled[0]} is a pickle, which can run code and is never read)" if pickled else ""
    raise ValueError(f"{folder / missing} has no weights in safetensors{hint}; download the base model again")


def pipeline_family(source: str, index: dict[str, Any]) -> Family:
    """A family that is loaded as the pipeline that ``model_index.json`` names.

    Raises:
        ValueError: it is of no known family, or no plain text-to-image model.
    """
    name = str(index.get("_class_name"))
    if index.get("requires_aesthetics_score"):
        raise ValueError(f"{source} is an SDXL refiner, which has one text encoder only; pass an SDXL base")
    found = families_of_pipeline(name)
    if not found:
        known = dict.fromkeys(family.pipelines[0] for family in FAMILIES.values())
        raise ValueError(f"{source} holds a {name}; expected a {' or '.join(known)}: bases of {TITLES} work")
    return found[0]


def weight_files(part: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a part of a pipeline, shards too; those of other variants (``non_ema``) are left out."""
    middle = "" if variant is None else rf"\.{variant}"
    name = re.compile(rf"(model|diffusion_pytorch_model){middle}(-\d+-of-\d+)?\.safetensors")
    return [file for file in sorted(part.glob("*.safetensors")) if name.fullmatch(file.name)]


def mend_text_encoder(folder: Path, variant: str | None, text_encoder: nn.Module) -> None:
    """Make sure that the text encoder has the folder's weights: transformers draws those it does not find at random.

    transformers 4 finds none in a folder that 5 saved, which has no ``text_model.`` in its names: they are loaded here.

    Raises:
        ValueError: the folder lacks weights.
    """
    files = weight_files(folder, variant)
    stored = {name for file in files for name in read_header(file).tensors}
    named = dict(text_encoder.named_parameters())
    missing = sorted({_bare(name) for name in named} - {_bare(name) for name in stored})
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights, e.g. {missing[0]}; download the base model again")
    if any(name.startswith(_CLIP_LEVEL) for name in named) and not any(name.startswith(_CLIP_LEVEL) for name in stored):
        tensors = {_bare(name): value for file in files for name, value in iter_tensors(file)}
        text_encoder.load_state_dict({name: tensors[_bare(name)] for name in named}, strict=False)


def _check_tokenizer(folder: Path) -> None:
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        raise ValueError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; download the base model "
                         f"again")  # fmt: skip
    for file in folder.glob("*.json"):
        _read_json(file)


def _read_json(file: Path) -> dict:
    return read_json_object(file, "download the base model again")


def _bare(name: str) -> str:
    """transformers 5 dropped ``text_model.`` from the names of CLIPTextModel's modules; files have it or not."""
    return name.removeprefix(_CLIP_LEVEL)
