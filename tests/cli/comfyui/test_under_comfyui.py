"""The nodes in ComfyUI itself, where ``COMFYUI_DIR`` names a checkout of it.

``COMFYUI_PYTHON`` is the Python that ComfyUI runs in, if that is not the tests'; it needs lidb-peft's packages too.
"""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from cli.comfyui.command import PACK
from cli.main import main

CHECKOUT = Path(os.environ.get("COMFYUI_DIR", "nowhere"))
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
HERE = Path(__file__).parent
NAMES = ("LidbPersonalize", "LidbPredict", "LidbLoad", "LidbSheet")
WIDE = "wide.safetensors"
PERSONALIZE = {"checkpoint": "testbed", "other_base": "", "name": "me", "steps": 2, "seed": 0, "find_face": False,
               "preview_every": 0, "weight": 1.0, "photos": ["photo", 0]}  # fmt: skip
SHEET = {"checkpoint": "testbed", "other_base": "", "lora_names": "me.safetensors", "prompts": "a sks face",
         "weights": "0.5, 1", "sampling_steps": 2, "seed": 0}  # fmt: skip
pytestmark = pytest.mark.skipif(
    not (CHECKOUT / "comfy_api").is_dir(), reason="COMFYUI_DIR names no checkout of ComfyUI"
)


def command(folder: Path, *options: str) -> list[str]:
    return [
        PYTHON,
        "main.py",
        "--cpu",
        "--base-directory",
        str(folder),
        "--database-url",
        "sqlite:///:memory:",
        *options,
    ]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(HERE.parents[2]), "HF_HUB_OFFLINE": "1"}


class ComfyUI:
    """A running ComfyUI with a folder of its own."""

    def __init__(self, folder: Path, address: str, log: Path) -> None:
        self.folder, self.address, self.log = folder, address, log

    def ask(self, path: str) -> dict:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=60) as answer:
            return json.load(answer)

    def run(self, prompt: dict, cancel_at: int | None = None) -> SimpleNamespace:
        """Queue a workflow and follow it to its end."""
        file = self.folder / "prompt.json"
        file.write_text(json.dumps(prompt))
        last = [] if cancel_at is None else [str(cancel_at)]
        ended = subprocess.run(
            [PYTHON, str(HERE / "comfyui_client.py"), self.address, str(file), *last],
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        return SimpleNamespace(**json.loads(ended.stdout))

    def node(self, kind: str, cancel_at: int | None = None, photo: str = "photo.png", **inputs) -> SimpleNamespace:
        """Run one of our nodes on a photo; what comes out of it first is shown."""
        prompt = {
            "photo": {"class_type": "LoadImage", "inputs": {"image": photo}},
            "ours": {"class_type": kind, "inputs": inputs},
            "shown": {"class_type": "PreviewAny", "inputs": {"source": ["ours", 0]}},
        }
        return self.run(prompt, cancel_at)

    def loras(self) -> set[str]:
        return {file.name for file in (self.folder / "models" / "loras").iterdir()}

    def saved(self, prefix: str) -> Path:
        (file,) = (self.folder / "output").glob(f"{prefix}*")
        return file


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory, portrait):
    folder = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "input", "models/loras", "models/checkpoints"):
        (folder / name).mkdir(parents=True)
    assert CliRunner().invoke(main, ["comfyui", "install", str(folder)]).exit_code == 0
    shutil.copy(portrait, folder / "input" / "photo.png")
    Image.new("RGB", (96, 96), "grey").save(folder / "input" / "grey.png")
    (folder / "models" / "loras" / "junk.safetensors").write_text("no LoRA")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(folder, "--port", str(port)), cwd=CHECKOUT, env=environment(), stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    running = ComfyUI(folder, f"http://127.0.0.1:{port}", log)
    until = time.monotonic() + 300
    while True:
        try:
            running.ask("/system_stats")
            break
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
    yield running
    process.terminate()
    process.wait(60)


