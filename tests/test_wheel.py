"""What is in the wheel: the five packages, with the miniature's weights, and nothing else."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"lidb_peft", "hypernet", "converters", "cli", "testbed"}
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "benchmarks", "tests", *PACKAGES)
LARGEST_MINIATURE_BYTES = 16_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if not importlib.util.find_spec("build"):
        pytest.skip("the package `build` is not installed; pip install build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (file,) = out.iterdir()
    with zipfile.ZipFile(file) as archive:
        yield archive


def test_it_holds_the_five_packages_and_nothing_else(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
    assert len(top) == len(PACKAGES) + 1


def test_it_holds_every_module(wheel):
    expected = {str(file.relative_to(ROOT)) for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert expected <= set(wheel.namelist())


def contents(wheel, folder):
    """The files of the wheel in a folder, and their sizes: those of the source, all of them."""
    files = [file for file in (ROOT / folder).rglob("*") if file.is_file()]
    found = {entry.filename: entry.file_size for entry in wheel.infolist() if entry.filename.startswith(f"{folder}/")}
    assert found == {str(file.relative_to(ROOT)): file.stat().st_size for file in files}
    return found


def test_it_holds_the_miniature_whole_and_small(wheel):
    found = contents(wheel, "testbed/miniature")
    assert "testbed/miniature/model_index.json" in found
    assert sum(found.values()) <= LARGEST_MINIATURE_BYTES


def test_it_holds_the_hypernetwork_whole(wheel):
    if not (ROOT / "testbed/hypernetwork").is_dir():
        pytest.skip("no hypernetwork ships yet")
    assert "testbed/hypernetwork/model.safetensors" in contents(wheel, "testbed/hypernetwork")


def test_it_holds_clip_s_merges_and_their_licence(wheel):
    assert set(contents(wheel, "hypernet/base_models/clip")) == {
        "hypernet/base_models/clip/LICENSE", "hypernet/base_models/clip/merges.txt",
    }  # fmt: skip


@pytest.mark.parametrize("package", ["lidb_peft", "converters", "hypernet"])
def test_its_annotations_count_for_those_who_install_it(wheel, package):
    assert f"{package}/py.typed" in wheel.namelist()


def test_it_installs_the_command_and_the_licence(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info" in name}
    assert "hdb = cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "Name: lidb-peft" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
