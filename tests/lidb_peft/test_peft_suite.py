"""PEFT's own test-suite; it takes minutes, so it runs only where it is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif("PEFT_SOURCES" not in os.environ, reason="PEFT_SOURCES names no unpacked source distribution")
def test_pefts_own_tests_pass():
    command = [sys.executable, str(Path(__file__).with_name("peft_suite.py")), os.environ["PEFT_SOURCES"]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
