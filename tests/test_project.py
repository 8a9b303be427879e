"""What the project says about itself in several places agrees."""

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import lidb_peft

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of pyproject.toml")
ROOT = Path(__file__).parents[1]
WHOLE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, TOOLS = WHOLE["project"], WHOLE["tool"]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_version_is_that_of_the_installed_package_or_says_that_there_is_none():
    try:
        assert lidb_peft.__version__ == version("lidb-peft")
    except PackageNotFoundError:
        assert "not.installed" in str(Version(lidb_peft.__version__))
    command = [sys.executable, "-m", "cli.main", "--version"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown == f"hdb {lidb_peft.__version__}\n"


def test_every_dependency_is_pinned_within_its_range():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    pins = {name.lower().replace("_", "-"): pinned for name, pinned in pins.items()}
    optional = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *optional["test"], *optional["docs"]]:
        wanted = Requirement(line)
        assert pins[wanted.name.lower()] in wanted.specifier, line


def test_the_dockerfile_copies_what_there_is_and_runs_what_it_has_installed():
    """No container is built here."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    steps = {name: [rest for each, rest in lines if each == name] for name, _ in lines}
    assert re.fullmatch(r"[\w/]+:\d[\w.-]+", steps["FROM"][0])  # a version
    copied = {name.split("/")[0] for line in steps["COPY"] for name in line.split()[:-1]}
    ignored = {line.rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert all((ROOT / name).exists() for name in copied)
    assert not copied & ignored
    packages = {name.rstrip("*") for name in TOOLS["setuptools"]["packages"]["find"]["include"]}
    licenses = {name.split("/")[0] for name in PROJECT["license-files"]}
    assert packages | licenses | {"pyproject.toml", PROJECT["readme"], "constraints.txt"} <= copied
    (install,) = (line for line in steps["RUN"] if "pip install" in line)
    extras = re.search(r'-c constraints\.txt "\.\[([\w,]+)\]"', install)[1]
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert "&& /opt/hdb/bin/hdb doctor" in install
    assert "/opt/hdb/bin:" in " ".join(steps["ENV"])
    assert json.loads(steps["ENTRYPOINT"][0]) == list(PROJECT["scripts"])


@pytest.mark.parametrize("file", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda file: file.name)
def test_issue_templates_ask_for_commands_that_there_are(file):
    from cli.main import COMMANDS

    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    asked = set(re.findall(r"\bhdb (\w+)", str(form)))
    assert asked <= set(COMMANDS)
