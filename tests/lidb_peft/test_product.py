import pytest
import torch

from lidb_peft.product import add_low_rank, lidb_to_lora


def _weights(*batch, r=2, a=6, b=5, in_features=11, out_features=9):
    generator = torch.Generator().manual_seed(0)
    shapes = (*batch, r, a), (*batch, b, r), (a, in_features), (out_features, b)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_the_factors_multiply_to_the_papers_product():
    down, up, down_aux, up_aux = _weights()
    lora_A, lora_B = lidb_to_lora(down, up, down_aux, up_aux, scale=0.5)
    # the paper's row convention, y = xW: dW = A_aux A_train B_train B_aux
    paper = down_aux.T.double() @ down.T.double() @ up.T.double() @ up_aux.T.double()
    assert torch.allclose((lora_B @ lora_A).double(), 0.5 * paper.T, rtol=1e-5, atol=1e-5)


def test_a_batch_equals_one_at_a_time():
    down, up, down_aux, up_aux = _weights(3)
    lora_A, lora_B = lidb_to_lora(down, up, down_aux, up_aux)
    assert lora_A.shape == (3, 2, 11)
    assert lora_B.shape == (3, 9, 2)
    for i in range(3):
        one_A, one_B = lidb_to_lora(down[i], up[i], down_aux, up_aux)
        assert torch.allclose(lora_A[i], one_A, atol=1e-6)
        assert torch.allclose(lora_B[i], one_B, atol=1e-6)


def test_low_rank_forward_equals_the_dense_product():
    lora_A, lora_B = lidb_to_lora(*_weights())
    x, output = torch.randn(4, 7, 11), torch.randn(4, 7, 9)
    assert torch.allclose(add_low_rank(output, x, lora_A, lora_B), output + x @ (lora_B @ lora_A).T, atol=1e-4)


@pytest.mark.parametrize("leading", [(6,), (6, 7), (6, 3, 2)])
def test_sample_j_uses_identity_j_over_k(leading):
    lora_A, lora_B = lidb_to_lora(*_weights(3))
    x, output = torch.randn(*leading, 11), torch.randn(*leading, 9)
    result = add_low_rank(output, x, lora_A, lora_B)
    for j in range(6):
        dense = lora_B[j // 2] @ lora_A[j // 2]
        assert torch.allclose(result[j], output[j] + x[j] @ dense.T, atol=1e-4)


def test_factors_are_cast_to_the_dtype_of_the_output():
    lora_A, lora_B = lidb_to_lora(*_weights())
    x, output = torch.randn(2, 11).bfloat16(), torch.zeros(2, 9).bfloat16()
    assert add_low_rank(output, x, lora_A, lora_B).dtype == torch.bfloat16


def test_unfitting_shapes_are_refused_in_words():
    down, up, down_aux, up_aux = _weights()
    with pytest.raises(ValueError, match="down has rank 1 but up has rank 2"):
        lidb_to_lora(down[:1], up, down_aux, up_aux)
    with pytest.raises(ValueError, match="down has 6 columns but down_aux has 5 rows"):
        lidb_to_lora(down, up, down_aux[:5], up_aux)
    with pytest.raises(ValueError, match="up has 5 rows but up_aux has 4 columns"):
        lidb_to_lora(down, up, down_aux, up_aux[:, :4])
    with pytest.raises(ValueError, match="5 samples for 3 identities"):
        add_low_rank(torch.zeros(5, 9), torch.zeros(5, 11), *lidb_to_lora(*_weights(3)))
