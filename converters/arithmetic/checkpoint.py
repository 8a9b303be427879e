"""Whole models: adding a LoRA to one, and taking a LoRA out of the difference of two; one weight at a time.

A model is a single safetensors file, as Automatic1111 and kohya users have, or a folder in diffusers' layout; or a
denoiser alone, as either. Only its names are known here, from the tables of :mod:`converters.key_maps`; nothing is
instantiated.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from converters.arithmetic.algebra import matrices, to_layer
from converters.arithmetic.ranks import RankRule
from converters.formats.family import find_base
from converters.full_update import FullUpdate, SumOfUpdates
from converters.key_maps import Place, is_transposed, read_checkpoint_name
from converters.layer import LoraLayer, is_finite
from converters.lora import Lora
from converters.stacking import row_slices
from lidb_peft.families import COMPONENTS, DENOISERS, FAMILIES, TITLES
from lidb_peft.files import atomic_folder, atomic_path, header_bytes
from lidb_peft.naming import layer_name
from lidb_peft.outputs import FOLDER, check_output
from lidb_peft.safe_read import count, examples, read_header

# Hashes of the file's previous content.
_STALE_METADATA = frozenset({"modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"})
# File names of a diffusers UNet's weights.
_UNET_ALONE = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\.")
# What kohya adds to the layers that it trains by default where convolutions have a rank.
_CONVOLUTIONAL = (".resnets.", ".downsamplers.", ".upsamplers.")
_HALF = 0.51  # in units in the last place, for numbers that were rounded twice
_COMPONENTS = {
    name: [part for family in FAMILIES.values() for part in family.components if part.name == name]
    for name in COMPONENTS
}


@dataclass(frozen=True)
class Weight:
    """Where a model stores a layer's weight: a tensor, or one of several stacked in it along axis 0.

    Args:
        part: index among the stacked weights.
        widths: their numbers of rows, relative to each other.
        is_transposed: the tensor is ``(in, out)``, as OpenCLIP's projection is.
    """

    file: Path
    tensor: str
    part: int = 0
    widths: tuple[int, ...] = (1,)
    is_transposed: bool = False

    def rows(self, tensor: Tensor) -> Tensor:
        """View the layer's own rows of the stored tensor, ``(out, in)``."""
        rows = tensor[row_slices(len(tensor), self.widths)[self.part]] if len(self.widths) > 1 else tensor
        return rows.mT if self.is_transposed else rows

    def load(self) -> Tensor:
        with safe_open(self.file, "pt") as file:
            return self.rows(file.get_tensor(self.tensor))


@dataclass(frozen=True)
class Extracted:
    """A LoRA extracted from two models.

    Args:
        errors: relative error of the LoRA, for each layer.
        left_out: layers that differ and are not in the LoRA.
        rounded: layers of the kind that is extracted which differ by no more than the rounding of a dtype.
        in_one_model: layers that only one of the models has.
    """

    lora: Lora
    errors: dict[str, float]
    left_out: tuple[str, ...]
    rounded: tuple[str, ...] = ()
    in_one_model: tuple[str, ...] = ()


def find_weights(model: str | os.PathLike) -> dict[str, Weight]:
    """Return layer name -> where its weight is, for all of a model's UNet and text encoders.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a pickle, a damaged file, two files for one layer, or no model of a known family.
    """
    model = Path(model)
    weights: dict[str, Weight] = {}
    for file in _model_files(model):
        for tensor in read_header(file).tensors:
            place = (_place_in_folder if model.is_dir() and file.parent != model else _place_in_file)(file, tensor)
            if place is None:
                continue
            for part, layer in enumerate(place.layers):
                if layer in weights:
                    raise ValueError(f"{model} holds {layer} twice, in {weights[layer].file.name} and {file.name};"
                                     " remove one")  # fmt: skip
                is_turned = not model.is_dir() and is_transposed(tensor)
                weights[layer] = Weight(file, tensor, part, place.widths, is_turned)
    if not any(layer.partition(".")[0] in DENOISERS for layer in weights):
        raise ValueError(
            f"{model} holds no UNet or transformer of {TITLES} in safetensors; name a checkpoint, or a folder in"
            " diffusers' layout"
        )
    return weights


