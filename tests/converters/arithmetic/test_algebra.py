import math

import pytest
import torch

from converters.arithmetic.algebra import find_rank, matrices, merge, relative_errors, resize, update_norm
from converters.lora import Lora, LoraLayer

LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "unet.down_blocks.0.resnets.0.conv1"


def layer(rank, shape=(24, 40), alpha=None, dtype=torch.float32, kernel=(), seed=0, decay=1.0):
    """A random layer of ``(out, in)``; column i of up shrinks by ``decay`` to the i-th."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, shape[1], *kernel, generator=generator)
    up = torch.randn(shape[0], rank, generator=generator) * decay ** torch.arange(rank)
    up = up.reshape(*up.shape, *(1 for _ in kernel))
    return LoraLayer(down.to(dtype), up.to(dtype), float(alpha or rank))


def lora(family="sd1", **layers):
    names = {"linear": LINEAR, "wide": WIDE, "conv": CONV}
    return Lora(
        {names[name]: value for name, value in layers.items()},
        family,
        {"ss_output_name": "a", "ss_v2": "False", "ss_seed": str(len(layers))},
    )


def dense(layer):
    """alpha / rank * up @ down as one float64 matrix, kernels flattened."""
    down, up = layer.lora_A.double().flatten(1), layer.lora_B.double().flatten(1)
    return layer.alpha / len(down) * (up @ down)


def close(found, expected, tolerance=1e-6):
    return (found - expected).norm() <= tolerance * expected.norm()


def best(matrix, rank):
    """The nearest matrix of that rank and how far it is, by the full SVD."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * singular[:rank] @ right[:rank], (singular[rank:].norm() / singular.norm()).item()


@pytest.mark.parametrize("options", [{}, {"kernel": (3, 3)}, {"kernel": (1, 1)}, {"alpha": 3}, {"shape": (5, 40)}])
def test_a_resized_layer_is_the_nearest_of_its_rank(options):
    source = lora(linear=layer(8, **options))
    resized, errors = resize(source, rank=3)
    expected, error = best(dense(source.layers[LINEAR]), 3)
    found = resized.layers[LINEAR]
    assert close(dense(found), expected)
    assert errors[LINEAR] == pytest.approx(error, rel=1e-9)
    assert (found.rank, found.alpha) == (3, 3.0)
    assert found.lora_A.shape[1:] == source.layers[LINEAR].lora_A.shape[1:]
    assert found.lora_B.shape[2:] == source.layers[LINEAR].lora_B.shape[2:]
    assert (resized.family, resized.metadata) == ("sd1", {"ss_v2": "False", "ss_seed": "1"})


def test_half_precision_goes_in_and_comes_out_and_only_its_rounding_is_lost():
    source = lora(linear=layer(8, dtype=torch.float16))
    resized, _ = resize(source, rank=4)
    found = resized.layers[LINEAR]
    assert found.lora_A.dtype == found.lora_B.dtype == torch.float16
    expected, _ = best(dense(source.layers[LINEAR]), 4)
    assert close(dense(found), expected, 1e-3)
    assert resize(source, rank=4, dtype=torch.float32)[0].layers[LINEAR].lora_A.dtype == torch.float32


def test_updates_far_from_one_keep_half_precisions_digits():
    source = lora(linear=layer(8))
    small, _ = merge([(source, 1e-6)], dtype=torch.float16)
    assert max(relative_errors(small, merge([(source, 1e-6)])[0]).values()) < 1e-3


def test_a_layer_that_is_narrow_enough_keeps_its_bits():
    source = lora(linear=layer(8, dtype=torch.bfloat16), wide=layer(2, alpha=1, dtype=torch.bfloat16))
    resized, errors = resize(source, rank=4)
    assert torch.equal(resized.layers[WIDE].lora_B, source.layers[WIDE].lora_B)
    assert (resized.layers[WIDE].alpha, errors[WIDE]) == (1.0, 0.0)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_the_rank_for_an_energy_is_the_lowest_at_which_every_layer_keeps_it(energy):
    source = lora(linear=layer(8, decay=0.5), wide=layer(8, shape=(30, 20), decay=0.8, seed=1))
    rank = find_rank(source, energy)

    def kept(name, rank):
        return 1 - best(dense(source.layers[name]), rank)[1] ** 2

    assert all(kept(name, rank) >= energy for name in source.layers)
    assert rank == 1 or any(kept(name, rank - 1) < energy for name in source.layers)
    resized, errors = resize(source, energy=energy)
    assert {layer.rank for layer in resized.layers.values()} == {rank}
    assert max(errors.values()) <= math.sqrt(1 - energy)


def test_all_energy_is_the_true_rank():
    doubled, _ = merge([(lora(linear=layer(4)), 0.5), (lora(linear=layer(4)), 0.5)])
    assert doubled.layers[LINEAR].rank == 8
    assert find_rank(doubled, 1 - 1e-12) == 4


