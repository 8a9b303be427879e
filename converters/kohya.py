"""The kohya LoRA file, which A1111, ComfyUI, kohya sd-scripts and diffusers read: writing it exactly, reading it back.

One rank and one alpha (= rank) for the whole file, every other scale inside ``lora_up``: diffusers loses alphas that
differ between attention modules, and mixed ranks with them.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lidb_peft.files import atomic_path, to_bytes
from lidb_peft.relax import LoraFactors

from .key_maps import from_kohya_name, to_kohya_name
from .metadata import KohyaMetadata, add_hashes, build_metadata, write_preview, write_sidecar
from .safe_read import printable, read_tensors

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
# A LoRA of another model family has thousands of keys, all of them unknown.
_MAX_KEYS_SHOWN = 20


def write_lora(
    path: str | os.PathLike,
    factors: LoraFactors,
    metadata: KohyaMetadata,
    dtype: torch.dtype = torch.float16,
    preview: "Image | None" = None,
) -> list[Path]:
    """Write a LoRA for A1111: the file, its sidecar with the activation text, and a preview; return what was written.

    Sidecar and preview never overwrite another's file; see :func:`save_kohya` for the rest.
    """
    path = Path(path)
    save_kohya(path, factors, metadata, dtype)
    written = [path, write_sidecar(path, metadata)]
    if preview is not None:
        written.append(write_preview(path, preview))
    return [file for file in written if file is not None]


def save_kohya(
    path: str | os.PathLike,
    factors: LoraFactors,
    metadata: KohyaMetadata,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write LoRA factors, layer name -> (``lora_A`` (r, in), ``lora_B`` (out, r)), as a kohya safetensors file.

    Narrower layers are padded with zeros to the file's one rank, and the norms of down and up are balanced by powers
    of two; both leave every ``lora_B @ lora_A`` as it is, so that only the rounding to ``dtype`` remains.

    Raises:
        ValueError: no layers, NaN or infinity, shapes that do not fit, a layer that the family does not have, a value
            beyond ``dtype``, or a file name without ``.safetensors``.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} does not end in .safetensors; name the LoRA file so, or readers will not find it")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; choose one of {', '.join(str(dtype) for dtype in DTYPES)}")
    tensors, rank = _to_tensors(factors, metadata.family, dtype)
    entries = add_hashes(tensors, build_metadata(metadata, path.stem, rank))
    blob = to_bytes(tensors, entries)
    with atomic_path(path) as temporary:
        temporary.write_bytes(blob)


def load_kohya(path: str | os.PathLike) -> tuple[LoraFactors, dict[str, str]]:
    """Read a kohya LoRA of any author as float32 factors with alpha / rank folded into ``lora_B``, and its metadata.

    Each module's own alpha counts; without one the scale is 1. 1x1 convolutions (SD1's ``proj_in``) become matrices.

    Raises:
        ValueError: a damaged file, or one that holds anything but plain LoRA of Stable Diffusion 1, 2 or XL; the
            unknown keys are named.
    """
    tensors, metadata = read_tensors(path)
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        ending = next((ending for ending in (DOWN, UP, ALPHA) if key.endswith(ending)), None)
        if ending is None:
            unknown.append(key)
        else:
            modules.setdefault(key.removesuffix(ending), {})[ending] = tensor
    names: dict[str, str] = {}
    for module in modules:
        try:
            layer = from_kohya_name(module)
        except ValueError:
            unknown.extend(module + ending for ending in modules[module])
            continue
        if layer in names:
            raise ValueError(f"{path} holds layer {layer} twice, as {names[layer]} and {module}; remove one")
        names[layer] = module
    if unknown:
        more = f" and {len(unknown) - _MAX_KEYS_SHOWN} more" if len(unknown) > _MAX_KEYS_SHOWN else ""
        raise ValueError(
            f"{path} holds {len(unknown)} keys that are no plain LoRA of Stable Diffusion 1, 2 or XL:"
            f" {', '.join(printable(key) for key in sorted(unknown)[:_MAX_KEYS_SHOWN])}{more}"
        )
    if not names:
        raise ValueError(f"{path} holds no LoRA layers")
    return {layer: _fold_alpha(f"{path}: {module}", modules[module]) for layer, module in names.items()}, metadata


def _to_tensors(factors: LoraFactors, family: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    if not factors:
        raise ValueError("there are no LoRA layers to write; pass the factors of at least one layer")
    checked = {layer: _check_factors(layer, *pair) for layer, pair in factors.items()}
    rank = max(down.shape[0] for down, _ in checked.values())
    alpha = torch.tensor(rank, dtype=dtype)
    if alpha.item() != rank:  # bfloat16 counts exactly to 256 only
        alpha = torch.tensor(rank, dtype=torch.float32)
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in checked.items():
        padding = rank - down.shape[0]
        down = torch.nn.functional.pad(down, (0, 0, 0, padding))
        up = torch.nn.functional.pad(up, (0, padding))
        down, up = balance(down, up)
        name = to_kohya_name(layer, family)
        tensors[name + DOWN] = _round(layer, down, dtype)
        tensors[name + UP] = _round(layer, up, dtype)
        tensors[name + ALPHA] = alpha.clone()
    return tensors, rank


def balance(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Bring each row of ``down`` (r, in) and column of ``up`` (out, r) to the same size; ``up @ down`` stays the same.

    Only powers of two are moved from one to the other, so float32 loses nothing; the largest entries of the two then
    differ by less than a factor of 4, far inside float16's range for any LoRA that does something.
    """
    down_max = down.abs().amax(1).tolist()
    up_max = up.abs().amax(0).tolist()
    steps = [
        min(max((math.frexp(above)[1] - math.frexp(below)[1]) // 2, -126), 126) if above and below else 0
        for below, above in zip(down_max, up_max, strict=True)
    ]
    # torch.ldexp computes a power in floating point; math.ldexp is exact.
    scale = torch.tensor([math.ldexp(1.0, step) for step in steps], dtype=torch.float32)
    return down * scale[:, None], up / scale


def _check_factors(layer: str, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    down, up = (tensor.detach().to("cpu", torch.float32) for tensor in (lora_A, lora_B))
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise ValueError(
            f"layer {layer} has lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)};"
            " pass (rank, in) and (out, rank) of one rank above 0"
        )
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise ValueError(f"layer {layer} holds NaN or infinity; its training diverged, train again with a lower rate")
    return down, up


def _round(layer: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype).contiguous()
    if not torch.isfinite(rounded).all():
        raise ValueError(
            f"layer {layer} reaches {tensor.abs().max().item():.3g}, beyond {torch.finfo(dtype).max:.3g}, the largest"
            f" {str(dtype).removeprefix('torch.')}; write it as float32 or bfloat16"
        )
    return rounded


def _fold_alpha(where: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``(lora_A, lora_B)`` in float32 of one module of a file; ``where`` names it in errors."""
    missing = [ending for ending in (DOWN, UP) if ending not in parts]
    if missing:
        raise ValueError(f"{where} has no {' and no '.join(ending[1:] for ending in missing)}; the file is incomplete")
    down, up = parts[DOWN].float(), parts[UP].float()
    if any(tensor.dim() != 2 and (tensor.dim() != 4 or tensor.shape[2:] != (1, 1)) for tensor in (down, up)):
        raise ValueError(
            f"{where} has down {tuple(down.shape)} and up {tuple(up.shape)}; only linear layers and 1x1 convolutions"
            " are read, not LoCon's larger ones"
        )
    down, up = down.flatten(1), up.flatten(1)
    if down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise ValueError(f"{where} has down {tuple(down.shape)} and up {tuple(up.shape)}, which are of no one rank")
    scale = 1.0
    if ALPHA in parts:
        if parts[ALPHA].numel() != 1:
            raise ValueError(f"{where} has an alpha of shape {tuple(parts[ALPHA].shape)}; it must be one number")
        alpha = parts[ALPHA].float().item()
        if alpha == 0 or not math.isfinite(alpha):
            raise ValueError(f"{where} has alpha {alpha}, which readers take differently; set it to the rank")
        scale = alpha / down.shape[0]
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise ValueError(f"{where} holds NaN or infinity; the file is not usable")
    return down, up * scale
