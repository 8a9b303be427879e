import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from converters.arithmetic.algebra import matrices, merge, relative_errors, resize, update_norm
from converters.arithmetic.ranks import MEASURES, RankRule
from converters.convert import prepare_writing
from converters.formats.reading import read_lora
from converters.layer import LoraLayer
from converters.lora import Lora

LINEAR = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "unet.down_blocks.0.resnets.0.conv1"
ATTENTION = {
    LINEAR.replace("attn1.to_q", f"attn2.{name}"): (32, width)
    for name, width in (("to_q", 32), ("to_k", 768), ("to_v", 768), ("to_out.0", 32))
}


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
    resized, errors = resize(source, 3)
    expected, error = best(dense(source.layers[LINEAR]), 3)
    found = resized.layers[LINEAR]
    assert close(dense(found), expected)
    assert errors[LINEAR] == pytest.approx(error, rel=1e-9)
    assert (found.rank, found.alpha) == (3, source.layers[LINEAR].alpha)
    assert found.lora_A.shape[1:] == source.layers[LINEAR].lora_A.shape[1:]
    assert found.lora_B.shape[2:] == source.layers[LINEAR].lora_B.shape[2:]
    assert (resized.family, resized.metadata) == ("sd1", {"ss_v2": "False", "ss_seed": "1"})


def test_half_precision_goes_in_and_comes_out_and_only_its_rounding_is_lost():
    source = lora(linear=layer(8, dtype=torch.float16))
    resized, _ = resize(source, 4)
    found = resized.layers[LINEAR]
    assert found.lora_A.dtype == found.lora_B.dtype == torch.float16
    expected, _ = best(dense(source.layers[LINEAR]), 4)
    assert close(dense(found), expected, 1e-3)
    assert resize(source, 4, dtype=torch.float32)[0].layers[LINEAR].lora_A.dtype == torch.float32


def test_updates_far_from_one_keep_half_precisions_digits():
    source = lora(linear=layer(8))
    small, _ = merge([(source, 1e-6)], dtype=torch.float16)
    assert max(relative_errors(small, merge([(source, 1e-6)])[0]).values()) < 1e-3


def test_a_layer_that_is_narrow_enough_keeps_its_bits():
    source = lora(linear=layer(8, dtype=torch.bfloat16), wide=layer(2, alpha=1, dtype=torch.bfloat16))
    resized, errors = resize(source, 4)
    assert torch.equal(resized.layers[WIDE].lora_B, source.layers[WIDE].lora_B)
    assert (resized.layers[WIDE].alpha, errors[WIDE]) == (1.0, 0.0)


def kept_share(matrix, rank, measure):
    """What the nearest matrix of that rank keeps, as kohya's resize_lora.py measures it."""
    singular = torch.linalg.svdvals(matrix)
    power = {"energy": 2, "sv_fro": 2, "sv_cumulative": 1}[measure]
    share = (singular[:rank] ** power).sum() / (singular**power).sum()
    return (share.sqrt() if measure == "sv_fro" else share).item()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("amount", [0.3, 0.9, 0.999])
def test_every_layer_has_the_lowest_rank_that_keeps_what_is_asked_for(measure, amount):
    source = lora(linear=layer(8, decay=0.5), wide=layer(8, shape=(30, 20), decay=0.8, seed=1),
                  conv=layer(6, kernel=(3, 3), decay=0.7, seed=2))  # fmt: skip
    amount = 1 / amount if measure == "sv_ratio" else amount
    resized, errors = resize(source, RankRule(measure=measure, amount=amount))
    for name, found in resized.layers.items():
        full = dense(source.layers[name])
        if measure == "sv_ratio":
            singular = torch.linalg.svdvals(full)
            assert found.rank == (singular > singular[0] / amount).sum()
        else:
            assert kept_share(full, found.rank, measure) >= amount - 1e-12
            assert found.rank == 1 or kept_share(full, found.rank - 1, measure) < amount
        expected, error = best(full, found.rank)
        assert close(dense(found), expected)
        assert errors[name] == pytest.approx(error, rel=1e-6, abs=1e-12)


