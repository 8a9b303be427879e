"""Whatever is wrong, it is one sentence that names the culprit, an exit code that is not 0, and no file left behind."""

import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hypernet.base_models.loading import load_base
from hypernet.fitting import engine
from lidb_peft import LiDBSpace, save_theta
from testbed import miniature_lidb_config, miniature_path

# ---- photos ----


def test_a_photo_that_is_none_is_named(hdb, personalize, portrait):
    Path("notes.jpg").write_text("no picture")
    Path("empty.jpg").write_bytes(b"")
    Path("half.png").write_bytes(portrait.read_bytes()[:400])
    Image.new("RGB", (1, 1)).save("dot.png")
    Path("album").mkdir()
    assert "notes.jpg is not an image" in hdb.fail(*personalize("notes.jpg"))
    assert "empty.jpg is empty" in hdb.fail(*personalize("empty.jpg"))
    assert "half.png is damaged" in hdb.fail(*personalize("half.png"))
    assert "dot.png is 1 x 1 pixels" in hdb.fail(*personalize("dot.png"))
    assert "album holds no photos" in hdb.fail(*personalize("album"))
    assert "nobody.jpg does not exist" in hdb.fail(*personalize("nobody.jpg"))
    assert "left out: notes.jpg is not an image" in hdb.run(*personalize(portrait, "notes.jpg"))


def test_a_photo_without_a_face_names_the_way_out(hdb):
    Image.fromarray(np.full((200, 200, 3), 128, np.uint8)).save("wall.png")
    message = hdb.fail("personalize", "wall.png", "--base", "testbed", "--hypernet", "none", "--theta-steps", 1)
    assert "wall.png: no face found" in message
    assert "--no-crop" in message


def test_photos_are_looked_at_before_the_base_is_loaded(hdb):
    assert "nobody.jpg does not exist" in hdb.fail("personalize", "nobody.jpg", "--base", "no/such-base")


# ---- the base ----


def test_a_base_that_is_no_stable_diffusion_is_named(hdb, personalize, portrait):
    Path("somewhere").mkdir()
    Path("model.ckpt").write_bytes(b"PK\x03\x04")
    for arguments in (("personalize", portrait, "--no-crop"), ("generate", "a face")):
        assert "somewhere is not a Stable Diffusion" in hdb.fail(*arguments, "--base", "somewhere")
        assert "model.ckpt is not a .safetensors file" in hdb.fail(*arguments, "--base", "model.ckpt")
        assert "gone.safetensors does not exist" in hdb.fail(*arguments, "--base", "gone.safetensors")


def test_a_base_that_cannot_be_had_says_the_three_ways_on(hdb, portrait):
    message = hdb.fail("personalize", portrait, "--no-crop")
    assert "'stable-diffusion-v1-5/stable-diffusion-v1-5'" in message
    assert "HF_HUB_OFFLINE is set, so only the cache was searched; unset it to download" in message
    assert "--base with a diffusers folder or a .safetensors checkpoint" in message
    assert "--base testbed" in message


def test_a_truncated_weights_file_of_the_base_is_named(hdb):
    shutil.copytree(miniature_path(), "model")
    weights = Path("model/vae/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"{weights} is truncated" in hdb.fail("generate", "a face", "--base", "model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(hdb):
    assert "--device cuda" in hdb.fail("generate", "a face", "--base", "testbed", "--device", "cuda")
    assert "--precision fp16" in hdb.fail(
        "generate", "a face", "--base", "testbed", "--device", "cpu", "--precision", "fp16"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_only_a_card_has_is_named_without_one(hdb, personalize, portrait):
    assert "only a CUDA device has one" in hdb.fail(*personalize(portrait), "--max-vram", "4GB")
    message = hdb.fail(*personalize(portrait), "--attention", "xformers")
    assert "attention xformers is not available" in message
    assert "pip install xformers on a machine with CUDA, or choose sdpa" in message


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_8_bit_adam_says_what_it_needs(hdb, personalize, portrait):
    message = hdb.fail(*personalize(portrait), "--optimizer", "adamw8bit", "--steps", 1)
    assert "pip install bitsandbytes, or choose adamw" in message


def test_a_full_card_is_one_sentence_with_the_options_that_help(hdb, personalize, portrait, monkeypatch):
    def fill(*arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ... See docs.")

    monkeypatch.setattr(engine, "base_losses", fill)
    message = hdb.fail(*personalize(portrait), "--gradient-checkpointing", "off", "--steps", 1)
    assert "out of GPU memory; turn --gradient-checkpointing on" in message
    assert "See docs" not in message


# ---- options ----


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--rank", 0), "'--rank': 0 is not in the range"),
        (("--steps", -1), "'--steps': -1 is not in the range"),
        (("--theta-steps", -1), "'--theta-steps'"),
        (("--seed", -1), "'--seed'"),
        (("--seed", 2**64), "'--seed'"),
        (("--lr", "fast"), "'--lr': 'fast' is not a valid float"),
        (("--max-vram", "four"), "'four' is not a size; write it as 4GB or 800MB"),
        (("--max-vram", "0GB"), "'0GB' is not a size"),
        (("--max-vram", "4GiB"), "'4GiB' is not a size"),
        (("--optimizer", "sgd"), "'--optimizer': 'sgd' is not one of"),
        (("--stepz", 3), "No such option"),
    ],
)
def test_an_option_out_of_range_is_named(hdb, personalize, portrait, arguments, text):
    assert text in hdb.fail(*personalize(portrait), *arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--lr", "nan"), "lr is nan"),
        (("--theta-lr", "inf"), "lr is inf"),
        (("--prompt", "a face"), "it must hold [V]"),
        (("--token", ""), "token is empty"),
        (("--theta-steps", 0, "--steps", 0), "theta_steps and steps are both 0"),
        (("--theta-steps", 0, "--save-theta", "t.safetensors"), "no LiDB weights to save in t.safetensors"),
        (("--out", "me.pt"), "me.pt does not end in .safetensors"),
        (("--out", "me.safetensors", "--save-theta", "./me.safetensors"), "both the LoRA and the LiDB weights"),
    ],
)
def test_a_setting_that_cannot_be_is_named(hdb, personalize, portrait, arguments, text):
    assert text in hdb.fail(*personalize(portrait), *arguments)


