import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.formats.kohya import load_kohya, save_kohya
from converters.key_maps import to_kohya_name
from converters.lora import balance
from converters.metadata import KohyaMetadata

SD1 = KohyaMetadata()
Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def true_deltas(factors, family="sd1"):
    return {to_kohya_name(name, family): b.double().numpy() @ a.double().numpy() for name, (a, b) in factors.items()}


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)]
)
def test_every_delta_in_the_file_is_the_factors_own(tmp_path, random_factors, sd1_shapes, raw_deltas, dtype, tolerance):
    factors = random_factors(sd1_shapes, rank=5)
    save_kohya(tmp_path / "a.safetensors", factors, SD1, dtype)
    found, expected = raw_deltas(tmp_path / "a.safetensors"), true_deltas(factors)
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative_error(found[name], expected[name]) < tolerance


def test_narrower_layers_are_padded_to_one_rank_and_one_alpha(
    tmp_path, random_factors, sd1_shapes, raw_deltas, read_raw
):
    factors = random_factors(sd1_shapes, rank=2)
    factors |= random_factors({Q: (64, 64)}, rank=5)
    save_kohya(tmp_path / "a.safetensors", factors, SD1, torch.float32)
    arrays, metadata = read_raw(tmp_path / "a.safetensors")
    assert {len(array) for name, array in arrays.items() if name.endswith("lora_down.weight")} == {5}
    alphas = [array for name, array in arrays.items() if name.endswith(".alpha")]
    assert {array.shape for array in alphas} == {()}
    assert {array.item() for array in alphas} == {5.0}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("5", "5.0")
    found = raw_deltas(tmp_path / "a.safetensors")
    for name, delta in true_deltas(factors).items():
        assert relative_error(found[name], delta) < 1e-6


def test_float32_survives_writing_and_reading_to_the_last_bit(tmp_path, random_factors, sd1_shapes):
    factors = random_factors(sd1_shapes, rank=4)
    save_kohya(tmp_path / "a.safetensors", factors, SD1, torch.float32)
    read, metadata = load_kohya(tmp_path / "a.safetensors")
    assert read.keys() == factors.keys()
    for layer, (lora_A, lora_B) in factors.items():
        # A power of two moves between the sides, so every product of entries keeps its bits.
        assert torch.equal(
            read[layer][0][:, None, :] * read[layer][1].T[:, :, None], lora_A[:, None] * lora_B.T[:, :, None]
        )
    save_kohya(tmp_path / "b.safetensors", read, KohyaMetadata(output_name="a"), torch.float32)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert metadata["ss_output_name"] == "a"


def test_balancing_saves_what_float16_would_round_to_zero(tmp_path, random_factors, sd1_shapes, raw_deltas):
    factors = random_factors(sd1_shapes, down_scale=1e4, up_scale=1e-8)
    save_kohya(tmp_path / "a.safetensors", factors, SD1)
    found = raw_deltas(tmp_path / "a.safetensors")
    for name, delta in true_deltas(factors).items():
        assert relative_error(found[name], delta) < 2**-10


def test_balancing_treats_each_rank_by_itself_and_leaves_zeros_alone():
    down = torch.tensor([[1e-6, 2e-6], [3e5, 1e5], [7.0, 7.0]])
    up = torch.tensor([[1e3, 1e-7, 0.0], [5e2, 2e-7, 0.0]])
    new_down, new_up = balance(down, up)
    assert torch.equal(new_up @ new_down, up @ down)
    ratio = new_down.abs().amax(1) / new_up.abs().amax(0)
    assert (ratio[:2] > 0.2).all()
    assert (ratio[:2] < 5).all()
    assert torch.equal(new_down[2], down[2])


