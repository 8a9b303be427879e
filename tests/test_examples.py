"""The examples run, as a newcomer runs them: in a folder of their own."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from converters import KohyaMetadata, detect_format, prepare_conversion, save_kohya
from testbed import miniature_path
from testbed.corpus import portrait

ROOT = Path(__file__).parents[1]


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def faces(tmp_path):
    """A folder of drawn people, a photo each."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(portrait(index, "validation")[0]).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def run_example(tmp_path):
    """A function: (script, arguments) -> what it prints; warnings and bars of libraries fail."""

    def run(script: str, *arguments: str | Path) -> str:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr == ""
        return ran.stdout

    return run


def test_first_steps_trains_personalises_converts_and_draws(faces, run_example, tmp_path):
    printed = run_example("first_steps.py", "faces")
    assert 'answers to "a sks face"' in printed
    assert printed.splitlines()[-1] in ("torch.Size([176, 30])", "torch.Size([128, 30])")
    assert detect_format(tmp_path / "me.safetensors") == "kohya"
    assert detect_format(tmp_path / "me-peft") == "peft"
    assert Image.open(tmp_path / "me.png").size == (32, 32)


def test_a_hypernetwork_is_trained_on_a_folder_and_predicts(faces, run_example, tmp_path):
    printed = run_example("train_on_a_folder.py", faces, faces / "0.png")
    assert "4 steps, loss" in printed
    assert (tmp_path / "hypernetwork" / "best" / "model.safetensors").is_file()
    assert detect_format(tmp_path / "predicted.safetensors") == "kohya"
    assert Image.open(tmp_path / "predicted.png").size == (32, 32)


def test_peft_trains_a_unet_whose_merged_weights_do_the_same(faces, run_example, tmp_path):
    printed = run_example("peft_on_a_unet.py", faces / "0.png")
    before, after = map(float, re.search(r"loss (\S+) before, (\S+) after", printed).groups())
    assert after < 0.8 * before
    assert float(re.search(r"loss (\S+) loaded and merged", printed)[1]) == pytest.approx(after, abs=2e-4)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    merged = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    assert merged.keys() == load_file(miniature_path() / "unet" / "diffusion_pytorch_model.safetensors").keys()


def test_loras_are_converted_added_up_and_merged_into_a_model(run_example, tmp_path):
    base = load_file(miniature_path() / "unet" / "diffusion_pytorch_model.safetensors")[f"{LAYER}.weight"].float()
    out_features, in_features = base.shape
    updates = []
    for name, rank in (("first", 2), ("second", 3)):
        lora_A, lora_B = torch.randn(rank, in_features) / 8, torch.randn(out_features, rank) / 8
        file = tmp_path / f"{name}.safetensors"
        save_kohya(file, {f"unet.{LAYER}": (lora_A, lora_B)}, KohyaMetadata(), dtype=torch.float32)
        updates.append(lora_B @ lora_A)
    prepare_conversion(file, tmp_path / "second-peft", to="peft").write()
    printed = run_example("convert_and_merge.py", tmp_path / "first.safetensors", "second-peft", miniature_path())
    assert "is in the format kohya" in printed
    assert detect_format(tmp_path / "first-diffusers.safetensors") == "diffusers"
    assert detect_format(tmp_path / "both.safetensors") == "kohya"
    found = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")[f"{LAYER}.weight"]
    torch.testing.assert_close(found.float(), base + 0.8 * updates[0] + 0.5 * updates[1], rtol=1e-3, atol=1e-3)


def test_the_notebook_personalises_and_draws(faces, tmp_path, monkeypatch):
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    from nbclient import NotebookClient
    from nbformat import read, validate

    book = read(ROOT / "examples" / "personalize.ipynb", as_version=4)
    validate(book)
    assert not any(cell.get("outputs") for cell in book.cells)
    cells = {cell["id"]: cell for cell in book.cells}
    cells["settings"].source = f'BASE, PHOTO, PACKAGE = "testbed", {str(faces / "0.png")!r}, "lidb-peft"'
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.text for cell in book.cells for output in cell.get("outputs", ()) if "text" in output)
    assert 'answers to "a sks face"' in printed
    assert not re.search("torchvision|Loading|Writing", printed)
    assert sum("image/png" in output.data for output in cells["draw"].outputs if "data" in output) == 3
    assert detect_format(tmp_path / "me.safetensors") == "kohya"


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "sd15").glob("*.yaml")), ids=lambda file: file.stem)
def test_configs_of_the_recipe_are_options_of_hdb_train(file):
    command = importlib.import_module("cli.train").command
    context = command.make_context("train", ["prepared", "--out", "hypernetwork", "--config", str(file)])
    wanted = yaml.safe_load(file.read_text())
    found = {name.replace("-", "_"): value for name, value in context.params.items()}
    assert len(wanted) > 10
    assert {name: found[name] for name in wanted} == wanted


def test_every_example_is_run_by_a_test():
    examples = {file.name for file in (ROOT / "examples").iterdir() if file.suffix in (".py", ".ipynb")}
    run = set(re.findall(r'run_example\("(\w+\.py)"|"examples" / "(\w+\.ipynb)"', Path(__file__).read_text()))
    assert examples == {name for names in run for name in names if name}


def joined(script: str) -> str:
    return script.replace("\\\n", " ")


def test_scripts_for_clusters_are_shell_and_yaml_that_run_our_commands():
    scripts = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert script.read_text().startswith("#!/bin/bash\n")
    job = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text())
    for text in (*(script.read_text() for script in scripts), job["run"]):
        ran = re.findall(r"(?:hdb|-m lidb_peft) (\w+)", joined(text))
        assert set(ran) & {"prepare", "train"}
        for name, arguments in re.findall(
            r"(?:^|[ \n])(?:OMP_NUM_THREADS=1 hdb|-m lidb_peft) (\w+)([^\n']*)", joined(text)
        ):
            options = {option for each in importlib.import_module(f"cli.{name}").command.params for option in each.opts}
            assert set(re.findall(r"--[a-z-]+", arguments)) <= options, (name, arguments)
    assert len(scripts) == 2


@pytest.mark.parametrize("file", ["slurm/train.sbatch", "skypilot.yaml"])
def test_accelerates_launcher_takes_what_scripts_pass_to_it(file):
    from accelerate.commands.launch import launch_command_parser

    (passed,) = re.findall(r"accelerate launch (.*?)(?:\n|'$)", joined((ROOT / "examples" / file).read_text()))
    plain = re.sub(r'"?\$(?:\(\([^)]*\)\)|\w+)"?', "2", passed)  # what a variable or a sum stands for
    taken = launch_command_parser().parse_args(shlex.split(plain))
    assert (taken.module, taken.training_script, taken.training_script_args[0]) == (True, "lidb_peft", "train")
    assert (taken.multi_gpu, taken.num_processes, taken.num_machines, taken.machine_rank) == (True, 2, 2, 2)
    assert (taken.main_process_ip, taken.main_process_port, taken.mixed_precision) == ("2", 29500, "no")