def test_a_setting_out_of_its_range_is_a_usage_error_that_names_the_range(hdb, personalize, portrait):
    for option, value, allowed in (("--lr", 0, "x>0"), ("--rank", 0, "x>=1"), ("--max-timestep", 1001, "1<=x<=1000")):
        assert f"is not in the range {allowed}" in hdb.fail(*personalize(portrait), option, value, code=2)


def test_a_learning_rate_that_is_too_high_says_so(hdb, personalize, portrait):
    assert "the fit diverged" in hdb.fail(*personalize(portrait), "--steps", 4, "--lr", 1e30)


def test_no_photo_and_no_command_are_usage_errors(hdb):
    assert "PHOTOS" in hdb.fail("personalize", code=2)
    assert "No such command 'fit'" in hdb.fail("fit", code=2)


# ---- outputs ----


def test_an_output_folder_that_is_not_there_is_named(hdb, personalize, portrait):
    for arguments in (
        personalize(portrait, "--out", "nowhere/me.safetensors"),
        personalize(portrait, "--save-theta", "nowhere/theta.safetensors"),
        ("generate", "a face", "--base", "testbed", "--out", "nowhere/a.png"),
    ):
        assert "nowhere does not exist" in hdb.fail(*arguments)
    Path("file").write_text("")
    assert "file" in hdb.fail("demo", "--out", "file", code=2)


