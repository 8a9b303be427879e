"""`hdb` run in this process, in an empty folder of its own; what takes a process of its own is in test_process.py."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from transformers import AutoModel, ViTConfig

import hypernet.training.validation as validation
from cli.main import main
from testbed.corpus import portrait as draw_portrait


@dataclass
class Hdb:
    """Runs `hdb` in ``folder``, which is the working folder."""

    folder: Path

    def files(self) -> list[str]:
        return sorted(str(file.relative_to(self.folder)) for file in self.folder.rglob("*"))

    def run(self, *arguments, code: int = 0) -> str:
        """Everything it prints; the exit code is ``code``, and nothing escapes as a traceback."""
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.output

    def fail(self, *arguments, code: int = 1) -> str:
        """The one sentence of a failure, which leaves every file as it was."""
        before = self._written()
        lines = self.run(*arguments, code=code).splitlines()
        assert [line for line in lines if line.startswith("Error: ")] == lines[-1:], lines
        assert self._written() == before
        return lines[-1].removeprefix("Error: ")

    def _written(self) -> dict[str, int]:
        """When each file was written last; 0 for a folder, in which a lock may have come and gone."""
        paths = {name: self.folder / name for name in self.files()}
        return {name: 0 if path.is_dir() else path.stat().st_mtime_ns for name, path in paths.items()}


@pytest.fixture
def hdb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return Hdb(tmp_path)


@pytest.fixture
def draw_faces(hdb):
    """A function: names of files -> the folder ``faces``, with a person of their own in each."""

    def draw(*names: str) -> str:
        folder = hdb.folder / "faces"
        folder.mkdir()
        for index, name in enumerate(names):
            Image.fromarray(draw_portrait(index, "validation")[0]).save(folder / name)
        return folder.name

    return draw


@pytest.fixture
def trainable(hdb, monkeypatch):
    """Makes ``hdb train`` quick: the folder of a tiny encoder, and sample pictures of one step."""
    monkeypatch.setattr(validation, "PICTURE_STEPS", 1)
    encoder = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    AutoModel.from_config(encoder).save_pretrained(hdb.folder / "vit")
    return "vit"


QUICK = (
    "--base", "testbed", "--adapt", "all", "--hypernet", "none", "--start", "none", "--no-crop", "--no-preview",
    "--theta-steps", 1, "--steps", 1,
)  # fmt: skip


@pytest.fixture
def personalize():
    """The arguments of the quickest ``hdb personalize`` there is."""
    return lambda *arguments: ("personalize", *arguments, *QUICK)


@pytest.fixture(scope="package")
def made(portrait, tmp_path_factory):
    """A folder with a LoRA (``me.safetensors``) and the LiDB weights (``theta.safetensors``) of one quick fit."""
    folder = tmp_path_factory.mktemp("made")
    out, theta = folder / "me.safetensors", folder / "theta.safetensors"
    arguments = ["personalize", portrait, *QUICK, "--out", out, "--save-theta", theta]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder
