import json
from pathlib import Path

import pytest

from hypernet import check


@pytest.mark.usefixtures("checkpointing")
def test_a_report_is_written_and_none_is_replaced(hdb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "_STEPS", 1)
    monkeypatch.setattr(check, "_TIMED_STEPS", 2)
    output = hdb.run("check", "--device", "cpu")
    report = json.loads(Path("hdb-check.json").read_text())
    assert all(finding["detail"] in output for finding in report["findings"])
    assert {"torch", "device", "system"} <= set(report["machine"])
    assert "hdb-check.json" in hdb.fail("check", "--device", "cpu")
    assert json.loads(Path("hdb-check.json").read_text()) == report
