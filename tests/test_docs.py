"""What the documentation says was run, runs."""

import re
from pathlib import Path

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