def find_family(weights: Mapping[str, Weight]) -> str:
    """Return the family of a model by the input widths of its denoiser.

    A model of another width, such as a miniature, counts as the first family's.
    """
    widths = {file: read_header(file).tensors for file in {weight.file for weight in weights.values()}}
    shapes = ((name, widths[weight.file][weight.tensor].shape) for name, weight in weights.items())
    layers = ((name, name, shape[1] if len(shape) > 1 else 0) for name, shape in shapes)
    return find_base(layers, {}) or next(iter(FAMILIES))


def check_model_output(
    out: str | os.PathLike, model: str | os.PathLike, inputs: Sequence[str | os.PathLike] = (), overwrite: bool = False
) -> None:
    """Raise early what writing ``out``, a changed ``model``, would raise: a file for a file, a new folder for a folder.

    Raises:
        ValueError, OSError: as `check_output`; ``inputs`` are what is read besides.
    """
    check_output(out, [model, *inputs], FOLDER if Path(model).is_dir() else ".safetensors", overwrite)


def merge_into(model: str | os.PathLike, lora: Lora, out: str | os.PathLike, overwrite: bool = False) -> None:
    """Write ``model`` with a LoRA, DoRA too, added to its weights, each in its own dtype and one in memory at a time.

    Sums are computed in float32 and then rounded. A folder becomes a folder, including all its other files.

    Raises:
        ValueError: a layer that the model lacks or that has another shape there, a sum beyond its dtype, or as
            `find_weights`. ValueError, OSError: as `check_model_output`.
    """
    model, out = Path(model), Path(out)
    check_model_output(out, model, overwrite=overwrite)
    updates = lora.layers | dict(lora.full_updates)
    weights = _with_biases(find_weights(model), updates)
    missing = sorted(set(updates) - set(weights))
    lacking = {name.partition(".")[0] for name in missing} - {name.partition(".")[0] for name in weights}
    if lacking and lacking >= {name.partition(".")[0] for name in missing}:
        parts = " and no ".join(sorted(lacking))
        raise ValueError(f"{model} holds no {parts}, which {count(missing, 'layer')} of the LoRA change; take a whole"
                         " model")  # fmt: skip
    if missing:
        raise ValueError(f"{model} lacks {len(missing)} of the LoRA's {len(updates)} layers, e.g. {examples(missing)};"
                         " take a base of its family")  # fmt: skip
    changes: dict[Path, dict[str, list[str]]] = {}
    for name in updates:
        changes.setdefault(weights[name].file, {}).setdefault(weights[name].tensor, []).append(name)

    def write(file: Path, target: Path) -> None:
        def change(tensor_name: str, tensor: Tensor) -> Tensor:
            names = changes[file].get(tensor_name, ())
            changed = tensor.clone() if names else tensor
            for name in names:
                rows = weights[name].rows(changed)
                rows.copy_(_updated(name, rows, updates[name]))
            return changed

        rewrite(file, target, change)

    if not model.is_dir():
        write(model, out)
        return
    with atomic_folder(out) as folder:
        shutil.copytree(model, folder, dirs_exist_ok=True,
                        ignore=lambda parent, names: {n for n in names if Path(parent, n) in changes})  # fmt: skip
        for file in changes:
            write(file, folder / file.relative_to(model))


def extract(
    tuned: str | os.PathLike,
    base: str | os.PathLike,
    rank: RankRule | int,
    dtype: torch.dtype = torch.float16,
    progress: Callable[[int, int], None] | None = None,
) -> Extracted:
    """Return the LoRA that is nearest to the difference of two models, one layer in memory at a time.

    It holds the linear layers and 1x1 convolutions of attention blocks and text encoders that differ by more than
    rounding, with a ``conv_rank`` those and the convolutions of residual blocks and samplers too; their truncated SVDs
    are computed in float64. Other layers may differ in shape, like those of an inpainting model or with added tokens.

    Args:
        rank: of each layer, or a rule.

    Raises:
        ValueError: a rank below 1, weights of other shapes or not finite, nothing to extract, or as `find_weights`.
    """
    rule = RankRule(rank) if isinstance(rank, int) else rank
    tuned_weights, base_weights = find_weights(tuned), find_weights(base)
    in_one_model = tuple(sorted(set(tuned_weights) ^ set(base_weights)))
    layers: dict[str, LoraLayer] = {}
    errors: dict[str, float] = {}
    left_out, rounded = [], []
    for name, difference, is_rounding in differences(tuned_weights, base_weights, progress):
        if difference is None or not _is_extracted(name, difference, rule):
            left_out.append(name)
        elif is_rounding:
            rounded.append(name)
        else:
            matrix, is_convolution = (
                difference.double().flatten(1),
                difference.dim() == 4 and max(difference.shape[2:]) > 1,
            )
            left, errors[name] = leading_columns(matrix, rule, is_convolution)
            alpha = None if rule.rank is None else float(rule.rank)  # one for all, as diffusers needs
            layers[name] = to_layer(name, left.mT @ matrix, left, difference.shape[1:], dtype, alpha=alpha)
    if not layers:
        more = f" by more than the rounding of {count(rounded, 'layer')}" if rounded else ""
        raise ValueError(
            f"{tuned} and {base} do not differ{more} in any attention or text encoder layer; nothing to extract"
        )
    lora = Lora(layers, find_family(base_weights))
    return Extracted(lora, errors, tuple(left_out), tuple(rounded), in_one_model)


