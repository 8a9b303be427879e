"""The kohya LoRA file, which A1111, ComfyUI, kohya sd-scripts and diffusers read.

Each layer may have its own rank. The attention layers of a UNet, and a text encoder, have one alpha: diffusers uses the
most common one. Programs use each layer's own for FLUX, whose attention projections are fused here.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from converters.formats.layout import SPELLINGS
from converters.formats.reading import read_lora
from converters.key_maps import Place, kohya_place
from converters.layer import DTYPES, Loader, LoraLayer
from converters.lora import Lora, balance, to_dtype, with_one_alpha
from converters.metadata import KohyaHashes, KohyaMetadata, build_metadata
from converters.sidecar import companions_first, write_preview, write_sidecar
from converters.stacking import stack
from lidb_peft.families import get_family
from lidb_peft.files import LazyTensor, Tensors, check_suffix, write_safetensors
from lidb_peft.relax import LoraFactors

if TYPE_CHECKING:
    from PIL.Image import Image


def write_lora(
    path: str | os.PathLike,
    factors: LoraFactors,
    metadata: KohyaMetadata,
    dtype: torch.dtype = torch.float16,
    preview: "Image | None" = None,
) -> list[Path]:
    """Write a LoRA for A1111: the file, its sidecar with the activation text, and a preview; return what was written.

    The LoRA is written last, so that its presence means that all files exist. Sidecar and preview never overwrite other
    files; see :func:`save_kohya` for the rest.
    """
    path = Path(path)
    tensors, entries = _prepare_kohya(path, factors, metadata, dtype)
    with companions_first(path):
        companions = [write_sidecar(path, metadata)]
        if preview is not None:
            companions.append(write_preview(path, preview))
        write_tensors(path, tensors, entries)
    return [path, *(file for file in companions if file is not None)]


def save_kohya(
    path: str | os.PathLike,
    factors: LoraFactors,
    metadata: KohyaMetadata,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write LoRA factors, layer name -> (``lora_A`` (r, in), ``lora_B`` (out, r)), as a kohya safetensors file.

    Layers of lower rank are padded with zeros to the file's common rank, if programs need one for the family, and the
    norms of both factors are balanced by powers of two; neither changes ``lora_B @ lora_A``, so only the rounding to
    ``dtype`` remains.

    Raises:
        ValueError: no layers, NaN or infinity, shapes that do not fit, a layer that the family does not have, a value
            beyond ``dtype``, or a file name without ``.safetensors``.
    """
    write_tensors(path, *_prepare_kohya(Path(path), factors, metadata, dtype))


def _prepare_kohya(
    path: Path, factors: LoraFactors, metadata: KohyaMetadata, dtype: torch.dtype
) -> tuple[Tensors, dict[str, str]]:
    check_suffix(path)
    tensors, rank = lora_tensors(factors, metadata.family, dtype)
    return tensors, build_metadata(metadata, path.stem, rank)


def write_tensors(path: str | os.PathLike, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write a kohya file's tensors with ``metadata``, to which kohya's hashes are added.

    Raises:
        ValueError: a file name without ``.safetensors``.
    """
    check_suffix(path)
    write_safetensors(path, tensors, metadata, KohyaHashes(tensors, metadata))


def load_kohya(path: str | os.PathLike) -> tuple[LoraFactors, dict[str, str]]:
    """Read a LoRA as float32 factors with alpha / rank folded into ``lora_B``, and its metadata; see `read_lora`."""
    lora = read_lora(path)
    return lora.factors(), lora.metadata


def lora_tensors(factors: LoraFactors, family: str, dtype: torch.dtype) -> tuple[Tensors, int]:
    """Return the tensors of a kohya file with ``factors``, and its rank, which is also its alpha.

    Raises:
        ValueError: as `save_kohya`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; choose one of {', '.join(str(dtype) for dtype in DTYPES)}")
    if not factors:
        raise ValueError("there are no LoRA layers to write; pass the factors of at least one layer")
    layers = {name: _balanced_layer(name, *pair) for name, pair in factors.items()}
    lora, _ = with_one_alpha(Lora(layers, family), scale=1.0, one_rank=not get_family(family).reads_mixed_ranks)
    return kohya_tensors(to_dtype(lora, dtype), family), max(layer.rank for layer in layers.values())


def kohya_tensors(lora: Lora, family: str) -> Tensors:
    """Return a LoRA's tensors under the names that kohya gives the layers of ``family``.

    Raises:
        ValueError: a layer that the family does not have.
    """
    endings = SPELLINGS["kohya"]
    tensors: dict[str, Tensor | LazyTensor] = {}
    loader = Loader()
    for name, layer in kohya_layers(lora, family).items():
        lora_A, lora_B, *magnitude = loader.tensors(layer)
        tensors[name + endings["lora_A"]], tensors[name + endings["lora_B"]] = lora_A, lora_B
        alpha = torch.tensor(layer.alpha, dtype=layer.lora_B.dtype)
        if alpha.item() != layer.alpha:  # bfloat16 represents integers exactly only up to 256
            alpha = torch.tensor(layer.alpha, dtype=torch.float32)
        tensors[name + endings["alpha"]] = alpha
        if magnitude:
            start = (1, -1) if layer.has_input_magnitude else (-1, 1)
            tensors[name + endings["dora"]] = magnitude[0].reshape(*start, *(1,) * (layer.lora_B.dim() - 2))
    return tensors


def kohya_layers(lora: Lora, family: str) -> dict[str, LoraLayer]:
    """Return a LoRA's layers in kohya's structure and names: layers that are one module there are stacked.

    Raises:
        ValueError: a layer that the family does not have, or layers of one module with incompatible shapes.
    """
    places: dict[str, Place] = {}
    for layer in lora.layers:
        place = kohya_place(layer, family)
        places.setdefault(place.name, place)
    return {name: _kohya_layer(lora, place) for name, place in places.items()}


def _kohya_layer(lora: Lora, place: Place) -> LoraLayer:
    if len(place.layers) == 1:
        return lora.layers[place.layers[0]]
    try:
        return stack([lora.layers.get(layer) for layer in place.layers], place.widths)
    except ValueError as error:
        raise ValueError(f"{place.name} has {error}") from error


def _balanced_layer(name: str, lora_A: Tensor, lora_B: Tensor) -> LoraLayer:
    try:
        layer = LoraLayer(lora_A.detach().to("cpu", torch.float32), lora_B.detach().to("cpu", torch.float32), alpha=1.0)
    except ValueError as error:
        raise ValueError(f"layer {name} has {error}") from error
    return LoraLayer(*balance(layer.lora_A, layer.lora_B), alpha=float(layer.rank))
