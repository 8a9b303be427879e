"""The examples run, as a newcomer runs them: in a folder of their own."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from converters import detect_format
from testbed.corpus import portrait

ROOT = Path(__file__).parents[1]


def test_first_steps_trains_personalises_converts_and_draws(tmp_path):
    faces = tmp_path / "faces"
    faces.mkdir()
    for index in range(3):
        Image.fromarray(portrait(index, "validation")[0]).save(faces / f"{index}.png")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "examples" / "first_steps.py"), "faces"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 'answers to "a sks face"' in run.stdout
    assert run.stdout.splitlines()[-1] in ("torch.Size([176, 30])", "torch.Size([128, 30])")
    assert detect_format(tmp_path / "me.safetensors") == "kohya"
    assert detect_format(tmp_path / "me-peft") == "peft"
    assert Image.open(tmp_path / "me.png").size == (32, 32)


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "sd15").glob("*.yaml")), ids=lambda file: file.stem)
def test_configs_of_the_recipe_are_options_of_hdb_train(file):
    command = importlib.import_module("cli.train").command
    context = command.make_context("train", ["prepared", "--out", "hypernetwork", "--config", str(file)])
    wanted = yaml.safe_load(file.read_text())
    found = {name.replace("-", "_"): value for name, value in context.params.items()}
    assert len(wanted) > 10
    assert {name: found[name] for name in wanted} == wanted


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