def differences(
    tuned: Mapping[str, Weight], base: Mapping[str, Weight], progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[str, Tensor | None, bool]]:
    """Yield ``(layer, tuned - base, whether that is rounding)``, float32, for each layer of both that differs.

    A layer of other shapes yields None, unless it is of the kind that LoRAs are trained on.

    Raises:
        ValueError: the weights of such a layer have other shapes, or the difference is not finite.
    """
    common = [name for name in tuned if name in base]
    for done, name in enumerate(common, 1):
        first, second = tuned[name].load(), base[name].load()
        if progress is not None:
            progress(done, len(common))
        are_alike = min(first.dim(), second.dim()) > 1 and first.flatten(1).shape == second.flatten(1).shape
        if not are_alike and first.shape != second.shape:  # of proj_in, one may be linear and one a 1x1 convolution
            if _is_trained(name):
                shapes = f"{tuple(first.shape)} in {tuned[name].file} and {tuple(second.shape)} in {base[name].file}"
                raise ValueError(f"{name} has shape {shapes}; compare models of one family")
            yield name, None, False
            continue
        difference = first.float() - second.float().view(first.shape)
        if not is_finite(difference):
            raise ValueError(f"{name} holds NaN or infinity in {tuned[name].file} or {base[name].file}; it is damaged")
        if difference.any():
            yield name, difference, _is_rounding(first, second.view(first.shape), difference)


def _is_rounding(first: Tensor, second: Tensor, difference: Tensor) -> bool:
    """Whether two weights differ by no more than half a unit in the last place of the coarser of their dtypes.

    A tensor counts as the narrowest dtype that holds its numbers, because models are widened after rounding.
    """
    dtype = max((_narrowest_dtype(tensor) for tensor in (first, second)), key=lambda dtype: torch.finfo(dtype).eps)
    info = torch.finfo(dtype)
    largest = torch.maximum(first.float().abs(), second.float().abs())
    exponents = torch.frexp(largest.clamp(min=info.smallest_normal)).exponent
    units = torch.ldexp(torch.full_like(largest, info.eps), exponents - 1)
    return bool((difference.abs() <= _HALF * units).all())


def _narrowest_dtype(tensor: Tensor) -> torch.dtype:
    if tensor.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):  # the coarser first
            if torch.equal(tensor.to(dtype).float(), tensor):
                return dtype
    return tensor.dtype


