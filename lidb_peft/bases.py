"""Frozen LiDB bases, rebuilt from a seed to the same bits on every machine.

HyperDreamBooth (arXiv:2307.06949), section 4.1: random matrices with orthonormal rows or columns. The integers come
from SHAKE-256, because torch's generators differ between devices and versions, and are orthonormalised by operations
that IEEE 754 rounds in one way only, in a fixed order, because LAPACK's results differ between builds, processors and
numbers of threads. Nothing here touches a random generator.

Besides these, bases can be given from outside, such as those that a hypernetwork has learned (`store_basis`).
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .safe_read import printable

BASIS_VERSION = 1
BASIS_KINDS = ("orthogonal",)
# Older files hold LAPACK's bases, which may differ in a last bit; one of another stream differs in the first digit.
PROBE_TOLERANCE = 1e-6
_NUM_PROBES = 8


class BasisKey(NamedTuple):
    """What defines one basis: ``side`` "down" or "up", ``width`` of the layer, ``dim`` of the basis, ``seed``, kind."""

    side: str
    width: int
    dim: int
    seed: int
    kind: str = "orthogonal"

    @property
    def shape(self) -> tuple[int, int]:
        """``(dim, width)`` for the down side, ``(width, dim)`` for the up side."""
        return (self.dim, self.width) if self.side == "down" else (self.width, self.dim)

    @property
    def label(self) -> str:
        """The key as files write it, without seed and kind, which they store once."""
        return f"{self.side}:{self.width}:{self.dim}"


def basis_keys(
    in_features: int, out_features: int, down_dim: int, up_dim: int, seed: int, kind: str
) -> tuple[BasisKey, BasisKey]:
    """Return the keys of a layer's two bases, each clipped to the layer's width."""
    down = BasisKey("down", in_features, min(down_dim, in_features), seed, kind)
    return down, BasisKey("up", out_features, min(up_dim, out_features), seed, kind)


def _hash_integers(name: str, count: int) -> np.ndarray:
    """Return ``count`` int32 from the SHAKE-256 stream of ``name``; integers are exact everywhere."""
    stream = hashlib.shake_256(f"lidb:{BASIS_VERSION}:{name}".encode()).digest(4 * count)
    return np.frombuffer(stream, dtype="<i4")


def _basis_integers(key: BasisKey) -> np.ndarray:
    return _hash_integers(f"{key.seed}:{key.label}", key.width * key.dim)


@lru_cache(maxsize=1024)
def basis_fingerprint(key: BasisKey) -> str:
    """Return 16 hex digits of the SHA-256 of the basis' integer stream."""
    return hashlib.sha256(_basis_integers(key).tobytes()).hexdigest()[:16]


@lru_cache(maxsize=256)
def get_basis(key: BasisKey, device: torch.device) -> Tensor:
    """Return the float32 basis of ``key`` on ``device``, one shared tensor per key and device.

    ``down``: ``(dim, width)``, orthonormal rows. ``up``: ``(width, dim)``, orthonormal columns.

    Raises:
        ValueError: the kind is not known, or ``dim`` is larger than ``width``.
    """
    if device.type == "meta":
        return torch.empty(key.shape, device=device)
    # A tensor made in inference mode could never be used in training, and this one outlives its caller.
    with torch.inference_mode(False), torch.no_grad():
        if device.type != "cpu":
            return get_basis(key, torch.device("cpu")).to(device)
        if key.kind in _stored:
            return _stored[key.kind]
        return _build_basis(key)


def find_basis(key: BasisKey, device: torch.device, bases: Mapping[str, Tensor] | None) -> Tensor:
    """Return the basis of ``key``: out of learned ``bases``, by label, if there are any, or else the frozen one.

    Raises:
        ValueError: ``bases`` lacks it, or has it in another shape.
    """
    if bases is None:
        return get_basis(key, device)
    if key.label not in bases or tuple(bases[key.label].shape) != key.shape:
        raise ValueError(
            f"the learned bases have no {key.label} basis of shape {key.shape}; pass those that were learned here"
        )
    return bases[key.label].to(device, torch.float32)


def _build_basis(key: BasisKey) -> Tensor:
    if key.kind not in BASIS_KINDS:
        raise ValueError(f"the basis kind is {key.kind!r}; known kinds: {', '.join(BASIS_KINDS)}")
    if not 0 < key.dim <= key.width:
        raise ValueError(f"a basis of {key.dim} vectors does not fit a width of {key.width}; choose 1 to {key.width}")
    integers = _basis_integers(key).astype(np.float64).reshape(key.width, key.dim)
    rows = _orthonormal_rows(integers.T / 2.0**31).astype(np.float32)
    return torch.from_numpy(rows if key.side == "down" else np.ascontiguousarray(rows.T))


