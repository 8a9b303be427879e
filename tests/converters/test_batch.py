import shutil
from pathlib import Path

import pytest
import torch

from converters import detect_format
from converters.batch import convert_batch, plan_batch
from converters.formats.kohya import save_kohya
from converters.metadata import KohyaMetadata

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """The working folder, with LoRAs of three kinds in ``loras``, one of them deeper, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    Path("loras/deep").mkdir(parents=True)
    save_kohya("loras/a.v1.safetensors", {Q: (torch.randn(2, 768), torch.randn(8, 2))}, KohyaMetadata())
    jobs = [("loras/a.v1.safetensors", "loras/deep/peft"), ("loras/a.v1.safetensors", "loras/deep/other")]
    list(convert_batch([(Path(a), Path(b)) for a, b in jobs], "peft"))
    shutil.copy("loras/a.v1.safetensors", "loras/deep/b.safetensors")
    Path("loras/notes.txt").write_text("no LoRA")
    Path("loras/broken.safetensors").write_text("no tensors")
    return Path("loras")


def names(jobs):
    return {str(source): str(target) for source, target in jobs}


def test_one_adapter_becomes_the_output_or_goes_into_its_folder(loras):
    file, folder = loras / "a.v1.safetensors", loras / "deep/peft"
    Path("there").mkdir()
    assert plan_batch([file], Path("x.safetensors"), "kohya") == [(file, Path("x.safetensors"))]
    assert plan_batch([file], Path("there"), "kohya") == [(file, Path("there/a.v1.safetensors"))]
    assert plan_batch([file], Path("there"), "peft") == [(file, Path("there/a.v1"))]
    assert plan_batch([folder], Path("there"), "kohya") == [(folder, Path("there/peft.safetensors"))]
    assert plan_batch([file], folder, "peft") == [(file, folder)]  # an adapter made before


def test_a_folder_keeps_its_shape(loras):
    assert names(plan_batch([loras], Path("out"), "diffusers")) == {
        "loras/a.v1.safetensors": "out/a.v1.safetensors",
        "loras/broken.safetensors": "out/broken.safetensors",
        "loras/deep/b.safetensors": "out/deep/b.safetensors",
        "loras/deep/other": "out/deep/other.safetensors",
        "loras/deep/peft": "out/deep/peft.safetensors",
    }


def test_two_that_would_become_one_are_refused(loras):
    sources = [loras / "a.v1.safetensors", loras / "deep/b.safetensors"]
    shutil.copy(sources[1], "b.safetensors")
    with pytest.raises(ValueError, match=r"deep/b.safetensors and b.safetensors would both become out/b.safetensors"):
        plan_batch([*sources, Path("b.safetensors")], Path("out"), "kohya")
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.safetensors file"):
        plan_batch([Path("empty")], Path("out"), "kohya")
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        plan_batch([Path("gone")], Path("out"), "kohya")


def test_a_failure_does_not_stop_the_others_and_what_is_there_is_kept(loras):
    jobs = plan_batch([loras], Path("out"), "diffusers")
    outcomes = list(convert_batch(jobs, "diffusers", dry_run=True))
    assert not Path("out").exists()
    assert [outcome.found for outcome in outcomes] == ["kohya", "", "kohya", "peft", "peft"]
    outcomes = list(convert_batch(jobs, "diffusers"))
    assert [bool(outcome.error) for outcome in outcomes] == [False, True, False, False, False]
    assert "broken.safetensors" in str(outcomes[1].error)
    written = [file for outcome in outcomes for file in outcome.written]
    assert sorted(written) == sorted(file for file in Path("out").rglob("*") if file.is_file())
    assert all(detect_format(file) == "diffusers" for file in written)
    written[0].write_text("mine")
    assert [outcome.kept for outcome in convert_batch(jobs, "diffusers")] == [True, False, True, True, True]
    assert written[0].read_text() == "mine"
    assert not any(outcome.kept for outcome in convert_batch(jobs, "diffusers", overwrite=True))
    assert detect_format(written[0]) == "diffusers"