def test_each_modules_own_alpha_is_folded_and_a_missing_one_is_scale_1(tmp_path):
    other = KOHYA_Q.replace("to_q", "to_k")
    down, up = torch.randn(4, 8), torch.randn(6, 4)
    state = {f"{name}.lora_down.weight": down.clone() for name in (KOHYA_Q, other)}
    state |= {f"{name}.lora_up.weight": up.clone() for name in (KOHYA_Q, other)}
    save_file(state | {f"{KOHYA_Q}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    factors, _ = load_kohya(tmp_path / "a.safetensors")
    assert torch.equal(factors[Q][1], up / 4)
    assert torch.equal(factors[Q.replace("to_q", "to_k")][1], up)


def test_a_1x1_convolution_is_read_as_a_matrix(tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    down, up = torch.randn(4, 8, 1, 1), torch.randn(6, 4, 1, 1)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "a.safetensors")
    (pair,) = load_kohya(tmp_path / "a.safetensors")[0].values()
    assert torch.equal(pair[0], down[:, :, 0, 0])
    assert torch.equal(pair[1], up[:, :, 0, 0])


def test_factors_of_what_is_no_product_of_matrices_are_refused(tmp_path):
    conv = "lora_unet_mid_block_resnets_0_conv1"
    state = {f"{conv}.lora_down.weight": torch.ones(1, 2, 3, 3), f"{conv}.lora_up.weight": torch.ones(2, 1, 1, 1)}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"layer unet\.mid_block\.resnets\.0\.conv1 is a convolution"):
        load_kohya(tmp_path / "a.safetensors")
    state = {f"{KOHYA_Q}.lora_down.weight": torch.ones(1, 2), f"{KOHYA_Q}.lora_up.weight": torch.ones(2, 1)}
    save_file(state | {f"{KOHYA_Q}.dora_scale": torch.ones(2, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"layer {Q} is DoRA"):
        load_kohya(tmp_path / "a.safetensors")


def test_reading_lists_every_unknown_key(tmp_path):
    state = {f"{KOHYA_Q}.lora_down.weight": torch.ones(1, 2), f"{KOHYA_Q}.lora_up.weight": torch.ones(2, 1)}
    state |= {f"{KOHYA_Q}.hada_x": torch.ones(1), "lora_unet_double_blocks_0.alpha": torch.ones(())}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"2 keys .*: lora_unet_double_blocks_0\.alpha, {KOHYA_Q}\.hada_x$"):
        load_kohya(tmp_path / "a.safetensors")


def test_a_file_of_another_model_is_refused_in_a_sentence_of_readable_length(tmp_path):
    save_file({f"lora_unet_double_blocks_{i}.alpha": torch.ones(()) for i in range(300)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"300 keys .* and 297 more$"):
        load_kohya(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_up.weight": None}, "has no lora_B"),
        ({"lora_up.weight": torch.ones(2, 3)}, "have different ranks"),
        ({"lora_down.weight": torch.ones(1, 2, 3, 3)}, r"a kernel of \(3, 3\), but is a linear layer"),
        ({"alpha": torch.tensor(0.0)}, "alpha 0.0"),
        ({"alpha": torch.ones(2)}, "must be one real number"),
        ({"alpha": torch.tensor(1 + 1j)}, "an alpha of torch.complex64 and shape .*must be one real number"),
        ({"lora_down.weight": torch.full((1, 2), torch.nan)}, "NaN or infinity"),
    ],
)
def test_a_wrong_module_is_refused_by_name(tmp_path, change, message):
    parts = {"lora_down.weight": torch.ones(1, 2), "lora_up.weight": torch.ones(2, 1)} | change
    state = {f"{KOHYA_Q}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"{KOHYA_Q}.*{message}"):
        load_kohya(tmp_path / "a.safetensors")


def test_one_layer_under_two_names_is_refused(tmp_path):
    names = ["lora_unet_middle_block_1_proj_in", "lora_unet_mid_block_attentions_0_proj_in"]
    state = {f"{name}.lora_down.weight": torch.ones(1, 2) for name in names}
    save_file(state | {f"{name}.lora_up.weight": torch.ones(2, 1) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="twice"):
        load_kohya(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((torch.full((1, 2), torch.nan), torch.ones(2, 1)), "NaN or infinity"),
        ((torch.ones(1, 2), torch.full((2, 1), torch.inf)), "NaN or infinity"),
        ((torch.ones(2, 2), torch.ones(2, 1)), "have different ranks"),
        ((torch.ones(0, 2), torch.ones(2, 0)), "are empty"),
        ((torch.full((1, 2), 1e8), torch.full((2, 1), 1e8)), "beyond 6.55e[+]04, the largest float16"),
    ],
)
def test_bad_factors_are_refused_by_layer_and_leave_no_file(tmp_path, pair, message):
    good = (torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(ValueError, match=f"layer {Q}.*{message}"):
        save_kohya(tmp_path / "a.safetensors", {Q.replace("to_q", "to_k"): good, Q: pair}, SD1)
    assert not list(tmp_path.iterdir())


def test_no_layers_a_wrong_suffix_and_a_wrong_dtype_are_refused(tmp_path):
    factors = {Q: (torch.ones(1, 2), torch.ones(2, 1))}
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_kohya(tmp_path / "a.safetensors", {}, SD1)
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_kohya(tmp_path / "a.ckpt", factors, SD1)
    with pytest.raises(ValueError, match=r"choose one of torch\.float16"):
        save_kohya(tmp_path / "a.safetensors", factors, SD1, torch.int8)
    with pytest.raises(FileNotFoundError, match="make the folder first"):
        save_kohya(tmp_path / "none" / "a.safetensors", factors, SD1)


def test_a_rank_that_bfloat16_cannot_count_keeps_its_alpha(tmp_path):
    factors = {Q: (torch.ones(257, 2), torch.ones(2, 257))}
    save_kohya(tmp_path / "a.safetensors", factors, SD1, torch.bfloat16)
    assert load_file(tmp_path / "a.safetensors")[f"{KOHYA_Q}.alpha"].item() == 257
