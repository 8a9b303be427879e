"""LoHa, LoKr and differences as LoRAs of a rank, and in whole models; beside torch's SVD and sums written out."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters import prepare_conversion, read_lora
from converters.arithmetic.algebra import merge
from converters.arithmetic.checkpoint import merge_into
from converters.arithmetic.low_rank import to_low_rank
from converters.lora import Lora

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "unet.down_blocks.0.resnets.0.conv1"
NORM = "unet.down_blocks.0.attentions.0.norm"


def kohya(layer):
    return layer.replace("unet.", "lora_unet_").replace(".", "_")


@pytest.fixture
def file(tmp_path):
    """A LyCORIS file with every kind of update, some of them float16."""
    state = {
        f"{kohya(Q)}.hada_w1_a": torch.randn(6, 2), f"{kohya(Q)}.hada_w1_b": torch.randn(2, 8),
        f"{kohya(Q)}.hada_w2_a": torch.randn(6, 2), f"{kohya(Q)}.hada_w2_b": torch.randn(2, 8),
        f"{kohya(Q)}.alpha": torch.tensor(1.0),
        f"{kohya(CONV)}.lokr_w1": torch.randn(2, 4).half(), f"{kohya(CONV)}.lokr_w2": torch.randn(3, 18).half(),
        f"{kohya(KEY)}.lora_down.weight": torch.randn(3, 768), f"{kohya(KEY)}.lora_up.weight": torch.randn(6, 3),
        f"{kohya(NORM)}.w_norm": torch.randn(6), f"{kohya(NORM)}.b_norm": torch.randn(6),
    }  # fmt: skip
    save_file(state, tmp_path / "lycoris.safetensors")
    return tmp_path / "lycoris.safetensors"


@pytest.fixture
def model(tmp_path):
    tensors = {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": torch.randn(6, 8),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.randn(6, 768),
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": torch.randn(6, 8, 3, 3),
        "model.diffusion_model.input_blocks.1.1.norm.weight": torch.randn(6),
        "model.diffusion_model.input_blocks.1.1.norm.bias": torch.randn(6),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def expected_updates(file):
    state = {name: tensor.double() for name, tensor in load_file(file).items()}
    part = {layer: {name.removeprefix(kohya(layer) + "."): tensor for name, tensor in state.items()
                    if name.startswith(kohya(layer) + ".")} for layer in (Q, CONV, KEY)}  # fmt: skip
    return {
        Q: 0.5 * (part[Q]["hada_w1_a"] @ part[Q]["hada_w1_b"]) * (part[Q]["hada_w2_a"] @ part[Q]["hada_w2_b"]),
        CONV: torch.kron(part[CONV]["lokr_w1"], part[CONV]["lokr_w2"]).view(6, 8, 3, 3),
        KEY: part[KEY]["lora_up.weight"] @ part[KEY]["lora_down.weight"],
        NORM: state[f"{kohya(NORM)}.w_norm"],
        f"{NORM}.bias": state[f"{kohya(NORM)}.b_norm"],
    }


def update(layer):
    lora_A, lora_B = layer.lora_A.double(), layer.lora_B.double()
    return (layer.scale * lora_B.flatten(1) @ lora_A.flatten(1)).unflatten(1, layer.lora_A.shape[1:])


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_every_update_becomes_the_nearest_of_its_rank_and_the_error_is_said(file, rank):
    lora = to_low_rank(read_lora(file, full_updates=True), rank, torch.float32)
    assert not lora.full_updates
    assert lora.layers.keys() == {Q, CONV, KEY}
    expected, errors = expected_updates(file), []
    for layer in (Q, CONV):
        left, singular, right = torch.linalg.svd(expected[layer].flatten(1), full_matrices=False)
        nearest = (left[:, :rank] * singular[:rank] @ right[:rank]).view(expected[layer].shape)
        assert lora.layers[layer].rank == min(rank, 6)
        assert (update(lora.layers[layer]) - nearest).norm() < 1e-5 * nearest.norm()
        errors.append((singular[rank:].norm() / singular.norm()).item())
    assert torch.equal(update(lora.layers[KEY]).float(), expected[KEY].float())
    became, left_out = lora.notes
    assert became.startswith(
        f"LoHa and LoKr of 2 layers becomes LoRA of rank {rank}: layers miss {sum(errors) / 2:.1%}"
    )
    assert f"{max(errors):.1%} at most" in became
    assert left_out == f"2 differences of norms and biases, which no LoRA holds, left out: {NORM}, {NORM}.bias"


def test_an_update_of_zeros_misses_nothing(tmp_path):
    state = {f"{kohya(Q)}.lokr_w1": torch.zeros(2, 4), f"{kohya(Q)}.lokr_w2": torch.randn(3, 2)}
    save_file(state, tmp_path / "untrained.safetensors")
    lora = to_low_rank(read_lora(tmp_path / "untrained.safetensors", full_updates=True), 2)
    assert not update(lora.layers[Q]).any()
    assert "layers miss 0.0% of their norm in the median, 0.0% at most" in lora.notes[-1]


def test_updates_are_added_where_no_layer_is_a_lora(file):
    read = read_lora(file, full_updates=True)
    lora = Lora({}, read.family, full_updates=read.full_updates)
    merged, errors = merge([(lora, 1.0), (lora, 0.5)])
    expected = expected_updates(file)
    assert not merged.layers
    assert not errors
    for name, total in merged.full_updates.items():
        wanted = 1.5 * expected[name]
        assert (total.delta().double().view(wanted.shape) - wanted).norm() < 1e-5 * wanted.norm()


def test_convert_writes_it_where_a_rank_is_said(file, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="LoHa and LoKr and full difference, not LoRA, in 4 layers"):
        prepare_conversion(file, out, "kohya")
    conversion = prepare_conversion(file, out, "kohya", rank=6)
    assert "becomes LoRA of rank 6" in conversion.notes[0]
    conversion.write()
    layers, expected = read_lora(out).layers, expected_updates(file)
    assert all((update(layers[name]) - expected[name]).norm() < 1e-3 * expected[name].norm() for name in layers)
    with pytest.raises(ValueError, match="is a LoRA, which keeps its rank; hdb resize changes it"):
        prepare_conversion(out, tmp_path / "again.safetensors", "kohya", rank=2)


def test_a_model_gets_all_of_them_exactly(file, model, tmp_path):
    lora = read_lora(file, full_updates=True)
    assert lora.family == "sd1"
    merge_into(model, merge([(lora, 0.5), (lora, 0.25)])[0], tmp_path / "out.safetensors")
    before, after = load_file(model), load_file(tmp_path / "out.safetensors")
    expected = expected_updates(file)
    for name, layer in zip(sorted(before), (CONV, f"{NORM}.bias", NORM, Q, KEY), strict=True):
        difference = after[name].double() - before[name].double()
        assert torch.allclose(difference, 0.75 * expected[layer], atol=1e-5), layer


def test_a_model_without_the_layer_or_of_other_widths_is_refused(file, model, tmp_path):
    lora = read_lora(file, full_updates=True)
    tensors = load_file(model)
    bias = next(name for name in tensors if name.endswith("bias"))
    save_file({name: tensor for name, tensor in tensors.items() if name != bias}, model)
    with pytest.raises(ValueError, match=rf"lacks 1 of the LoRA's 5 layers, e\.g\. {NORM}\.bias"):
        merge_into(model, lora, tmp_path / "out.safetensors")
    save_file(tensors | {name: tensor[:, :4].clone() for name, tensor in tensors.items() if "to_q" in name}, model)
    with pytest.raises(ValueError, match=r"to_q has shape \(6, 8\), but its weight has \(6, 4\)"):
        merge_into(model, lora, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="is not a LoRA, and keeps its rank"):
        merge([(lora, 1.0)], rank=2)
