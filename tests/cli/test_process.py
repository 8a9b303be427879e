"""What only shows in a process of its own: signals, pipes, and what is imported for `--help`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from click.testing import CliRunner

import cli.main
from cli.main import COMMANDS, PACKAGES
from converters import describe

HDB = (sys.executable, "-m", "cli.main")


@pytest.fixture
def environment():
    paths = [path for path in (os.getcwd(), os.environ.get("PYTHONPATH")) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def test_python_m_lidb_peft_is_hdb_and_names_the_file_that_hides_a_package(environment, tmp_path):
    command = [sys.executable, "-m", "lidb_peft", "--version"]
    run = partial(subprocess.run, command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run().stdout.startswith("hdb ")
    (tmp_path / "cli.py").write_text("raise SystemExit('this is not to be run')")
    result = run()
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'cli.py'} hides this program's package cli")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("place", ["{}.py", "{}/__init__.py"])
def test_what_hides_one_of_our_packages_is_named(monkeypatch, tmp_path, name, place):
    file = tmp_path / place.format(name)
    file.parent.mkdir(exist_ok=True)
    file.touch()
    monkeypatch.syspath_prepend(tmp_path)
    result = CliRunner().invoke(cli.main.main, ["--version"])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {file} hides this program's package {name}")


def test_a_folder_of_results_that_is_called_like_a_package_hides_nothing(monkeypatch, tmp_path):
    (tmp_path / "hypernet").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert CliRunner().invoke(cli.main.main, ["train", "--help"]).exit_code == 0


def test_help_imports_nothing_heavy(environment):
    script = f"""
import json, sys
from click.testing import CliRunner
from cli.main import main
for command in ([], *{[[name] for name in COMMANDS]}):
    assert CliRunner().invoke(main, [*command, "--help"]).exit_code == 0
print(json.dumps(sorted(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "PIL", "diffusers", "transformers", "peft", "cv2", "rich", "safetensors"}
    assert not heavy & set(json.loads(result.stdout))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT between processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_schedulers_stop_in_a_fit_keep_what_there_is(environment, portrait, tmp_path, number):
    (tmp_path / "me.safetensors").write_text("the one from yesterday")
    arguments = ("personalize", portrait, "--base", "testbed", "--hypernet", "none", "--no-crop", "--steps", 3000,
                 "--save-every", 2, "--out", "me.safetensors", "--overwrite")  # fmt: skip
    process = subprocess.Popen(
        [*HDB, *map(str, arguments)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it is ignored
    )  # fmt: skip
    while process.poll() is None and not (tmp_path / "me-000002.safetensors").exists():  # the fit has begun
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopping after this step" in stderr
    step = re.search(
        r"stopped after step (\d+) of finetune LoRA; run the same command with --resume to continue", stdout
    )[1]
    assert "Traceback" not in stderr
    assert (tmp_path / "me.hdb-state").exists()
    assert describe(tmp_path / f"me-{int(step):06d}.safetensors").kind.endswith(" LoRA")
    assert not [file for file in tmp_path.iterdir() if "tmp" in file.suffix]
    assert (tmp_path / "me.safetensors").read_text() == "the one from yesterday"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_reader_that_goes_away_is_no_error(environment):
    read, write = os.pipe()
    os.close(read)
    # A command's help takes no time, and is printed within the command, where OSErrors become sentences.
    result = subprocess.run(
        [*HDB, "inspect", "--help"], env=environment, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert result.stderr == ""
    assert result.returncode == 1
