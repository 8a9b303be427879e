"""Which of our commands refuse an adapter, and why: the same functions judge that read it for them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from converters.formats.diffusers import diffusers_tensors, old_diffusers_tensors
from converters.formats.kohya import kohya_layers
from converters.formats.peft import check_magnitudes
from converters.formats.reading import Source, read_sources
from converters.lora import Lora
from converters.shapes import fit_shapes
from lidb_peft.families import FAMILIES


def find_refusals(path: Path, sources: Sequence[Source]) -> tuple[list[str], list[str]]:
    """Return a sentence for each command that would not take a LoRA file as it is; and for each format not written."""
    try:
        lora = read_sources(path, sources, full_updates=True)
    except ValueError as error:
        return [f"hdb convert, resize, merge and project refuse it: {_without_path(error, path)}"], []
    found = _refusing_commands(lora)
    return found, [] if lora.full_updates else _refusing_formats(lora)


def _refusing_formats(lora: Lora) -> list[str]:
    """Return one sentence for each format that ``hdb convert`` does not write a LoRA in, and why."""
    found = []
    for to, write in _WRITERS.items():
        try:
            write(lora)
        except ValueError as error:
            found.append(f"hdb convert --to {to} refuses it: {error}")
    return found


# Format -> what makes its tensors, as the conversion does.
_WRITERS: Mapping[str, Callable[[Lora], object]] = {
    "kohya": lambda lora: lora.family and kohya_layers(lora, lora.family),
    "diffusers": diffusers_tensors,
    "diffusers-old": old_diffusers_tensors,
    "peft": check_magnitudes,
}


def _refusing_commands(lora: Lora) -> list[str]:
    found = []
    if lora.full_updates:
        found.append("hdb resize, merge and project refuse it: it is not a LoRA; hdb convert --rank makes one of"
                     " it, hdb merge --into adds it to a model")  # fmt: skip
    if not lora.family:
        found.append("its layers do not show its model family: hdb convert to kohya's format asks for --family"
                     f" {' or '.join(_families(lora))}")  # fmt: skip
    else:
        try:
            fit_shapes(lora)
        except ValueError as error:
            found.append(f"hdb convert refuses it: {error}")
    if any(layer.magnitude is not None for layer in lora.layers.values()):
        found.append("it is DoRA, whose update needs the base model: hdb merge with other LoRAs and hdb project refuse"
                     " it; hdb merge --into applies it")  # fmt: skip
    if any(tensor.dtype == torch.float64 for layer in lora.layers.values() for tensor in layer.tensors()):
        found.append("its numbers are float64: hdb convert, resize and merge ask for --dtype")
    return found


def _families(lora: Lora) -> list[str]:
    """The families that have all layers of a LoRA."""
    found = []
    for family in FAMILIES:
        try:
            fit_shapes(Lora(lora.layers, family))
        except ValueError:
            continue
        found.append(family)
    return found or list(FAMILIES)


def _without_path(error: ValueError, path: Path) -> str:
    return str(error).removeprefix(str(path)).lstrip(": ")