def test_its_quick_test_loads_the_nodes(comfyui):
    ended = subprocess.run(
        command(comfyui.folder, "--quick-test-for-ci"), cwd=CHECKOUT, env=environment(), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    printed = ended.stdout + ended.stderr
    assert ended.returncode == 0, printed[-3000:]
    assert "custom_nodes/lidb-peft" in printed.partition("Import times for custom nodes")[2], printed[-3000:]
    assert "IMPORT FAILED: " + str(comfyui.folder) not in printed, printed[-3000:]


def test_it_shows_the_nodes_as_the_stand_ins_do(comfyui, nodes):
    for name in NAMES:
        shown, schema = comfyui.ask(f"/object_info/{name}")[name], nodes[name].define_schema()
        order = [*shown["input_order"]["required"], *shown["input_order"].get("optional", [])]
        assert order == [one.id for one in schema.inputs]
        for one in schema.inputs:
            kind, options = shown["input"]["optional" if one.options.get("optional") else "required"][one.id]
            assert kind == one.io_type
            given = {key: value for key, value in one.options.items() if key not in ("optional", "options")}
            assert options.items() >= given.items()
        assert shown["output"] == [one.io_type for one in schema.outputs]
        assert shown["output_name"] == [one.options["display_name"] for one in schema.outputs]
        assert shown["output_is_list"] == [one.options["is_output_list"] for one in schema.outputs]


def test_a_photo_becomes_a_lora_with_progress_and_pictures(comfyui):
    ran = comfyui.node("LidbPersonalize", **PERSONALIZE | {"name": "shown", "preview_every": 1})
    assert ran.ended == "execution_success", ran.data
    assert ran.progress == [["ours", 1, 2], ["ours", 2, 2]]
    assert ran.pictures
    assert {"shown.json", "shown.safetensors"} <= comfyui.loras()
    with safe_open(comfyui.folder / "models" / "loras" / "shown.safetensors", "pt") as lora:
        assert any(name.startswith("lora_unet_") for name in lora.keys())  # noqa: SIM118
    choices = comfyui.ask("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    assert "shown.safetensors" in choices


def test_cancel_ends_a_fit_leaves_no_file_and_the_next_one_works(comfyui):
    before = comfyui.loras()
    ran = comfyui.node("LidbPersonalize", cancel_at=2, **PERSONALIZE | {"name": "cut", "steps": 500})
    assert ran.ended == "execution_interrupted", ran.data
    assert ran.progress[-1][1] < 10
    assert comfyui.loras() == before
    assert comfyui.node("LidbPersonalize", **PERSONALIZE | {"name": "after"}).ended == "execution_success"
    assert comfyui.loras() == before | {"after.json", "after.safetensors"}


def test_photos_are_predicted_and_loras_are_compared(comfyui):
    node = {key: PERSONALIZE[key] for key in ("checkpoint", "other_base", "find_face", "photos")}
    ran = comfyui.node("LidbPredict", **node, hypernetwork="testbed", name="predicted")
    assert ran.ended == "execution_success", ran.data
    assert {"predicted.json", "predicted.safetensors"} <= comfyui.loras()
    prompt = {
        "ours": {"class_type": "LidbSheet", "inputs": SHEET | {"lora_names": "predicted.safetensors"}},
        "kept": {"class_type": "SaveImage", "inputs": {"images": ["ours", 0], "filename_prefix": "sheet"}},
    }
    ran = comfyui.run(prompt)
    assert ran.ended == "execution_success", ran.data
    assert ran.progress[-1] == ["ours", 4, 4]
    with Image.open(comfyui.saved("sheet")) as sheet:
        assert sheet.width > 2 * 192


@pytest.mark.parametrize(
    ("kind", "inputs", "told"),
    [
        ("LidbPersonalize", PERSONALIZE | {"photo": "grey.png", "find_face": True}, "no face .* turn find_face off"),
        ("LidbPersonalize", PERSONALIZE | {"other_base": "/nowhere/base"}, "'/nowhere/base' is not .* pass other_base"),
        ("LidbPredict", {key: PERSONALIZE[key] for key in ("checkpoint", "other_base", "find_face", "photos", "name")}
         | {"hypernetwork": "/nowhere/network"}, "hypernetwork '/nowhere/network' is not"),
        ("LidbLoad", {"file": "junk.safetensors", "base": "", "weight": 1.0}, "junk.safetensors is a text"),
        ("LidbSheet", SHEET | {"lora_names": "gone.safetensors"}, "gone.safetensors' not found"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_a_sentence_on_the_node(comfyui, kind, inputs, told):
    before = comfyui.loras()
    ran = comfyui.node(kind, **inputs)
    assert ran.ended == "execution_error", ran.data
    assert ran.data["node_type"] == kind
    message = ran.data["exception_message"].strip()
    assert re.search(told, message)
    assert "\n" not in message
    assert comfyui.loras() == before


@pytest.fixture(scope="module")
def checkpoint(comfyui):
    """A Stable Diffusion 1 of random weights that ComfyUI takes for one, by its first and its text encoder's width."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    spec = importlib.util.spec_from_file_location("ldm", HERE.parents[1] / "hypernet" / "ldm_checkpoint.py")
    ldm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ldm)
    plain, default = "{}Block2D".format, torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            parts = SimpleNamespace(
                unet=diffusers.UNet2DConditionModel(
                    sample_size=8, block_out_channels=(320,) * 4, attention_head_dim=8, cross_attention_dim=768
                ),
                text_encoder=CLIPTextModel(
                    CLIPTextConfig(
                        vocab_size=49408, bos_token_id=49406, eos_token_id=49407, hidden_size=768,
                        intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                    )
                ),
                vae=diffusers.AutoencoderKL(
                    block_out_channels=(128, 256, 512, 512), down_block_types=(plain("DownEncoder"),) * 4,
                    up_block_types=(plain("UpDecoder"),) * 4, layers_per_block=2, scaling_factor=0.18215,
                ),
                text_encoder_2=None,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(default)
    file = comfyui.folder / "models" / "checkpoints" / WIDE
    stated = {"modelspec.resolution": "64x64", "modelspec.prediction_type": "epsilon"}
    save_file(ldm.checkpoint_tensors(parts), file, metadata=stated)
    yield file
    file.unlink()  # pytest keeps the folders of several runs


@pytest.fixture(scope="module")
def person(comfyui, checkpoint, portrait):
    """Random weights on that checkpoint: as a theta file, and as the LoRA that is the same."""
    from hypernet import personalize
    from hypernet.base_models.config import BaseConfig

    result = personalize(portrait, BaseConfig(str(checkpoint), device="cpu"), hypernet=None, start=None, theta_steps=1,
                         steps=0, crop=False)  # fmt: skip
    result.theta = torch.randn(result.theta.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    loras = comfyui.folder / "models" / "loras"
    result.save(loras / "random.safetensors", dtype=torch.float32)
    result.save_theta(loras / "theta.safetensors")
    return loras / "random.safetensors", loras / "theta.safetensors"


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kind", ["LoraLoader", "LidbLoad"])
def test_patched_weights_are_those_that_hdb_merges(comfyui, checkpoint, person, kind, tmp_path):
    """ComfyUI's loader of our LoRA, and our loader of theta, both on ComfyUI's own model and text encoder."""
    from converters import read_lora
    from converters.arithmetic.checkpoint import merge_into

    lora, theta = person
    inputs = {"lora_name": lora.name, "strength_model": 1.0, "strength_clip": 1.0}
    if kind == "LidbLoad":
        inputs = {"file": theta.name, "base": checkpoint.name, "weight": 1.0}
    ran = comfyui.run({
        "whole": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint.name}},
        "patched": {"class_type": kind, "inputs": inputs | {"model": ["whole", 0], "clip": ["whole", 1]}},
        "kept": {"class_type": "CheckpointSave", "inputs": {"model": ["patched", 0], "clip": ["patched", 1],
                                                            "vae": ["whole", 2], "filename_prefix": kind}},
    })  # fmt: skip
    assert ran.ended == "execution_success", ran.data
    assert not re.search("not loaded|NOT LOADED|clip missing|unet missing", comfyui.log.read_text())
    saved = comfyui.saved(kind)
    theirs, before = tensors_of(saved), tensors_of(checkpoint)
    saved.unlink()
    merge_into(checkpoint, read_lora(lora), tmp_path / "merged.safetensors")
    ours, changed = tensors_of(tmp_path / "merged.safetensors"), 0
    (tmp_path / "merged.safetensors").unlink()
    for name, weight in ours.items():
        update = (weight - before[name]).norm()
        changed += bool(update)
        # The merged file is float16, as the checkpoint is; ComfyUI keeps float32, of float16 factors.
        torch.testing.assert_close(theirs[name], weight, rtol=2**-10, atol=1e-5)
        assert (theirs[name] - weight).norm() <= 0.05 * update + 1e-3 * weight.norm()
    with safe_open(lora, "pt") as opened:
        assert changed == sum(name.endswith("lora_up.weight") for name in opened.keys())  # noqa: SIM118


def test_a_model_of_another_base_is_told_from_an_unchanged_one(comfyui, checkpoint):
    """The miniature's layers have the same names and other sizes, which ComfyUI tells its log alone."""
    ran = comfyui.run({
        "whole": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint.name}},
        "photo": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
        "ours": {"class_type": "LidbPersonalize", "inputs": PERSONALIZE | {"model": ["whole", 0]}},
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["ours", 2]}},
    })  # fmt: skip
    assert ran.ended == "execution_error"
    assert "connect those of the checkpoint that it was made for" in ran.data["exception_message"]


@pytest.fixture(scope="module")
def frontend(comfyui):
    """ComfyUI's own page in headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        page.goto(comfyui.address)
        is_ready = "() => Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.LidbPersonalize)"
        page.wait_for_function(is_ready, timeout=300_000)
        yield page
        browser.close()


def opened(frontend, name: str) -> dict:
    """An example workflow as ComfyUI's page would queue it."""
    workflow = json.loads((PACK / "example_workflows" / f"{name}.json").read_text())
    return frontend.evaluate(
        "async workflow => { await app.loadGraphData(workflow); return (await app.graphToPrompt()).output }", workflow
    )


def test_the_example_for_personalize_draws_with_the_lora(comfyui, checkpoint, frontend):
    prompt = opened(frontend, "personalize")
    by_kind = {node["class_type"]: node["inputs"] for node in prompt.values()}
    ours = by_kind["LidbPersonalize"]
    assert {name: value for name, value in ours.items() if not isinstance(value, list)} == {
        "checkpoint": "v1-5-pruned-emaonly.safetensors", "other_base": "", "name": "me", "steps": 0, "seed": 0,
        "find_face": True, "preview_every": 0, "weight": 1,
    }  # fmt: skip
    by_kind["LoadImage"]["image"] = "photo.png"
    by_kind["CheckpointLoaderSimple"]["ckpt_name"] = checkpoint.name
    ours.update(checkpoint=checkpoint.name, find_face=False, name="drawn", steps=1)
    by_kind["KSampler"]["steps"] = 1
    by_kind["EmptyLatentImage"].update(width=64, height=64)
    by_kind["SaveImage"]["filename_prefix"] = "drawn"
    ran = comfyui.run(prompt)
    assert ran.ended == "execution_success", ran.data
    with Image.open(comfyui.saved("drawn")) as picture:
        assert picture.size == (64, 64)
    assert "drawn.safetensors" in comfyui.loras()


def test_the_example_for_sheets_compares_loras(comfyui, frontend):
    prompt = opened(frontend, "lora_sheet")
    (ours,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "LidbSheet")
    assert ours == {
        "checkpoint": "v1-5-pruned-emaonly.safetensors", "other_base": "", "lora_names": "me.safetensors",
        "prompts": "a sks face\na sks face as an oil painting", "weights": "0.6, 0.8, 1.0", "sampling_steps": 30,
        "seed": 0,
    }  # fmt: skip
    assert (
        comfyui.node("LidbPersonalize", **PERSONALIZE | {"name": "compared", "steps": 1}).ended == "execution_success"
    )
    ours.update(checkpoint="testbed", lora_names="compared.safetensors", sampling_steps=1)
    ran = comfyui.run(prompt)
    assert ran.ended == "execution_success", ran.data
