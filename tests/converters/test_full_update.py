"""LoHa, LoKr and differences against formulas written out in NumPy, index by index."""

import numpy as np
import pytest
import torch

from converters.full_update import FullUpdate, SumOfUpdates
from converters.layer import LoraLayer


def random(**shapes):
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def arrays(parts):
    return {name: tensor.double().numpy() for name, tensor in parts.items()}


def tucker(core, left, right):
    """``sum_ij core[i, j] left[i, out] right[j, in]``, for each place of the kernel."""
    ranks, kernel = core.shape[:2], core.shape[2:]
    found = np.zeros((left.shape[1], right.shape[1], *kernel))
    for i in range(ranks[0]):
        for j in range(ranks[1]):
            found += np.einsum("o,n->on", left[i], right[j])[:, :, None, None] * core[i, j]
    return found


def kronecker(first, second):
    """Block (a, b) is ``first[a, b] * second``."""
    rows = [np.concatenate([value * second for value in row], axis=1) for row in first]
    return np.concatenate(rows, axis=0)


def test_loha_is_the_product_number_by_number_of_two_products():
    parts = random(hada_w1_a=(6, 2), hada_w1_b=(2, 8), hada_w2_a=(6, 2), hada_w2_b=(2, 8))
    a = arrays(parts)
    expected = 0.5 * (a["hada_w1_a"] @ a["hada_w1_b"]) * (a["hada_w2_a"] @ a["hada_w2_b"])
    np.testing.assert_allclose(FullUpdate("LoHa", parts, 1.0).delta(), expected, rtol=1e-12)


def test_loha_of_a_convolution_has_tucker_cores():
    parts = random(hada_w1_a=(2, 6), hada_w1_b=(2, 8), hada_w2_a=(2, 6), hada_w2_b=(2, 8), hada_t1=(2, 2, 3, 3),
                   hada_t2=(2, 2, 3, 3))  # fmt: skip
    a = arrays(parts)
    first, second = (tucker(a[f"hada_t{i}"], a[f"hada_w{i}_a"], a[f"hada_w{i}_b"]) for i in (1, 2))
    update = FullUpdate("LoHa", parts, 4.0)
    assert update.shape == (6, 8, 3, 3)
    np.testing.assert_allclose(update.delta(), 2 * first * second, rtol=1e-9)


@pytest.mark.parametrize("first", ["whole", "factors"])
@pytest.mark.parametrize("second", ["whole", "factors"])
def test_lokr_is_a_kronecker_product_and_divides_alpha_by_the_rank_of_its_factors(first, second):
    parts = random(lokr_w1=(2, 4)) if first == "whole" else random(lokr_w1_a=(2, 3), lokr_w1_b=(3, 4))
    parts |= random(lokr_w2=(3, 2)) if second == "whole" else random(lokr_w2_a=(3, 3), lokr_w2_b=(3, 2))
    a = arrays(parts)
    w1, w2 = (a[w] if w in a else a[f"{w}_a"] @ a[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
    scale = 1.0 if first == second == "whole" else 1.5 / 3
    np.testing.assert_allclose(FullUpdate("LoKr", parts, 1.5).delta(), scale * kronecker(w1, w2), rtol=1e-12)


def test_lokr_of_a_convolution_flattened_or_not_is_the_same_update():
    w1, w2 = torch.randn(2, 4), torch.randn(3, 2, 3, 3)
    whole = FullUpdate("LoKr", {"lokr_w1": w1, "lokr_w2": w2}).delta()
    flat = FullUpdate("LoKr", {"lokr_w1": w1, "lokr_w2": w2.flatten(1)}).delta()
    assert whole.shape == (6, 8, 3, 3)
    assert torch.equal(whole.flatten(1), flat)
    for y, x in np.ndindex(3, 3):
        np.testing.assert_allclose(whole[:, :, y, x], kronecker(w1.double().numpy(), w2[:, :, y, x].double().numpy()))


def test_a_difference_is_itself_whatever_its_alpha():
    diff = torch.randn(6, 8, 3, 3).half()
    assert torch.equal(FullUpdate("full difference", {"diff": diff}, 3.0).delta(), diff.double())


def test_a_sum_is_that_of_its_weighted_terms_in_the_shape_of_the_first():
    plain = LoraLayer(torch.randn(2, 8, 3, 3), torch.randn(6, 2, 1, 1), 1.0)
    diff = FullUpdate("full difference", {"diff": torch.randn(6, 72)})
    inner = SumOfUpdates(((diff, 2.0),))
    expected = -0.5 * torch.einsum("or,rihw->oihw", plain.lora_B[:, :, 0, 0], plain.lora_A) / 2
    expected = expected.double() + 6.0 * diff.delta().view(6, 8, 3, 3)
    assert torch.allclose(SumOfUpdates(((plain, -0.5), (inner, 3.0))).delta(), expected, atol=1e-5)
    dora = LoraLayer(plain.lora_A, plain.lora_B, 1.0, torch.ones(6))
    with pytest.raises(ValueError, match="is DoRA"):
        SumOfUpdates(((dora, 1.0), (diff, 1.0)))


@pytest.mark.parametrize(
    ("algorithm", "parts", "message"),
    [
        ("LoHa", random(hada_w1_a=(6, 2), hada_w1_b=(2, 8), hada_w2_a=(6, 2)), "no hada_w2_b; the file is incomplete"),
        ("LoHa", random(hada_w1_a=(6, 2), hada_w1_b=(3, 8), hada_w2_a=(6, 2), hada_w2_b=(2, 8)), r"w1_a \(6, 2\)"),
        ("LoKr", random(lokr_w1=(2, 4)), "no lokr_w2_a"),
        ("LoKr", {"lokr_w1": torch.ones(2**15, 1), "lokr_w2": torch.ones(2**15, 1)}, "more numbers than any layer has"),
        ("LoHa", random(**dict.fromkeys(("hada_w1_a", "hada_w2_a"), (2**15, 1)),
                        **dict.fromkeys(("hada_w1_b", "hada_w2_b"), (1, 2**15))), "which is that of no layer"),
        ("full difference", {"diff": torch.ones(2, 2, dtype=torch.int8)}, "diff of torch.int8"),
        ("full difference", {"diff": torch.full((2, 2), torch.nan)}, "NaN or infinity"),
        ("full difference", {"diff": torch.ones(0, 2)}, "which is that of no layer"),
    ],
)  # fmt: skip
def test_what_is_incomplete_or_does_not_fit_is_refused(algorithm, parts, message):
    with pytest.raises(ValueError, match=message):
        FullUpdate(algorithm, parts)
