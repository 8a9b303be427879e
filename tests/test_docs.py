"""What the documentation says was run, runs."""

import importlib.util
import re
from pathlib import Path

import converters
import hypernet
import lidb_peft

DOCS = Path(__file__).parents[1] / "docs"


def test_the_blocks_of_the_diffusers_page_run(tmp_path, monkeypatch, capsys):
    text = (DOCS / "diffusers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(compile(block, "docs/diffusers.md", "exec"), names)
    claimed = re.findall(r"^print\(.*\)  # (.*)$", "".join(blocks), re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == claimed


def test_the_api_reference_is_what_the_docstrings_say():
    spec = importlib.util.spec_from_file_location("api", DOCS / "api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert api.PAGE.read_text(encoding="utf-8") == api.render(), "run python docs/api.py"


def test_every_public_name_is_in_the_api_reference():
    entries = set(re.findall(r"^### (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    public = {f"{package.__name__}.{name}" for package in (hypernet, lidb_peft, converters) for name in package.__all__}
    assert public <= entries
    for entry in entries:
        module, _, name = entry.rpartition(".")
        assert hasattr(importlib.import_module(module), name)