def test_an_output_folder_that_cannot_be_written_is_named(hdb, personalize, portrait, made, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may write anywhere
    Path("locked").mkdir()
    for arguments in (
        personalize(portrait, "--out", "locked/me.safetensors"),
        ("convert", made / "me.safetensors", "locked/me.safetensors"),
        ("generate", "a face", "--base", "testbed", "--out", "locked/a.png"),
    ):
        assert "locked is not writable" in hdb.fail(*arguments)


def test_a_lora_never_overwrites_the_theta_it_comes_from(hdb, personalize, portrait, made):
    shutil.copy(made / "theta.safetensors", "portrait.safetensors")
    assert "both what is read and what is written" in hdb.fail(
        *personalize(portrait), "--from-theta", "portrait.safetensors", "--overwrite"
    )
    assert "both what is read and what is written" in hdb.fail(
        "convert", "portrait.safetensors", "portrait.safetensors", "--overwrite"
    )


def test_ctrl_c_leaves_nothing(hdb, personalize, portrait, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hypernet.opened_request.fit_lora", interrupt)
    output = hdb.run(*personalize(portrait), "--save-theta", "theta.safetensors", code=1)
    assert output.splitlines()[-1] == "Aborted!"
    assert hdb.files() == []


# ---- thetas ----


def make_theta(name, models, **changes):
    config = type(miniature_lidb_config())(**({"down_dim": 20, "up_dim": 10} | changes))
    space = LiDBSpace(models, config)
    save_theta(name, space.theta_0, space)
    return name


@pytest.fixture
def use_theta(portrait, personalize):
    """Both commands that read a theta file."""
    return lambda file: (
        personalize(portrait, "--from-theta", file, "--out", "out.safetensors"),
        ("convert", file, "out.safetensors", "--base", "testbed"),
    )


def test_a_theta_of_other_layers_is_refused(hdb, use_theta):
    base = load_base(str(miniature_path()), device="cpu")
    file = make_theta("theta.safetensors", {"unet": base.unet.down_blocks})
    for arguments in use_theta(file):
        assert "theta.safetensors belongs to another list of 48 layers" in hdb.fail(*arguments)


def edit_metadata(source, target, **changes):
    """Rewrite a theta file's metadata, keys without their prefix."""
    blob = Path(source).read_bytes()
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    header["__metadata__"] |= {f"lidb.{key}": str(value) for key, value in changes.items()}
    text = json.dumps(header).encode()
    Path(target).write_bytes(len(text).to_bytes(8, "little") + text + blob[8 + length :])
    return target


@pytest.mark.parametrize(
    "changes",
    [
        {"down_dim": 21},  # another shape
        {"seed": 1},  # another basis
        {"basis": "learned"},
        {"format": 99},
        {"num_layers": "many"},
        {"bases": "{}"},
    ],
    ids=str,
)
def test_a_theta_that_does_not_agree_with_itself_is_refused(hdb, use_theta, made, changes):
    file = edit_metadata(made / "theta.safetensors", "theta.safetensors", **changes)
    for arguments in use_theta(file):
        assert hdb.fail(*arguments).startswith("theta.safetensors ")


def test_a_theta_of_another_checkpoint_is_a_warning(hdb, use_theta):
    base = load_base(str(miniature_path()), device="cpu")
    with torch.no_grad():
        for parameter in base.unet.parameters():
            parameter.mul_(1.1)
    file = make_theta("theta.safetensors", base.adapted)
    for arguments in use_theta(file):
        output = hdb.run(*arguments, "--overwrite")
        assert "warning: theta.safetensors was made on another base model" in output
        assert "wrote out.safetensors" in output


def test_a_file_that_is_no_theta_is_refused(hdb, use_theta, made):
    Path("notes.safetensors").write_text("no tensors")
    for file in ("notes.safetensors", "gone.safetensors"):
        for arguments in use_theta(file):
            assert str(file) in hdb.fail(*arguments)
    assert "is not a theta file" in hdb.fail(*use_theta(made / "me.safetensors")[0])


# ---- LoRA files ----


@pytest.fixture
def nan_lora(hdb, made):
    tensors = load_file(made / "me.safetensors")
    first = sorted(tensors)[-1]
    tensors[first] = tensors[first] * float("nan")
    save_file(tensors, "nan.safetensors", metadata={"ss_base_model_version": "sd_v1"})
    return "nan.safetensors"


def test_a_lora_with_nan_is_warned_of_and_never_drawn_with(hdb, nan_lora):
    output = hdb.run("inspect", nan_lora, code=3)
    assert re.search(r"^warning +1 layer with NaN or infinity", output, re.MULTILINE)
    assert json.loads(hdb.run("inspect", nan_lora, "--json", code=3))["warnings"]
    message = hdb.fail("generate", "a face", "--base", "testbed", "--lora", nan_lora)
    assert "nan.safetensors holds NaN or infinity" in message


def test_a_file_that_is_no_lora_is_named(hdb, made):
    Path("notes.safetensors").write_text("no tensors")
    Path("old.pt").write_bytes(b"\x80\x02}q\x00.")
    cut = (made / "me.safetensors").read_bytes()[:-10]
    Path("cut.safetensors").write_bytes(cut)
    weights = miniature_path() / "unet/diffusion_pytorch_model.safetensors"
    Path("empty").mkdir()
    for file in ("notes.safetensors", "old.pt", "cut.safetensors", "gone.safetensors", "empty", weights):
        assert str(file) in hdb.fail("inspect", file)
        # The LoRA is looked at before the base is loaded.
        assert str(file) in hdb.fail("generate", "a face", "--base", "no/such-base", "--lora", file)


def test_generate_does_not_take_a_theta_for_a_lora(hdb, made):
    message = hdb.fail("generate", "a face", "--base", "testbed", "--lora", made / "theta.safetensors")
    assert "hdb convert" in message


def test_control_characters_of_a_strangers_file_do_not_reach_the_terminal(hdb, made):
    tensors = load_file(made / "me.safetensors")
    save_file(
        tensors, "odd.safetensors", metadata={"modelspec.title": "\x1b[2J\x07nice\nwarning  none", "ss_v2": "False"}
    )
    output = hdb.run("inspect", "odd.safetensors", code=3)  # the miniature's widths tell no family
    assert "\x1b" not in output
    assert "\nwarning  none" not in output
    assert "nice" in output