def test_a_layer_that_changes_nothing_can_be_resized():
    empty = LoraLayer(torch.randn(4, 6), torch.zeros(5, 4), 4.0)
    resized, errors = resize(lora(linear=empty), rank=2)
    assert errors == {LINEAR: 0.0}
    assert not dense(resized.layers[LINEAR]).any()


def test_resizing_dora_keeps_its_magnitudes():
    plain = layer(8)
    dora = LoraLayer(plain.lora_A, plain.lora_B, plain.alpha, torch.rand(24))
    resized, _ = resize(lora(linear=dora), rank=2)
    assert torch.equal(resized.layers[LINEAR].magnitude, dora.magnitude)


def test_a_merge_is_the_weighted_sum_of_the_updates():
    first = lora(linear=layer(3, alpha=1), conv=layer(2, kernel=(3, 3)))
    second = lora("", linear=layer(5, seed=1), wide=layer(4, shape=(10, 10)))
    second.metadata["ss_seed"] = "7"
    merged, errors = merge([(first, 0.7), (second, -1.5)])
    expected = 0.7 * dense(first.layers[LINEAR]) - 1.5 * dense(second.layers[LINEAR])
    found = merged.layers[LINEAR]
    assert close(dense(found), expected)
    assert (found.rank, found.alpha) == (8, 8.0)
    assert close(dense(merged.layers[CONV]), 0.7 * dense(first.layers[CONV]))
    assert close(dense(merged.layers[WIDE]), -1.5 * dense(second.layers[WIDE]))
    assert (merged.family, merged.metadata) == ("sd1", {"ss_v2": "False"})
    assert set(errors.values()) == {0.0}


def test_a_sum_is_cut_to_the_nearest_of_its_rank():
    first, second = lora(linear=layer(3)), lora(linear=layer(5, seed=1), wide=layer(2))
    merged, errors = merge([(first, 0.7), (second, 1.0)], rank=4)
    expected, error = best(0.7 * dense(first.layers[LINEAR]) + dense(second.layers[LINEAR]), 4)
    assert close(dense(merged.layers[LINEAR]), expected)
    assert errors == {LINEAR: pytest.approx(error, rel=1e-9), WIDE: 0.0}
    assert torch.equal(merged.layers[WIDE].lora_B, second.layers[WIDE].lora_B)


def test_a_linear_layer_and_a_1x1_convolution_are_added():
    merged, _ = merge([(lora(linear=layer(2, kernel=(1, 1))), 1.0), (lora(linear=layer(2, seed=1)), 1.0)])
    assert merged.layers[LINEAR].lora_A.shape == (4, 40, 1, 1)
    assert close(dense(merged.layers[LINEAR]), dense(layer(2)) + dense(layer(2, seed=1)))


def test_a_lora_minus_itself_is_nothing_and_merging_half_with_whole_widens():
    half, whole = lora(linear=layer(3, dtype=torch.float16)), lora(linear=layer(3))
    assert merge([(half, 1.0), (whole, 1.0)])[0].layers[LINEAR].lora_A.dtype == torch.float32
    difference = merge([(whole, 1.0), (whole, -1.0)])[0].layers[LINEAR]
    assert update_norm(*matrices(difference)) < 1e-5


def test_norms_and_errors_are_those_of_the_dense_updates():
    first, second = lora(linear=layer(3, alpha=7)), lora(linear=layer(6, seed=3), conv=layer(1, kernel=(3, 3)))
    a, b = dense(first.layers[LINEAR]), dense(second.layers[LINEAR])
    assert update_norm(*matrices(first.layers[LINEAR])) == pytest.approx(a.norm().item(), rel=1e-12)
    assert relative_errors(first, second)[LINEAR] == pytest.approx(((a - b).norm() / b.norm()).item(), rel=1e-12)
    assert relative_errors(first, second)[CONV] == pytest.approx(1)
    assert relative_errors(second, first)[CONV] == math.inf
    assert relative_errors(first, first)[LINEAR] < 1e-14


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merge([]), "no LoRAs to merge"),
        (lambda: merge([(lora(linear=layer(2)), math.nan)]), "weight nan"),
        (lambda: merge([(lora(linear=layer(2)), 1.0), (lora("sdxl", linear=layer(2)), 1.0)]), "for sd1 and sdxl"),
        (lambda: merge([(lora(linear=layer(2)), 1.0), (lora(linear=layer(2, (9, 9))), 1.0)]), r"\(9, 9\), \(24, 40\)"),
        (lambda: merge([(lora(linear=LoraLayer(*layer(2).tensors(), 1.0, torch.ones(24))), 0.5)]), "is DoRA"),
        (lambda: resize(lora(linear=layer(2))), "either a rank or a share"),
        (lambda: resize(lora(linear=layer(2)), rank=1, energy=0.5), "either a rank or a share"),
        (lambda: resize(lora(linear=layer(2)), rank=0), "rank is 0"),
        (lambda: resize(lora(linear=layer(2)), energy=1.5), "energy to keep is 1.5"),
    ],
)
def test_what_cannot_be_done_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
