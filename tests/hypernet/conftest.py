"""The bundled miniature as a base, and subjects made of numbers: no test here depends on what its weights draw."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hypernet.base_models import load_base
from hypernet.fit import Subject
from lidb_peft import LiDBSpace
from testbed import miniature_lidb_config, miniature_path


@pytest.fixture(scope="package")
def base():
    return load_base(str(miniature_path()), device="cpu", precision="fp32")


@pytest.fixture(scope="package")
def space(base):
    return LiDBSpace(base.adapted, miniature_lidb_config())


@pytest.fixture
def random_theta(space):
    """A theta whose two halves are both far from zero."""
    noise = torch.randn(space.theta_0.shape, generator=torch.Generator().manual_seed(5))
    return space.theta_0 + 0.3 * noise * space.mask


@pytest.fixture
def new_subject():
    """A function: key -> a subject with some photos' moments of its own."""

    def make(key: str, num_photos: int = 1, prompt: str = "a sks face") -> Subject:
        generator = torch.Generator().manual_seed(sum(key.encode()))
        mean = torch.randn(num_photos, 4, 8, 8, generator=generator)
        return Subject(key, torch.cat([mean, torch.full_like(mean, -4.0)], dim=1), prompt)

    return make


@pytest.fixture(scope="package")
def photo(portrait):
    return portrait


@pytest.fixture(scope="package")
def import_helper():
    """A function: name of a module in this folder -> the module; in importlib mode none is on the path."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
