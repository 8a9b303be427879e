import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters import describe, read_lora
from converters.arithmetic.algebra import merge, relative_errors
from testbed import miniature_path

CLIP = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def test_resize_says_what_is_missing_and_keeps_what_the_file_says(hdb, made):
    output = hdb.run("resize", made / "me.safetensors", "small.safetensors", "--rank", 2)
    assert output.startswith("wrote small.safetensors\n")
    assert "rank 2: layers miss " in output
    big, small = read_lora(made / "me.safetensors"), read_lora("small.safetensors")
    assert {layer.rank for layer in small.layers.values()} == {2}
    assert small.metadata["modelspec.trigger_phrase"] == big.metadata["modelspec.trigger_phrase"] == "a sks face"
    assert (small.metadata["ss_network_dim"], small.metadata["ss_output_name"]) == ("2", "small")
    errors = relative_errors(small, big)
    assert f"{max(errors.values()):.1%} at most" in output


def test_resize_by_energy_loses_no_more(hdb, made):
    hdb.run("resize", made / "me.safetensors", "small.safetensors", "--energy", 0.9, "--dtype", "fp32")
    errors = relative_errors(read_lora("small.safetensors"), read_lora(made / "me.safetensors"))
    assert max(errors.values()) <= math.sqrt(0.1)


def test_merge_adds_up_by_weight(hdb, made):
    me = made / "me.safetensors"
    output = hdb.run("merge", f"{me}=0.5", f"{me}=0.25", me, "--out", "all.safetensors", "--dtype", "fp32")
    assert output == "wrote all.safetensors\nwrote all.json\n"
    merged = read_lora("all.safetensors")
    assert {layer.rank for layer in merged.layers.values()} == {27}
    assert max(relative_errors(merged, merge([(read_lora(me), 1.75)], dtype=torch.float32)[0]).values()) < 1e-5
    output = hdb.run("merge", f"{me}=2", me, "--out", "both.safetensors", "--rank", 9)
    assert "rank 9: layers miss 0.0%" in output


def test_merge_by_part_and_by_block(hdb, made):
    me = made / "me.safetensors"
    hdb.run("merge", f"{me}=0.5:te=0:M00=2:out=0", "--out", "part.safetensors", "--dtype", "fp32")
    found, whole = read_lora("part.safetensors"), read_lora(me)
    blocks = {name: name.split(".")[1] for name in whole.layers}
    assert found.layers.keys() == {name for name in whole.layers if blocks[name] in ("down_blocks", "mid_block")}
    weighted = {name: replace(layer, alpha=layer.alpha * (0.5 if blocks[name] == "down_blocks" else 1.0))
                for name, layer in whole.layers.items() if name in found.layers}  # fmt: skip
    assert max(relative_errors(found, replace(whole, layers=weighted)).values()) < 1e-5
    numbers = ",".join(["0"] * 16 + ["1"])
    hdb.run("merge", f"{me}:lbw={numbers}".replace("tensors:", "tensors=1:"), "--out", "last.safetensors")
    assert {name[:25] for name in read_lora("last.safetensors").layers} == {"unet.up_blocks.3.attentio"}
    assert "lbw has 2 numbers; for Stable Diffusion 1 it has 17 or 26" in hdb.fail(
        "merge", f"{me}=1:lbw=1,0", "--out", "b.safetensors"
    )
    hdb.run("merge", f"{me}=te=0", "--into", miniature_path(), "--out", "denoiser-only")
    changed = load_file("denoiser-only/text_encoder/model.safetensors")
    stored = load_file(miniature_path() / "text_encoder/model.safetensors")
    assert all(torch.equal(changed[name], tensor) for name, tensor in stored.items())


def test_merge_into_a_folder_and_extract_it_again(hdb, made):
    me = made / "me.safetensors"
    assert hdb.run("merge", me, "--into", miniature_path(), "--out", "model") == "wrote model\n"
    output = hdb.run("extract", "model", miniature_path(), "--rank", 9, "--out", "again.safetensors", "--dtype", "fp32")
    assert "wrote again.safetensors" in output
    errors = relative_errors(read_lora("again.safetensors"), read_lora(me))
    stored = load_file(miniature_path() / "text_encoder/model.safetensors")
    assert next(iter(stored.values())).dtype == torch.float16  # so the sum was rounded
    assert errors[CLIP] < 0.1


def test_project_finds_the_theta_of_a_lora_and_of_two_models(hdb, made):
    hdb.run("convert", made / "theta.safetensors", "lora.safetensors", "--base", "testbed", "--dtype", "fp32")
    output = hdb.run("project", "lora.safetensors", "again.safetensors", "--base", "testbed")
    assert "176 layers miss 0.0% of their norm in the median, 0.0% at most" in output
    assert describe("again.safetensors").kind == "LiDB theta"
    hdb.run("merge", made / "me.safetensors=100", "--into", miniature_path(), "--out", "tuned")
    output = hdb.run("project", "tuned", "tuned.safetensors", "--minus", miniature_path(), "--base", "testbed")
    assert "wrote tuned.safetensors" in output


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("resize", "a.safetensors", "b.safetensors"), "pass --rank, --energy or another", 2),
        (("resize", "a.safetensors", "b.safetensors", "--energy", 0.9, "--sv-ratio", 2), "contradict each other", 2),
        (("resize", "a.safetensors", "b.safetensors", "--sv-ratio", 0.5), "'--sv-ratio'", 2),
        (("resize", "a.safetensors", "a.safetensors", "--rank", 1), "both what is read and what is written", 1),
        (("resize", "none.safetensors", "b.safetensors", "--rank", 1), "none.safetensors does not exist", 1),
        (("merge", "a.safetensors", "--into", "c.safetensors", "--rank", 2, "--out", "b.safetensors"), "drop them", 2),
        (("merge", "a.safetensors=nan", "--out", "b.safetensors"), "weight nan", 1),
        (("merge", "a.safetensors", "--into", "a.safetensors", "--out", "b.safetensors"), "holds no UNet", 1),
        (("extract", "a.safetensors", "a.safetensors", "--out", "b.safetensors"), "holds no UNet", 1),
    ],
)
def test_what_cannot_be_done_is_one_sentence(hdb, arguments, message, code):
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    state = {f"{name}.lora_down.weight": torch.ones(1, 2), f"{name}.lora_up.weight": torch.ones(2, 1)}
    save_file(state, "a.safetensors")
    assert message in hdb.fail(*arguments, code=code)


def test_a_family_that_the_layers_do_not_tell_is_named_by_an_option(hdb, made):
    """SD1's and SD2's self-attention have the same layers and widths."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {"lora_down.weight": torch.randn(4, 320), "lora_up.weight": torch.randn(320, 4)}
    save_file({f"{name}.{key}": value for key, value in factors.items()}, "attn1.safetensors")
    commands = {
        "small.safetensors": ("resize", "attn1.safetensors", "small.safetensors", "--rank", 2),
        "half.safetensors": ("merge", "attn1.safetensors=0.5", "--out", "half.safetensors"),
    }
    for out, command in commands.items():
        assert "pass --family sd1, sd2" in hdb.fail(*command)
        assert "model family is 'sd9'; choose one of" in hdb.fail(*command, "--family", "sd9")
        hdb.run(*command, "--family", "sd2")
        assert describe(out).base == "SD2"
    into = ("merge", "attn1.safetensors", "--into", miniature_path(), "--out", "model", "--family", "sd1")
    assert "drop them with --into" in hdb.run(*into, code=2)
