"""A base model in a folder, in diffusers' layout, checked before anything is loaded: a broken download is one sentence.

Only headers and JSON are read here. What the libraries do with broken folders otherwise: an empty tokenizer/ or a text
encoder without some of its weights loads without a word, and a truncated file is reported without its name.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lidb_peft.families import FAMILIES, TITLES, Family, families_of_pipeline
from lidb_peft.safe_read import PICKLE_SUFFIXES, check_indices, iter_tensors, read_header, read_json_object

_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
_CLIP_LEVEL = "text_model."
_VARIANTS = (None, "fp16")
_AGAIN = "download the base model again"


def check_folder(folder: Path, without: Sequence[str] = ()) -> tuple[Family, str | None]:
    """Check a folder in diffusers' layout.

    Args:
        without: parts that are not needed: components, tokenizers, the scheduler.

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
    index = _read_json(folder / "model_index.json")
    family = pipeline_family(str(folder), index)
    weighted, tokenizers, scheduler = ([part for part in parts if part not in without] for parts in parts_of(family))
    for part in (*weighted, *tokenizers, *scheduler):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} is not complete: it has no {part}/ folder; {_AGAIN}")
    for part in (*weighted, *tokenizers, *scheduler):
        named = index.get(part)
        if not (isinstance(named, list) and len(named) == 2 and all(isinstance(name, str) for name in named)):
            raise ValueError(f"{folder / 'model_index.json'} does not say which class its {part} is of; {_AGAIN}")
    configs = [f"{part}/config.json" for part in weighted] + [f"{part}/scheduler_config.json" for part in scheduler]
    for name in configs:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not complete: it has no {name}; {_AGAIN}")
        _read_json(folder / name)
    for name in weighted:
        check_indices(folder / name, _AGAIN)
    for name in tokenizers:
        _check_tokenizer(folder / name)
    files = {part: [file.relative_to(folder).as_posix() for file in (folder / part).iterdir()] for part in weighted}
    variant, chosen = choose_weights(str(folder), files)
    for name in chosen:
        read_header(folder / name)
    return family, variant


def parts_of(family: Family) -> tuple[list[str], list[str], list[str]]:
    """Names of the folders that a family's pipeline has: those with weights, the tokenizers, the scheduler."""
    weighted = [component.name for component in family.components] + ["vae"]
    return weighted, [component.tokenizer for component in family.text_encoders], ["scheduler"]


def choose_weights(source: str, files: Mapping[str, Sequence[str]]) -> tuple[str | None, list[str]]:
    """Choose between the weights that a pipeline has: the plain ones, or fp16's where a part has no others.

    Args:
        source: for messages.
        files: part -> the paths of the files in its folder, relative to the pipeline's.

    Returns:
        The variant that diffusers is to be asked for, None or ``fp16``, and the files that it will read.

    Raises:
        ValueError: a part has no weights in safetensors.
    """
    plain, half = ({part: _weights_among(found, variant) for part, found in files.items()} for variant in _VARIANTS)
    for part, found in files.items():
        if not plain[part] and not half[part]:
            pickled = sorted(Path(name).name for name in found if Path(name).suffix in PICKLE_SUFFIXES)
            hint = f" ({pickled[0]} is a pickle, which can run code and is never read)" if pickled else ""
            remedy = "pass a repository or file with safetensors" if pickled else _AGAIN
            raise ValueError(f"{Path(source, part)} has no weights in safetensors{hint}; {remedy}")
    if all(plain.values()):
        return None, [name for names in plain.values() for name in names]
    # diffusers falls back to a part's plain weights by itself.
    return _VARIANTS[1], [name for part in files for name in (half[part] or plain[part])]


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


def _weights_among(names: Sequence[str], variant: str | None) -> list[str]:
    """The safetensors files of a part of a pipeline, shards too; those of other variants (``non_ema``) are left out."""
    middle = "" if variant is None else rf"\.{variant}"
    name = re.compile(rf"(model|diffusion_pytorch_model)({middle}(-\d+-of-\d+)?|(-\d+-of-\d+)?{middle})\.safetensors")
    return [path for path in sorted(names) if name.fullmatch(Path(path).name)]


def mend_text_encoder(folder: Path, variant: str | None, text_encoder: nn.Module) -> None:
    """Make sure that the text encoder has the folder's weights: transformers draws those it does not find at random.

    transformers 4 finds none in a folder that 5 saved, which has no ``text_model.`` in its names: they are loaded here.

    Raises:
        ValueError: the folder lacks weights.
    """
    names = [file.name for file in folder.iterdir()]
    files = [folder / name for name in _weights_among(names, variant) or _weights_among(names, None)]
    stored = {name for file in files for name in read_header(file).tensors}
    named = dict(text_encoder.named_parameters())
    missing = sorted({_bare(name) for name in named} - {_bare(name) for name in stored})
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights, e.g. {missing[0]}; {_AGAIN}")
    if any(name.startswith(_CLIP_LEVEL) for name in named) and not any(name.startswith(_CLIP_LEVEL) for name in stored):
        tensors = {_bare(name): value for file in files for name, value in iter_tensors(file)}
        text_encoder.load_state_dict({name: tensors[_bare(name)] for name in named}, strict=False)


def _check_tokenizer(folder: Path) -> None:
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        raise ValueError(f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; {_AGAIN}")
    for file in folder.glob("*.json"):
        _read_json(file)


def _read_json(file: Path) -> dict:
    return read_json_object(file, _AGAIN)


def _bare(name: str) -> str:
    """transformers 5 dropped ``text_model.`` from the names of CLIPTextModel's modules; files have it or not."""
    return name.removeprefix(_CLIP_LEVEL)