def test_ranks_are_limits_and_convolutions_have_their_own():
    source = lora(linear=layer(16, decay=0.9), wide=layer(5), conv=layer(8, kernel=(3, 3)))

    def ranks(**rule):
        return [found.rank for found in resize(source, RankRule(**rule))[0].layers.values()]

    assert ranks(rank=12) == [12, 5, 8]
    assert ranks(rank=12, conv_rank=2) == [12, 5, 2]
    assert ranks(conv_rank=2) == [16, 5, 2]
    assert ranks(rank=4, measure="energy", amount=1.0) == [4, 4, 4]


def test_all_energy_is_the_true_rank():
    doubled, _ = merge([(lora(linear=layer(4)), 0.5), (lora(linear=layer(4)), 0.5)])
    assert doubled.layers[LINEAR].rank == 8
    assert resize(doubled, RankRule(measure="energy", amount=1 - 1e-12))[0].layers[LINEAR].rank == 4


@pytest.mark.parametrize("alphas", [(6, 1), (8, 8), (16, 2)])
def test_a_locon_becomes_smaller_and_keeps_its_ranks_alphas_and_dtype(tmp_path, alphas):
    half = torch.float16
    convolutions = {f"unet.down_blocks.0.resnets.{i}.conv{j}": layer(2, (32, 32), alphas[1], half, (3, 3), seed=i + j)
                    for i in range(2) for j in (1, 2)}  # fmt: skip
    linear = {name: layer(16, shape, alphas[0], half) for name, shape in ATTENTION.items()}
    linear[WIDE] = layer(16, (32, 32), alphas[0], half)
    big, small = tmp_path / "big.safetensors", tmp_path / "small.safetensors"
    save_kohya_layers(big, linear | convolutions)
    before = read_lora(big)
    resized, _ = resize(before, 12)
    prepare_writing(resized, [big], small).write()
    after = read_lora(small)
    assert small.stat().st_size < big.stat().st_size
    assert {found.lora_A.dtype for found in after.layers.values()} == {half}
    for name, found in after.layers.items():
        assert found.rank == (2 if name in convolutions else 12)
        assert found.alpha == before.layers[name].alpha
        expected, _ = best(dense(before.layers[name]), 12)
        assert close(dense(found), expected, 1e-3)
        assert name not in convolutions or torch.equal(found.lora_B, before.layers[name].lora_B)


def test_one_attention_among_more_convolutions_is_resized_in_the_dtype_that_it_has(tmp_path):
    """diffusers takes the commonest alpha for the attention's; giving all its alpha must not make them float32."""
    half = torch.float16
    layers = {f"unet.down_blocks.0.resnets.{i}.conv{j}": layer(2, (8, 8), 1, half, (3, 3), seed=i + j)
              for i in range(2) for j in (1, 2)}  # fmt: skip
    layers[LINEAR] = layer(16, (32, 32), 6, half)
    big, small = tmp_path / "big.safetensors", tmp_path / "small.safetensors"
    save_kohya_layers(big, layers)
    conversion = prepare_writing(resize(read_lora(big), 12)[0], [big], small)
    assert not any("float32" in note for note in conversion.notes)
    conversion.write()
    assert small.stat().st_size < big.stat().st_size
    after = read_lora(small).layers
    assert {found.lora_A.dtype for found in after.values()} == {half}
    assert {name: found.rank for name, found in after.items()} == dict.fromkeys(layers, 2) | {LINEAR: 12}
    for name, found in after.items():
        assert close(dense(found), best(dense(layers[name]), 12)[0], 1e-3)


def save_kohya_layers(path, layers):
    tensors = {}
    for name, found in layers.items():
        stem = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": found.lora_A, f"{stem}.lora_up.weight": found.lora_B,
                    f"{stem}.alpha": torch.tensor(found.alpha)}  # fmt: skip
    save_file(tensors, path, {"ss_base_model_version": "sd_v1"})


def test_a_merge_gives_attentions_the_one_alpha_that_diffusers_needs(tmp_path):
    half = torch.float16
    first = {name: layer(4, shape, 4, half, seed=1) for name, shape in ATTENTION.items()}
    second = {name: layer(5, ATTENTION[name], 1, half, seed=2) for name in list(ATTENTION)[:3]}
    for path, layers in (("a.safetensors", first), ("b.safetensors", second)):
        save_kohya_layers(tmp_path / path, layers)
    sources = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    merged, _ = merge([(read_lora(sources[0]), 0.7), (read_lora(sources[1]), 1.0)])
    prepare_writing(merged, sources, tmp_path / "both.safetensors").write()
    written = read_lora(tmp_path / "both.safetensors")
    assert sorted(found.rank for found in written.layers.values()) == [4, 9, 9, 9]
    assert len({found.alpha for found in written.layers.values()}) == 1
    assert {found.lora_B.dtype for found in written.layers.values()} == {half}
    for name, found in written.layers.items():
        expected = 0.7 * dense(first[name]) + (dense(second[name]) if name in second else 0)
        assert close(dense(found), expected, 1e-3)


