"""LiDB weights from what was trained without LiDB: the theta nearest to a LoRA, or to the difference of two models.

So a hypernetwork can learn to predict existing LoRAs.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from converters.arithmetic.algebra import matrices
from converters.arithmetic.checkpoint import Weight, differences, find_family, find_weights
from converters.formats.lidb import skeleton_models
from converters.formats.reading import read_lora
from converters.lora import Lora
from lidb_peft import LiDBConfig, project_lora
from lidb_peft.families import FAMILIES
from lidb_peft.outputs import check_output
from lidb_peft.space import LiDBSpace
from lidb_peft.theta import save_theta


@dataclass(frozen=True)
class Projected:
    """The nearest theta.

    Args:
        theta: float32 ``(L, row_size)``; rows of other layers are those of theta_0, a zero update.
        errors: relative error of theta, 0 to 1, for each given layer.
        left_out: given layers without a row: feed-forward and convolution layers; and bundled embeddings.
    """

    theta: Tensor
    errors: dict[str, float]
    left_out: tuple[str, ...]


def project_to_file(
    source: str | os.PathLike,
    out: str | os.PathLike,
    minus: str | os.PathLike | None = None,
    models: Mapping[str, nn.Module] | None = None,
    config: LiDBConfig | None = None,
    overwrite: bool = False,
) -> Projected:
    """Write the theta nearest to a LoRA, or to the difference of the models ``source`` and ``minus``.

    Args:
        models: component -> model of the base, whose fingerprint is recorded; None takes ``source``'s architecture.
        config: the bases; None uses the default ones.
        overwrite: replace an existing ``out``.

    Raises:
        ValueError: a source that cannot be read, or whose architecture cannot be determined.
        ValueError, OSError: as `check_output`.
    """
    check_output(out, [source, minus], overwrite=overwrite)
    if minus is None:
        lora = read_lora(source)
        updates, family, base_name = lora_updates(lora), lora.family, lora.metadata.get("ss_sd_model_name", "")
    else:
        weights = find_weights(minus)
        updates, family = model_updates(find_weights(source), weights), find_family(weights)
        base_name = Path(minus).name
    space = LiDBSpace(models or family_models(family, str(source)), config or LiDBConfig())
    found = project(updates, space)
    save_theta(out, found.theta, space, base_name)
    return found if minus is not None else replace(found, left_out=(*found.left_out, *lora.embeddings))


def family_models(family: str, source: str) -> dict[str, nn.Module]:
    """Return component -> a model of the layers that LiDB adapts in a family, without weights."""
    if family not in FAMILIES:
        raise ValueError(f"{source} does not say its model family; pass the base model that it was made for (--base)")
    return skeleton_models(FAMILIES[family].shapes, "meta")


def project(
    updates: Iterable[tuple[str, tuple[Tensor, Tensor]]], space: LiDBSpace, bases: Mapping[str, Tensor] | None = None
) -> Projected:
    """Return the theta nearest to updates ``(layer, (lora_A (k, in), lora_B (out, k)))``, taken one at a time.

    Args:
        bases: learned ones by label; None takes the space's frozen ones.

    Raises:
        ValueError: none is on a layer of the space, or one has another shape or is not finite.
    """
    rows = {name: index for index, name in enumerate(space.layer_names)}
    theta = space.theta_0.clone()
    errors: dict[str, float] = {}
    left_out = []
    for name, factors in updates:
        if name in rows:
            shapes = {name: space.shapes[rows[name]]}
            row, error = project_lora(shapes, space.config, {name: factors}, bases)
            theta[rows[name]], errors[name] = row[0], float(error[0])
        else:
            left_out.append(name)
    if not errors:
        raise ValueError(f"none of {len(left_out)} updates is on a layer that LiDB adapts; nothing can be projected")
    return Projected(theta, errors, tuple(left_out))


def lora_updates(lora: Lora) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield the factors of a LoRA's layers, scales folded in, for `project`.

    Raises:
        ValueError: a layer is DoRA.
    """
    for name, layer in lora.layers.items():
        if layer.magnitude is not None:
            raise ValueError(f"layer {name} is DoRA, which is not a product of two matrices; project a plain LoRA")
        yield name, matrices(layer)


def model_updates(
    tuned: Mapping[str, Weight], base: Mapping[str, Weight]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield what two models, given by `find_weights`, differ by: layer by layer and of full rank, for `project`."""
    for name, difference, is_rounding in differences(tuned, base):
        if difference is None or is_rounding:
            continue
        matrix = difference.reshape(len(difference), -1)  # a norm's weight is a vector, and no layer of a space
        yield name, (torch.eye(matrix.shape[1]), matrix)
