import os
import subprocess
import sys

import pytest

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
