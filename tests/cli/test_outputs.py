"""No command writes over an input, into one, or over what is there; and it says so before any work."""

import importlib
import json
import shutil
from pathlib import Path

import click
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cli.main import COMMANDS
from lidb_peft import outputs

UNET = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
# Options and arguments that name what is read, beside --config; every other that names a path is an output, and is in
# OUTPUTS.
READ = {
    "personalize": {"photos", "each", "base", "components", "hypernet", "start", "from_theta"},
    "generate": {"base", "components", "loras"},
    "eval": {"base", "components", "loras", "references", "hypernet", "dino", "clip", "prompts"},
    "preoptimize": {"images", "base", "components", "init_from"},
    "prepare": {"images", "base", "components"},
    "train": {"images", "base", "components", "targets", "init_from", "encoder", "validation_images"},
    "learn-start": {"images", "base", "components", "hypernet"},
    "push": {"source"},
    "inspect": {"file"},
    "convert": {"sources", "base"},
    "resize": {"source"},
    "merge": {"loras", "into"},
    "extract": {"tuned", "base"},
    "project": {"source", "minus", "base"},
    # The page's folder is there or not; what is made in it has new names.
    "ui": {"work_dir", "base", "components"},
}
PHOTO = ("personalize", "faces/a.png", "--base", "model.safetensors")
# (command, what names the output) -> arguments, with OUT in its place.
OUTPUTS = {
    ("demo", "out"): ("demo", "--out", "OUT"),
    ("personalize", "out"): (*PHOTO, "--out", "OUT"),
    ("personalize", "save_theta"): (*PHOTO, "--theta-steps", 1, "--save-theta", "OUT"),
    ("personalize", "save_config"): (*PHOTO, "--out", "me-2.safetensors", "--save-config", "OUT"),
    ("generate", "out"): ("generate", "a", "--base", "model.safetensors", "--lora", "me.safetensors", "--out", "OUT"),
    ("generate", "pictures"): ("generate", "a", "--base", "model.safetensors", "--out", "a.png", "--pictures", "OUT"),
    ("generate", "save_config"): (
        "generate",
        "a",
        "--base",
        "model.safetensors",
        "--out",
        "a.png",
        "--save-config",
        "OUT",
    ),
    ("eval", "save_config"): (
        "eval",
        "faces",
        "--base",
        "model.safetensors",
        "--out",
        "judged",
        "--save-config",
        "OUT",
    ),
    ("ui", "save_config"): ("ui", "--base", "model.safetensors", "--save-config", "OUT"),
    ("eval", "out"): ("eval", "faces", "--base", "model.safetensors", "--no-crop", "--out", "OUT"),
    ("prepare", "out"): ("prepare", "faces", "--no-crop", "--out", "OUT"),
    ("prepare", "save_config"): ("prepare", "faces", "--no-crop", "--out", "data", "--save-config", "OUT"),
    ("preoptimize", "out"): ("preoptimize", "faces", "--base", "model.safetensors", "--out", "OUT"),
    ("train", "out"): ("train", "faces", "--base", "model.safetensors", "--out", "OUT"),
    ("train", "save_config"): ("train", "faces", "--base", "model.safetensors", "--out", "net", "--save-config", "OUT"),
    ("preoptimize", "save_config"): (
        "preoptimize",
        "faces",
        "--base",
        "model.safetensors",
        "--out",
        "net",
        "--save-config",
        "OUT",
    ),
    ("learn-start", "save_config"): (
        "learn-start",
        "faces",
        "--base",
        "model.safetensors",
        "--no-crop",
        "--out",
        "new.safetensors",
        "--save-config",
        "OUT",
    ),
    ("learn-start", "out"): ("learn-start", "faces", "--base", "model.safetensors", "--no-crop", "--out", "OUT"),
    ("check", "out"): ("check", "--out", "OUT"),
    ("convert", "out"): ("convert", "me.safetensors", "OUT"),
    ("resize", "out"): ("resize", "me.safetensors", "OUT", "--rank", 1),
    ("merge", "out"): ("merge", "me.safetensors", "--out", "OUT"),
    ("extract", "out"): ("extract", "tuned.safetensors", "model.safetensors", "--out", "OUT"),
    ("project", "out"): ("project", "me.safetensors", "OUT"),
}
# The same options where they name something else.
FURTHER = {
    "each": ("personalize", "--each", "faces", "--base", "model.safetensors", "--out", "OUT"),
    "into a file": ("merge", "me.safetensors", "--into", "model.safetensors", "--out", "OUT"),
    "into a folder": ("merge", "me.safetensors", "--into", "model", "--out", "OUT"),
    "peft": ("convert", "me.safetensors", "OUT", "--to", "peft"),
    "minus": ("project", "tuned.safetensors", "OUT", "--minus", "model.safetensors"),
}
FOLDERS = {
    "prepare out",
    "generate pictures",
    "eval out",
    "demo out",
    "preoptimize out",
    "train out",
    "each",
    "into a folder",
    "peft",
}
SUFFIXES = {"generate out": ".png", "check out": ".json"}
ONCE = {"generate pictures", "learn-start out"}  # they have no --overwrite
CASES = {f"{command} {name}": arguments for (command, name), arguments in OUTPUTS.items()} | FURTHER


def suffix_of(case: str) -> str:
    if case.endswith("save_config"):
        return ".yaml"
    return "" if case in FOLDERS else SUFFIXES.get(case, ".safetensors")


