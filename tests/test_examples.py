"""The examples run, as a newcomer runs them: in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

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
