import os
import subprocess
import sys
import time

import pytest

from cli.progress import progress_bars

CODE = """
from huggingface_hub.utils import are_progress_bars_disabled
from cli.progress import quiet_libraries
quiet_libraries()
print(are_progress_bars_disabled())
"""


@pytest.mark.parametrize(("chosen", "disabled"), [({}, "False"), ({"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, "True")])
def test_downloads_keep_their_bars_unless_the_user_says_otherwise(chosen, disabled):
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_PROGRESS_BARS"}
    result = subprocess.run([sys.executable, "-c", CODE], env=kept | chosen, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == disabled


def test_bars_say_how_many_an_hour_not_counting_what_was_there(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with progress_bars(per_hour="people") as report:
        for done in (1000, 1001, 1002):
            report("fit people", done, 2000)
            time.sleep(0.05)
    shown = capsys.readouterr().err
    assert "1002/2000" in shown
    speed = int(shown.split(" people/h")[0].split()[-1].replace(",", ""))
    assert 0 < speed < 3600 / 0.05