@pytest.fixture
def stock(hdb, monkeypatch):
    """The working folder with something of everything that is read; whoever loads a base or reads a weight fails."""

    def work(*arguments, **options):
        raise AssertionError("the work has begun")

    for name in ("hypernet.base_models.loading.load_base", "converters.arithmetic.checkpoint.differences",
                 "converters.arithmetic.algebra.merge", "converters.arithmetic.project.lora_updates"):  # fmt: skip
        monkeypatch.setattr(name, work)
    Path("faces").mkdir()
    Image.new("RGB", (64, 64)).save("faces/a.png")
    factors = {f"{LAYER}.lora_down.weight": torch.randn(2, 320), f"{LAYER}.lora_up.weight": torch.randn(320, 2)}
    save_file(factors | {f"{LAYER}.alpha": torch.tensor(2.0)}, "me.safetensors", {"ss_base_model_version": "sd_v1"})
    for name in ("model.safetensors", "tuned.safetensors"):
        save_file({UNET: torch.randn(320, 320)}, name)
    Path("model/unet").mkdir(parents=True)
    shutil.copy("model.safetensors", "model/unet/a.safetensors")
    return hdb


def arguments_of(case: str, out: str) -> list:
    return [out if argument == "OUT" else argument for argument in CASES[case]]


def test_every_option_that_names_a_path_is_known_to_read_or_to_write():
    for command in COMMANDS:
        for parameter in importlib.import_module(COMMANDS[command]).command.params:
            words = set((parameter.metavar or "").split("|"))
            if isinstance(parameter.type, click.Path) or words & {"DIR", "FILE", "IMAGES", "LORA[=WEIGHTS]..."}:
                is_read = parameter.name == "config" or parameter.name in READ.get(command, ())
                assert is_read or (command, parameter.name) in OUTPUTS, (command, parameter.name)


@pytest.mark.parametrize("case", CASES)
def test_every_output_is_decided_about_before_any_work(stock, case, monkeypatch):
    seen = []
    check = outputs._check_suffix
    monkeypatch.setattr(outputs, "_check_suffix", lambda target, suffix: (seen.append(target), check(target, suffix)))
    out = f"out{suffix_of(case)}"
    Path(out).write_text("somebody's")
    if case in ("convert out", "peft"):
        assert f"kept {out}" in stock.run(*arguments_of(case, out))
        stock.fail(*arguments_of(case, "nowhere.ckpt"))
        assert Path("nowhere.ckpt") in seen
    else:
        usage = case in (
            "demo out",
            "train out",
            "preoptimize out",
            "eval out",
            "prepare out",
        )  # click itself says that it is a file
        assert out in stock.fail(*arguments_of(case, out), code=2 if usage else 1)
        assert Path(out) in seen or usage
    assert Path(out).read_text() == "somebody's"


@pytest.mark.parametrize("case", CASES)
def test_no_input_becomes_an_output(stock, case):
    overwrite = () if case in FOLDERS - {"peft"} | ONCE else ("--overwrite",)
    arguments = [argument for argument in CASES[case] if argument != "OUT"]
    for source in [str(argument).partition("=")[0] for argument in arguments if Path(str(argument)).exists()]:
        targets = [f"{source}/run"] if Path(source).is_dir() else [source, source.upper()]
        for target in targets:
            if ("" if Path(source).is_dir() else Path(source).suffix) == suffix_of(case):
                assert "which is read" in (message := stock.fail(*arguments_of(case, target), *overwrite)) or (
                    "both what is read and what is written" in message
                )


def test_nothing_is_written_around_what_is_trained_on(stock):
    Path("run").mkdir()
    shutil.move("faces", "run/faces")
    for command in ("preoptimize", "train"):
        assert "run/faces, which is read, lies inside run" in stock.fail(
            command, "run/faces", "--base", "model.safetensors", "--out", "run"
        )


@pytest.mark.parametrize("command", ["preoptimize", "train"])
def test_a_folder_of_something_else_is_not_written_into(stock, command):
    name = {"preoptimize": "skipped.jsonl", "train": "log.jsonl"}[command]
    Path("out").mkdir()
    Path("out", name).write_text("somebody's")
    message = stock.fail(*arguments_of(f"{command} out", "out"))
    assert f"out/{name} exists and was not made by an earlier run" in message


def test_what_goes_with_a_lora_replaces_nothing_either(stock):
    def fail(*more) -> str:
        return stock.fail(*PHOTO, "--no-crop", "--out", "a.safetensors", *more)

    Path("a.json").write_text('{"camera": "mine"}')
    assert "a.json is not a sidecar of A1111 and is kept" in fail()
    Path("a.json").write_text(json.dumps({"activation text": "anna", "notes": "mine"}))
    assert "a.json is the sidecar of another LoRA" in fail()
    Path("a.json").unlink()
    Image.new("RGB", (8, 8)).save("a-preview.png")
    assert "a-preview.png exists and is kept" in fail("--preview", "a sks face")
    Path("a-preview.png").unlink()
    for name in ("a.png", "a.preview.png"):
        Image.new("RGB", (8, 8)).save(name)
    assert "a.png and a.preview.png are other pictures and are kept" in fail()


def test_a_photo_that_is_our_own_preview_is_not_replaced_by_the_next(stock):
    from converters.sidecar import write_preview

    Path("faces/a.png").unlink()
    write_preview(Path("faces/a.safetensors"), Image.new("RGB", (64, 64)))
    for overwrite in ((), ("--overwrite",)):
        assert "faces/a.png would be both what is read and what is written" in stock.fail(
            *PHOTO, "--no-crop", "--out", "faces/a.safetensors", *overwrite
        )


def test_overwrite_replaces_what_is_no_input(stock, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(stock.folder)
    for case in ("resize out", "merge out", "extract out", "into a file"):
        Path("out.safetensors").write_text("somebody's")
        assert "wrote out.safetensors" in stock.run(*arguments_of(case, "out.safetensors"), "--overwrite")
        assert Path("out.safetensors").stat().st_size > 1000
