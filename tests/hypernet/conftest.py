"""The bundled miniature as a base, and subjects made of numbers: no test here depends on what its weights draw."""

import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from converters import write_lora
from hypernet.base_models.loading import load_base
from hypernet.fitting.engine import Subject, fit_theta
from hypernet.personalized import lora_metadata
from hypernet.recipe import FitConfig
from lidb_peft import LiDBSpace
from testbed import miniature_lidb_config, miniature_path
from testbed.corpus import portrait as draw_portrait


@pytest.fixture(scope="package")
def base():
    return load_base(str(miniature_path()), device="cpu", precision="fp32")


@pytest.fixture(scope="package")
def sdxl(sdxl_folder):
    return load_base(str(sdxl_folder), device="cpu", precision="fp32")


@pytest.fixture(scope="package")
def space(base):
    return LiDBSpace(base.adapted, miniature_lidb_config())


@pytest.fixture(scope="package")
def taught(space):
    """Names of the layers that a picture teaches something.

    In the miniature's middle block one token attends to itself, whatever its query and key: they get no gradient
    but what some processors' rounding gives, which moves them by less than 1e-6.
    """
    return [name for name in space.layer_names if not re.search(r"mid_block.*attn1\.to_[qk]$", name)]


@pytest.fixture
def random_theta(space):
    """A theta whose two halves are both far from zero."""
    noise = torch.randn(space.theta_0.shape, generator=torch.Generator().manual_seed(5))
    return space.theta_0 + 0.3 * noise * space.mask


@pytest.fixture
def factors(space):
    """A LoRA of rank 2 that changes what is drawn."""
    generator = torch.Generator().manual_seed(0)
    flat = space.init_lora(2, generator)
    return space.lora_factors(flat + 0.05 * torch.randn(flat.shape, generator=generator), 2)


@pytest.fixture
def lora(base, factors, tmp_path):
    """Its file."""
    write_lora(tmp_path / "me.safetensors", factors, lora_metadata(base, "a sks face"), dtype=torch.float32)
    return tmp_path / "me.safetensors"


@pytest.fixture
def new_subject(base):
    """A function: key -> a subject with some photos' moments of its own."""

    def make(
        key: str, num_photos: int = 1, prompt: str = "a sks face", class_prompt: str = "", shape=base.latent_shape
    ) -> Subject:
        generator = torch.Generator().manual_seed(sum(key.encode()))
        mean = torch.randn(num_photos, *shape, generator=generator)
        return Subject(key, torch.cat([mean, torch.full_like(mean, -4.0)], dim=1), prompt, class_prompt)

    return make


@pytest.fixture
def assert_fits_are_apart(new_subject):
    """A function: (base, space, prompt, steps) -> nothing, or it fails: two people's fits are those of each alone."""

    def check(base, space, prompt: str, steps: int) -> None:
        subjects = [new_subject(key, 2, prompt, "a face", base.latent_shape) for key in ("ann", "bob")]
        noise = torch.randn(space.theta_0.shape, generator=torch.Generator().manual_seed(5))
        start = space.theta_0 + 0.3 * noise * space.mask
        config = FitConfig(steps=steps, lr=1e-3, preservation=1.0, max_grad_norm=1e9)
        together, losses = fit_theta(base, space, subjects, config, start=start)
        for i, subject in enumerate(subjects):
            alone, alone_losses = fit_theta(base, space, [subject], config, start=start)
            torch.testing.assert_close(losses[0, i], alone_losses[0, 0], rtol=1e-5, atol=0)
            assert (together[i] - alone[0]).norm() < 0.02 * (alone[0] - start).norm()

    return check


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


@pytest.fixture(scope="package")
def assert_same_deltas(import_helper):
    """A function: (LoRA file, factors, tolerance, floor) -> nothing, or it fails."""
    return import_helper("lora_file").assert_same_deltas


@pytest.fixture(scope="package")
def drawn_faces():
    """Five drawn portraits of five people, as PNG; to be used with ``crop=False``."""

    def encode(index: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(draw_portrait(index, "validation")[0]).save(buffer, "PNG")
        return buffer.getvalue()

    return [encode(index) for index in range(5)]


@pytest.fixture
def face_folder(drawn_faces, tmp_path):
    """A folder with the five portraits, ``0.png`` to ``4.png``."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for index, face in enumerate(drawn_faces):
        (folder / f"{index}.png").write_bytes(face)
    return folder


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """The cache of `datasets` in a folder of its own, and no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
