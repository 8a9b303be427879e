"""Every command's happy path, with as few steps as there can be."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from PIL import Image
from skimage import data

import converters
import testbed.demo
from cli import convert, results
from cli.main import COMMANDS, as_sentence
from converters import describe
from converters.layer import DTYPES
from hypernet.base_models.loading import load_base
from hypernet.sampling import generate, lora_applied
from testbed import miniature_path


def test_personalize_writes_a_lora_and_says_what_and_how_to_use_it(hdb, portrait):
    output = hdb.run(
        "personalize", portrait, "--base", "testbed", "--hypernet", "none", "--no-crop", "--theta-steps", 1,
        "--steps", 1, "--preview", "a sks face at night", "--save-theta", "theta.safetensors",
    )  # fmt: skip
    written = ["portrait-preview.png", "portrait.json", "portrait.png", "portrait.safetensors", "theta.safetensors"]
    assert hdb.files() == written
    assert all(f"wrote {name}" in output for name in written)
    assert "<lora:portrait:1>" in output
    assert "base testbed on cpu, fp32" in output
    assert "fit theta" in output
    description = describe("portrait.safetensors")
    assert (description.kind, description.base, dict(description.layers)) == ("kohya LoRA", "SD1", {"unet": 128})


def test_personalize_without_a_preview_draws_nothing(hdb, portrait, personalize):
    output = hdb.run(*personalize(portrait))
    assert hdb.files() == ["portrait.json", "portrait.safetensors"]
    assert "draw" not in output
    assert "contradict" in hdb.fail(*personalize(portrait), "--preview", "a face", code=2)


def test_personalize_takes_several_photos_and_every_option(hdb, portrait):
    shutil.copy(portrait, "second.png")
    hdb.run(
        "personalize", portrait, "second.png", "--base", "testbed", "--hypernet", "none", "--out", "both.safetensors",
        "--theta-steps", 1, "--theta-lr", 0.01, "--steps", 1, "--lr", 0.001, "--rank", 3, "--token", "ohwx",
        "--prompt", "a photo of [V]", "--seed", 7, "--device", "cpu", "--precision", "fp32", "--no-crop",
        "--no-preview",
    )  # fmt: skip
    description = describe("both.safetensors")
    assert description.ranks == (4,)
    assert description.trigger_words == ("a photo of ohwx",)


def test_personalize_on_a_real_photograph_makes_a_lora_that_changes_the_picture(hdb):
    Image.fromarray(data.astronaut()).save("astronaut.jpg")
    hdb.run("personalize", "astronaut.jpg", "--base", "testbed", "--hypernet", "none", "--no-preview",
            "--theta-steps", 2, "--steps", 2)  # fmt: skip
    base = load_base(str(miniature_path()), device="cpu")
    plain = generate(base, ["a sks face"], num_steps=2)[0]
    with lora_applied(base, "astronaut.safetensors"):
        assert generate(base, ["a sks face"], num_steps=2)[0].tobytes() != plain.tobytes()


def test_personalize_goes_on_from_a_theta(hdb, portrait, made):
    hdb.run("personalize", portrait, "--base", "testbed", "--no-crop", "--theta-steps", 0, "--steps", 0,
            "--from-theta", made / "theta.safetensors", "--out", "again.safetensors")  # fmt: skip
    assert describe("again.safetensors").ranks == (1,)


def test_convert_makes_a_lora_of_a_theta(hdb, made):
    arguments = ("convert", made / "theta.safetensors", "me.safetensors", "--base", "testbed")
    output = hdb.run(*arguments, "--trigger", "a ohwx face")
    assert "wrote me.safetensors\nwrote me.json\n" in output
    assert hdb.files() == ["me.json", "me.safetensors"]
    description = describe("me.safetensors")
    assert (description.trigger_words, description.base) == (("a ohwx face",), "SD1")
    assert "kept me.safetensors" in hdb.run(*arguments)


def test_convert_takes_a_folder_and_says_first_what_it_would_do(hdb, made):
    (hdb.folder / "loras/deep").mkdir(parents=True)
    for name in ("a.safetensors", "deep/b.safetensors"):
        shutil.copy(made / "me.safetensors", hdb.folder / "loras" / name)
    before = hdb.files()
    arguments = ("convert", "loras", "out", "--to", "diffusers")
    output = hdb.run(*arguments, "--dry-run")
    assert "would write out/deep/b.safetensors (diffusers) from loras/deep/b.safetensors (kohya)" in output
    assert hdb.files() == before
    hdb.run(*arguments)
    assert describe("out/a.safetensors").kind == describe("out/deep/b.safetensors").kind == "diffusers LoRA"
    (hdb.folder / "loras/c.safetensors").write_text("no tensors")
    output = hdb.run(*arguments, "--overwrite", code=1)
    assert "failed loras/c.safetensors " in output
    assert output.count("loras/c.safetensors") == 1
    assert "wrote out/a.safetensors" in output
    assert output.endswith("Error: 1 of 3 were not converted; see above\n")


def test_convert_offers_what_the_converters_know():
    assert tuple(converters.FORMATS) == convert.FORMATS
    assert [getattr(torch, name) for name in results.DTYPES.values()] == list(DTYPES)


def test_generate_draws_with_and_without_a_lora(hdb, made):
    hdb.run("generate", "a face", "--base", "testbed", "--num-steps", 1, "--out", "plain.png")
    hdb.run("generate", "a sks face", "a pencil drawing", "--base", "testbed", "--num-steps", 1,
            "--lora", made / "me.safetensors", "--weight", 0.8, "--seed", 3)  # fmt: skip
    assert Image.open("plain.png").size == (32, 32)
    assert Image.open("pictures.png").size > (300, 200)


def test_demo_shows_the_whole_way(hdb, monkeypatch):
    quick = replace(testbed.MINIATURE_RECIPE, steps=1)
    monkeypatch.setattr(testbed.demo, "MINIATURE_RECIPE", quick)
    monkeypatch.setattr(testbed.demo, "NUM_STEPS", 1)
    output = hdb.run("demo", "--out", "shown", "--person", 7)
    assert "shown/demo.png" in output
    assert "took" in output
    assert {"shown/demo.png", "shown/photo.png", "shown/sks.safetensors", "shown/sks.json"} <= set(hdb.files())


def test_doctor_says_what_auto_chooses(hdb):
    output = hdb.run("doctor")
    assert "auto chooses" in output
    assert "torch" in output
    assert json.loads(hdb.run("doctor", "--json"))["auto chooses"] in output


def test_inspect_describes_a_lora_for_people(hdb, made):
    lines = hdb.run("inspect", made / "me.safetensors").splitlines()
    found = {line[:26].strip(): line[26:] for line in lines}
    assert found["kind"] == "kohya LoRA"
    assert found["base"] == "SD1 (miniature)"
    assert found["rank"] == found["alpha"] == "9"
    assert found["layers"] == "176: 48 text_encoder, 128 unet"
    assert found["numbers"].endswith(" in float16")
    assert found["trigger words"] == "a sks face"
    assert float(found["norm unet M00"].partition(",")[0]) > 0
    assert found["hash sshs_model_hash"].startswith(found["hash a1111"])
    assert "warning" not in found


def test_inspect_describes_a_theta_for_people(hdb, made):
    lines = hdb.run("inspect", made / "theta.safetensors").splitlines()
    found = {line[:26].strip(): line[26:] for line in lines}
    assert found["kind"] == "LiDB theta"
    assert found["base"] == "(miniature)"
    assert found["layers"] == "176"
    assert found["LiDB"] == "down 20, up 10, seed 0, scale 1.0, basis orthogonal"
    assert found["numbers"] == "5,280 in float16"


def test_inspect_prints_json_for_scripts(hdb, made):
    entries = json.loads(hdb.run("inspect", made / "me.safetensors", "--json"))
    assert entries["kind"] == "kohya LoRA"
    assert entries["layers"] == {"text_encoder": 48, "unet": 128}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(hdb, command):
    output = hdb.run(command, "--help")
    assert f"hdb {command}" in output
    assert f"{command} [OPTIONS]" in output
    assert hdb.run(command, "-h") == output


def test_help_lists_every_command(hdb):
    assert all(command in hdb.run("--help") for command in COMMANDS)


def test_version_is_the_installed_ones(hdb):
    try:
        installed = version("lidb-peft")
    except PackageNotFoundError:
        pytest.skip("lidb-peft is not installed, only its source is here")
    assert installed in hdb.run("--version")


def test_an_error_is_a_few_lines_without_control_characters():
    sentence = as_sentence(ValueError("\x1b[2Ja" + "b" * 9999))
    assert sentence.isprintable()
    assert len(sentence) < 2100
    lines = as_sentence(OSError("\n".join(f"line {i}" for i in range(1000)))).splitlines()
    assert lines[-1] == "... and 994 more lines"
    assert len(lines) == 7
    assert as_sentence(FileNotFoundError(2, "No such file", "a\x07b")) == "No such file: a\N{REPLACEMENT CHARACTER}b"
