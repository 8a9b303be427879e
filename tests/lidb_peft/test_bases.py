import hashlib
from decimal import Context, Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

from lidb_peft.bases import (
    BasisKey,
    basis_fingerprint,
    basis_keys,
    basis_probes,
    check_basis,
    get_basis,
    starting_down,
    store_basis,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("side", ["down", "up"])
def test_bases_are_orthonormal(side):
    basis = get_basis(BasisKey(side, 320, 100, 0), CPU).double()
    gram = basis @ basis.T if side == "down" else basis.T @ basis
    assert basis.dtype == torch.float64
    assert (gram - torch.eye(100)).abs().max() < 1e-6


@pytest.mark.parametrize(("width", "dim"), [(40, 12), (7, 7), (13, 1), (1, 1)])
def test_a_basis_is_the_orthonormalised_hash_stream_to_the_last_bit(width, dim):
    """Against Gram-Schmidt on integers read by hand, in exact arithmetic: no machine can come to other bits."""
    stream = hashlib.shake_256(f"lidb:1:5:up:{width}:{dim}".encode()).digest(width * dim * 4)
    integers = [int.from_bytes(stream[i : i + 4], "little", signed=True) for i in range(0, len(stream), 4)]
    columns = [[Fraction(value) for value in integers[j::dim]] for j in range(dim)]
    for j in range(dim):
        for other in columns[:j]:
            share = sum(a * b for a, b in zip(columns[j], other, strict=True)) / sum(a * a for a in other)
            columns[j] = [a - share * b for a, b in zip(columns[j], other, strict=True)]
    with localcontext(Context(prec=60)):
        exact = [[Decimal(a.numerator) / Decimal(a.denominator) for a in column] for column in columns]
        norms = [sum(a * a for a in column).sqrt() for column in exact]
        expected = np.array([[float(a / norm) for a in column] for column, norm in zip(exact, norms, strict=True)])
    assert np.array_equal(get_basis(BasisKey("up", width, dim, 5), CPU).numpy(), expected.T.astype(np.float32))


def test_seed_side_width_and_dim_give_other_bases():
    keys = [BasisKey("up", 40, 12, 0), BasisKey("up", 40, 12, 1), BasisKey("up", 41, 12, 0), BasisKey("up", 40, 11, 0)]
    assert len({basis_fingerprint(key) for key in keys}) == 4
    down, up = get_basis(BasisKey("down", 40, 12, 0), CPU), get_basis(BasisKey("up", 40, 12, 0), CPU)
    assert not torch.allclose(down.T, up, atol=1e-2)


def test_one_tensor_is_shared_and_meta_costs_nothing():
    key = BasisKey("down", 48, 16, 0)
    assert get_basis(key, CPU) is get_basis(BasisKey("down", 48, 16, 0), CPU)
    assert get_basis(key, torch.device("meta")).shape == (16, 48)


def test_global_generators_are_untouched():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    get_basis(BasisKey("down", 33, 7, 99), CPU)
    starting_down(2, 7, 99)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_a_basis_built_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        basis, start = get_basis(BasisKey("down", 31, 7, 3), CPU), starting_down(1, 7, 3)
    weight = torch.ones(1, 7, requires_grad=True)
    ((weight * start) @ basis).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_a_basis_is_clipped_to_the_width():
    down, up = basis_keys(20, 320, 100, 50, 0, "orthogonal")
    assert (down.dim, up.dim) == (20, 50)
    square = get_basis(down, CPU)
    assert torch.allclose(square @ square.T, torch.eye(20), atol=1e-6)


def test_the_starting_vector_is_never_zero_and_has_norm_one():
    start = starting_down(3, 50, 0)
    assert torch.allclose(start.norm(dim=1), torch.ones(3))
    assert not torch.equal(start, starting_down(3, 50, 1))
    assert torch.linalg.matrix_rank(start) == 3


def test_another_stream_or_other_values_are_refused():
    key = BasisKey("down", 40, 12, 0)
    probes = basis_probes(get_basis(key, CPU))
    check_basis(key, basis_fingerprint(key), probes + 1e-7, "file")
    with pytest.raises(ValueError, match="file was made with another down:40:12 basis"):
        check_basis(key, basis_fingerprint(key._replace(seed=1)), probes, "file")
    with pytest.raises(ValueError, match="records other values of the down:40:12 basis"):
        check_basis(key, basis_fingerprint(key), -probes, "file")


def test_a_stored_basis_is_used_instead_of_the_rebuilt_one():
    key = BasisKey("up", 40, 12, 0)
    assert store_basis(key, get_basis(key, CPU)) == key
    other = get_basis(key, CPU).flip(1)
    stored = store_basis(key, other)
    assert torch.equal(get_basis(stored, CPU), other)
    with pytest.raises(ValueError, match=r"has shape \(12, 40\); expected \(40, 12\)"):
        store_basis(key, other.T)
    with pytest.raises(ValueError, match="not finite"):
        store_basis(key, other * float("nan"))


def test_impossible_bases_are_refused():
    with pytest.raises(ValueError, match="a basis of 41 vectors does not fit a width of 40"):
        get_basis(BasisKey("up", 40, 41, 0), CPU)
    with pytest.raises(ValueError, match="the basis kind is 'psychic'"):
        get_basis(BasisKey("up", 40, 4, 0, "psychic"), CPU)