@st.composite
def loras(draw):
    """A LoRA of some of three layers, with ranks, alphas, dtypes and kernels of their own."""
    layers = {}
    for name, shape, kernel in (("linear", (12, 9), ()), ("wide", (7, 11), (1, 1)), ("conv", (8, 5), (3, 3))):
        if draw(st.booleans()) or not layers:
            dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
            alpha = draw(st.sampled_from([0.5, 1, 3, 4, 16, -2]))
            layers[name] = layer(draw(st.integers(1, 6)), shape, alpha, dtype, kernel, draw(st.integers(0, 99)))
    return lora(**layers)


@given(st.lists(st.tuples(loras(), st.floats(-2, 2, allow_subnormal=False)), min_size=1, max_size=3))
def test_any_weighted_merge_is_the_dense_sum(parts):
    merged, errors = merge(parts, dtype=torch.float32)
    assert not any(errors.values())
    for name, found in merged.layers.items():
        terms = [weight * dense(part.layers[name]) for part, weight in parts if name in part.layers]
        scale = sum(term.norm() for term in terms)
        assert (dense(found) - sum(terms)).norm() <= 1e-5 * scale + 1e-30


@given(
    loras(), st.integers(1, 6), st.none() | st.integers(1, 3), st.sampled_from(["", *MEASURES[:3]]), st.floats(0.1, 1)
)
def test_any_resized_layer_is_its_truncated_svd(source, rank, conv_rank, measure, amount):
    resized, errors = resize(source, RankRule(rank, conv_rank, measure, amount if measure else 0.0), torch.float32)
    for name, found in resized.layers.items():
        limit = conv_rank or rank if name == CONV else rank
        assert found.rank <= min(limit, source.layers[name].rank)
        expected, error = best(dense(source.layers[name]), found.rank)
        assert (dense(found) - expected).norm() <= 1e-5 * expected.norm() + 1e-30
        assert errors[name] == pytest.approx(error, rel=1e-5, abs=1e-7)


def test_a_layer_that_changes_nothing_can_be_resized():
    empty = LoraLayer(torch.randn(4, 6), torch.zeros(5, 4), 4.0)
    resized, errors = resize(lora(linear=empty), 2)
    assert errors == {LINEAR: 0.0}
    assert not dense(resized.layers[LINEAR]).any()


def test_resizing_dora_keeps_its_magnitudes():
    plain = layer(8)
    dora = LoraLayer(plain.lora_A, plain.lora_B, plain.alpha, torch.rand(24))
    resized, _ = resize(lora(linear=dora), 2)
    assert torch.equal(resized.layers[LINEAR].magnitude, dora.magnitude)


def test_a_merge_is_the_weighted_sum_of_the_updates():
    first = lora(linear=layer(3, alpha=1), conv=layer(2, kernel=(3, 3)))
    second = lora("", linear=layer(5, seed=1), wide=layer(4, shape=(10, 10)))
    second.metadata["ss_seed"] = "7"
    merged, errors = merge([(first, 0.7), (second, -1.5)])
    expected = 0.7 * dense(first.layers[LINEAR]) - 1.5 * dense(second.layers[LINEAR])
    found = merged.layers[LINEAR]
    assert close(dense(found), expected)
    assert found.rank == 8
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
        (lambda: RankRule(), "pass a rank, or what every layer is to keep"),
        (lambda: RankRule(conv_rank=0), "conv_rank is 0"),
        (lambda: RankRule(measure="sv", amount=0.5), "the measure is 'sv'"),
        (lambda: RankRule(measure="sv_ratio", amount=0.5), "the ratio to keep is 0.5"),
        (lambda: resize(lora(linear=layer(2)), rank=0), "rank is 0"),
        (lambda: RankRule(measure="energy", amount=1.5), "energy to keep is 1.5"),
    ],
)
def test_what_cannot_be_done_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