def _orthonormal_rows(rows: np.ndarray) -> np.ndarray:
    """Return float64 ``(dim, width)`` with the rows' span, by Gram-Schmidt (modified: float32 needs no second pass)."""
    rows = np.ascontiguousarray(rows)
    for index, row in enumerate(rows):
        row /= np.sqrt(_ordered_sum(row * row))
        rest = rows[index + 1 :]
        rest -= _ordered_sum(rest * row)[:, None] * row
    return rows


def _ordered_sum(terms: np.ndarray) -> np.ndarray:
    """Sum over the last axis by adding halves; numpy's own sum and dot choose the order by processor."""
    while (count := terms.shape[-1]) > 1:
        halves = terms[..., : count // 2] + terms[..., count // 2 : count - count % 2]
        if count % 2:
            halves[..., 0] += terms[..., -1]
        terms = halves
    return terms[..., 0]


def basis_probes(basis: Tensor) -> Tensor:
    """Return a few entries of a basis, float32 on the CPU, spread over it by a stride prime to its sides."""
    flat = basis.detach().reshape(-1)
    positions = [(7919 * i + 13) % flat.numel() for i in range(_NUM_PROBES)]
    return flat[positions].to("cpu", torch.float32)


def check_basis(key: BasisKey, fingerprint: str, probes: Tensor, source: str) -> None:
    """Compare a file's record of a basis with the one built here.

    Raises:
        ValueError: another integer stream, or the same one orthonormalised to other values.
    """
    if fingerprint != basis_fingerprint(key):
        raise ValueError(
            f"{source} was made with another {key.label} basis (fingerprint {printable(fingerprint)}, here "
            f"{basis_fingerprint(key)}); load it with the version of lidb-peft that wrote it"
        )
    ours = basis_probes(get_basis(key, torch.device("cpu")))
    # A checkpoint that somebody has rounded to half precision keeps its probes no better than that.
    tolerance = PROBE_TOLERANCE if probes.dtype in (torch.float32, torch.float64) else torch.finfo(probes.dtype).eps
    if probes.shape != ours.shape or not torch.allclose(probes.float().cpu(), ours, rtol=0.0, atol=tolerance):
        raise ValueError(
            f"{source} records other values of the {key.label} basis than this machine computes from the same "
            "integers; save it again with save_projection=True where it was made"
        )


_stored: dict[str, Tensor] = {}


def store_basis(key: BasisKey, basis: Tensor) -> BasisKey:
    """Keep a basis that came with a checkpoint; return the key under which ``get_basis`` gives it.

    ``key`` itself is returned if the basis is, to the last bit, the one that ``key`` builds.

    Raises:
        ValueError: the stored basis has another shape, or entries that are not finite.
    """
    if tuple(basis.shape) != key.shape:
        raise ValueError(f"the stored {key.label} basis has shape {tuple(basis.shape)}; expected {key.shape}")
    basis = basis.detach().to("cpu", torch.float32).contiguous().clone()
    if not torch.isfinite(basis).all():
        raise ValueError(f"the stored {key.label} basis holds values that are not finite; the file is damaged")
    if torch.equal(basis, get_basis(key, torch.device("cpu"))):
        return key
    kind = "stored:" + hashlib.sha256(basis.numpy().tobytes()).hexdigest()[:32]
    _stored[kind] = basis
    return key._replace(kind=kind)


def given_bases(keys: Iterable[BasisKey]) -> dict[BasisKey, Tensor]:
    """Return those of the bases that were given from outside and cannot be rebuilt."""
    return {key: _stored[key.kind] for key in keys if key.kind in _stored}


def remember_bases(given: Mapping[BasisKey, Tensor]) -> None:
    """Keep bases that `given_bases` returned, perhaps in another process."""
    for key, basis in given.items():
        _stored.setdefault(key.kind, basis)


@lru_cache(maxsize=1024)
def starting_down(r: int, dim: int, seed: int) -> Tensor:
    """Return the shared starting ``down`` ``(r, dim)``: fixed, never zero, every row of norm 1.

    With ``up`` at zero the update is zero, yet no gradient is dead, and all fits start at the same point.
    """
    with torch.inference_mode(False):
        rows = _hash_integers(f"{seed}:start:{r}:{dim}", r * dim).astype(np.float64).reshape(r, dim)
        # fsum is exact, so that the order of summation, which differs between processors, does not matter.
        norms = np.array([[math.sqrt(math.fsum(value * value for value in row))] for row in rows.tolist()])
        return torch.from_numpy((rows / norms).astype(np.float32))
