"""The benchmarks as modules, and the miniature."""

from pathlib import Path

import pytest

from hypernet.base_models.loading import load_base
from testbed import miniature_path


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(scope="module")
def base():
    return load_base(str(miniature_path()), device="cpu")
