import sys
import time

import huggingface_hub
import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from cli.progress import progress_bars, quiet_libraries


@pytest.mark.parametrize("disabled_by_user", [True, None])
def test_downloads_keep_their_bars_unless_the_user_says_otherwise(monkeypatch, disabled_by_user):
    # What the hub reads from the environment when it is imported: one copy for others, one that outranks all calls.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", disabled_by_user)
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    quiet_libraries()
    assert are_progress_bars_disabled() is bool(disabled_by_user)


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