def rewrite(source: Path, target: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Copy a safetensors file, changing each ``(name, tensor)`` on the way, but not its dtype and shape.

    One tensor is in memory at a time. Metadata are kept, except hashes of the previous content.
    """
    header = read_header(source)
    metadata = {key: value for key, value in header.metadata.items() if key not in _STALE_METADATA}
    tensors = dict(sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    with atomic_path(target) as temporary, open(temporary, "wb") as out, safe_open(source, "pt") as stored:
        out.write(header_bytes(tensors, metadata))
        for name in tensors:
            out.write(change(name, stored.get_tensor(name)).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _model_files(model: Path) -> Sequence[Path]:
    """The file itself, or those of a folder's UNet and text encoders, shards too."""
    if not model.is_dir():
        return [model]
    # Looked up in the folder and not in its index, which could name files outside of it.
    parts = [file for part in COMPONENTS for file in sorted((model / part).glob("*.safetensors"))]
    return parts or sorted(model.glob("*.safetensors"))


def _place_in_file(file: Path, tensor: str) -> Place | None:
    place = read_checkpoint_name(tensor)
    if place is None and tensor.startswith("diffusion_model."):  # ComfyUI's name of a denoiser by itself
        place = read_checkpoint_name(f"model.{tensor}")
    if place is None and _UNET_ALONE.match(tensor) and tensor.endswith(".weight"):
        place = Place(tensor, (layer_name(DENOISERS[0], tensor.removesuffix(".weight")),))
    return place


def _place_in_folder(file: Path, tensor: str) -> Place | None:
    path = tensor.removesuffix(".weight")
    return None if path == tensor else Place(tensor, (layer_name(file.parent.name, path),))


def _with_biases(weights: dict[str, Weight], names: Iterable[str]) -> dict[str, Weight]:
    """Add the biases among ``names`` to the weights: beside a layer's weight, unless that is one of several in it."""
    found = dict(weights)
    for name in names:
        weight = weights.get(name.removesuffix(".bias"))
        if name not in weights and weight is not None and len(weight.widths) == 1:
            tensor = weight.tensor.removesuffix("weight") + "bias"
            if tensor in read_header(weight.file).tensors:
                found[name] = replace(weight, tensor=tensor)
    return found


def _updated(name: str, weight: Tensor, layer: LoraLayer | FullUpdate | SumOfUpdates) -> Tensor:
    """Return a layer's weight with its update, float32."""
    if not isinstance(layer, LoraLayer):
        delta = layer.delta()
        if delta.numel() != weight.numel() or delta.shape[0] != weight.shape[0]:
            raise ValueError(f"the update of {name} has shape {tuple(delta.shape)}, but its weight has"
                             f" {tuple(weight.shape)}; take a base of its family")  # fmt: skip
        return _finite(name, weight.float() + delta.view(weight.shape).float(), weight.dtype)
    lora_A, lora_B = (factor.float() for factor in matrices(layer))
    if weight.flatten(1).shape != (len(lora_B), lora_A.shape[1]):
        raise ValueError(f"the update of {name} maps {lora_A.shape[1]} to {len(lora_B)}, but its weight has shape"
                         f" {tuple(weight.shape)}; take a base of the LoRA's family")  # fmt: skip
    updated = torch.addmm(weight.float().flatten(1), lora_B, lora_A)
    if layer.magnitude is None:
        pass
    elif layer.has_input_magnitude:  # LyCORIS's, of the columns
        columns = updated.view(len(updated), layer.lora_A.shape[1], -1)
        columns *= (layer.magnitude.float().flatten() / columns.norm(dim=(0, 2)))[None, :, None]
    else:  # DoRA, arXiv:2402.09353, equation 5
        updated *= (layer.magnitude.float() / updated.norm(dim=1))[:, None]
    return _finite(name, updated.view(weight.shape), weight.dtype)


def _finite(name: str, updated: Tensor, dtype: torch.dtype) -> Tensor:
    if not is_finite(updated.to(dtype)):
        raise ValueError(f"the sum of {name} is not finite in {dtype}; merge with a smaller weight")
    return updated


def _is_trained(name: str) -> bool:
    trained = (part for component in _COMPONENTS.get(name.partition(".")[0], ()) for part in component.trained)
    return any(part in name for part in trained)


def _is_extracted(name: str, difference: Tensor, rule: RankRule) -> bool:
    if difference.dim() not in (2, 4):
        return False
    is_matrix = difference.dim() == 2 or difference.shape[2:] == (1, 1)
    is_convolutional = rule.conv_rank is not None and any(part in name for part in _CONVOLUTIONAL)
    return is_convolutional or (is_matrix and _is_trained(name))


def leading_columns(matrix: Tensor, rank: RankRule | int, is_convolution: bool = False) -> tuple[Tensor, float]:
    """Return the leading left singular vectors of ``(out, in)``, and the share of the norm without them, 0 of zeros.

    By the smaller Gram matrix: float64 leaves 1e-8 of the largest singular value, less than the models' own rounding,
    and eigenvectors of one side cost a fraction of an SVD.
    """
    is_wide = matrix.shape[0] <= matrix.shape[1]
    energies, vectors = torch.linalg.eigh(matrix @ matrix.mT if is_wide else matrix.mT @ matrix)
    energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)
    rank = rank if isinstance(rank, int) else rank.choose(energies.sqrt(), is_convolution)
    vectors = vectors[:, :rank]
    left = vectors if is_wide else torch.linalg.qr(matrix @ vectors).Q
    total = energies.sum()
    return left, (energies[rank:].sum() / total).sqrt().item() if total else 0.0
