"""What a fit writes while it runs, and that a stopped one resumes to the very files of an unbroken one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hypernet.infotext import read_picture
from hypernet.loss_curve import loss_curve
from hypernet.personalization import personalize_to_files
from hypernet.pictures import Pictures
from testbed import MINIATURE_RECIPE, miniature_lidb_config

QUICK = replace(MINIATURE_RECIPE, steps=6, timesteps_per_step=1, preservation=0.0, crop=False)


def tree(folder):
    return sorted(file.name for file in Path(folder).iterdir())


def run(photo, base, folder, config=QUICK, stop_at=None, **options):
    seen = []
    options = {"previews": None, "save_every": 2} | options
    return personalize_to_files(
        photo, base, folder / "me.safetensors", config, miniature_lidb_config(), on_step=seen.append,
        stop=lambda: len(seen) == stop_at, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(base, photo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(photo, base, folder)
    return folder


def test_intermediate_loras_have_kohyas_names_and_load(unbroken, base):
    assert tree(unbroken) == [
        "me-000002.json", "me-000002.safetensors", "me-000004.json", "me-000004.safetensors", "me-loss.png", "me.json",
        "me.safetensors",
    ]  # fmt: skip
    pipeline = base.pipeline()
    pipeline.load_lora_weights(str(unbroken), weight_name="me-000002.safetensors")
    assert any("default_0" in names for names in pipeline.get_list_adapters().values())
    pipeline.unload_lora_weights()


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_stopped_fit_keeps_what_there_is_and_resumes_to_the_same_files(unbroken, base, photo, tmp_path, stop_at):
    stopped = run(photo, base, tmp_path, stop_at=stop_at)
    assert stopped.stopped_at == ("finetune LoRA", stop_at)
    names = {f"me-{step:06d}" for step in (2, 4, stop_at) if step <= stop_at}
    assert tree(tmp_path) == sorted(["me.hdb-state", *(name + suffix for name in names
                                                       for suffix in (".json", ".safetensors"))])  # fmt: skip
    resumed = run(photo, base, tmp_path, resume=True)
    assert resumed.stopped_at is None
    assert len(resumed.losses["finetune LoRA"]) == 6
    assert set(tree(unbroken)) <= set(tree(tmp_path))
    assert "me.hdb-state" not in tree(tmp_path)
    for name in ("me.safetensors", "me-000002.safetensors", "me-000004.safetensors"):
        assert (tmp_path / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_a_fit_that_is_stopped_in_its_first_stage_resumes_too(base, photo, tmp_path):
    config = replace(QUICK, theta_steps=3, theta_lr=0.1, steps=2)
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    whole = run(photo, base, tmp_path / "whole", config, save_every=None)
    run(photo, base, tmp_path / "broken", config, stop_at=2, save_every=None)
    assert tree(tmp_path / "broken") == ["me.hdb-state"]  # theta alone is not a LoRA of this person yet
    run(photo, base, tmp_path / "broken", config, stop_at=2, resume=True, save_every=None)  # in the finetuning
    resumed = run(photo, base, tmp_path / "broken", config, resume=True, save_every=None)
    assert torch.equal(resumed.theta, whole.theta)
    assert {name: len(values) for name, values in resumed.losses.items()} == {"fit theta": 3, "finetune LoRA": 2}
    ours, theirs = (load_file(tmp_path / name / "me.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_state_is_of_one_fit(base, photo, tmp_path):
    run(photo, base, tmp_path, stop_at=1, save_every=None)
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=r"me\.hdb-state is left by a stopped fit; pass --resume"):
        run(photo, base, tmp_path)
    with pytest.raises(ValueError, match="of a fit with another lr; resume with what it was begun with"):
        run(photo, base, tmp_path, replace(QUICK, lr=0.1), resume=True)
    mirrored = tmp_path / "mirrored.png"
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    with pytest.raises(ValueError, match="another photos"):
        run(mirrored, base, tmp_path, resume=True)
    mirrored.unlink()
    state = tmp_path / "me.hdb-state"
    damaged = bytearray(state.read_bytes())
    damaged[-9] ^= 1
    state.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"me\.hdb-state is damaged"):
        run(photo, base, tmp_path, resume=True)
    assert tree(tmp_path) == before
    state.unlink()
    with pytest.raises(FileNotFoundError, match="there is no fit to resume"):
        run(photo, base, tmp_path, resume=True)


def test_somebody_elses_files_are_kept_before_any_work(base, photo, tmp_path):
    for name in ("me-000004.safetensors", "me-000004.json", "me-loss.png", "me-sheet.png", "me-000003.png"):
        (tmp_path / name).write_text("[]")
        with pytest.raises(FileExistsError, match=name):
            run(photo, "no/such-base", tmp_path, replace(QUICK, likeness=0.0), previews=(), preview_every=3)
        (tmp_path / name).unlink()


def test_an_exception_leaves_the_intermediate_loras_whole(base, photo, tmp_path):
    def fail(report):
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        personalize_to_files(photo, base, tmp_path / "me.safetensors", QUICK, miniature_lidb_config(), previews=None,
                             save_every=2, on_step=fail)  # fmt: skip
    assert "me-000004.safetensors" in tree(tmp_path)
    assert "me.hdb-state" in tree(tmp_path)  # a run that was killed resumes from its last step that was saved
    assert not [name for name in tree(tmp_path) if "tmp" in name]


def test_a_full_disk_is_told_and_the_fit_goes_on(base, photo, tmp_path, monkeypatch):
    import hypernet.checkpoints as checkpoints

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_tree", full)
    with pytest.raises(OSError, match="No space left"):
        run(photo, base, tmp_path)
    assert {"me-000004.safetensors", "me.safetensors"} <= set(tree(tmp_path))  # what could be written is


def test_the_sheet_and_the_sample_pictures_say_what_they_show(base, photo, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Pictures, "draw", lambda *arguments: [])
    sheet = __import__("hypernet.pictures", fromlist=["draw_sheet"]).draw_sheet

    def quick(base, prompts, loras, weights, seeds, config, *arguments, **options):
        drawn.append((prompts, list(loras), weights))
        return sheet(base, prompts, loras, weights, seeds, replace(config, num_steps=1), *arguments, **options)

    monkeypatch.setattr("hypernet.pictures.draw_sheet", quick)
    run(photo, base, tmp_path, replace(QUICK, steps=3), previews=("a drawing",), preview_every=2, weights=(0.5, 1.0))
    assert drawn == [(["a sks face", "a drawing"], ["me-000002", "me"], (0.5, 1.0))]
    told = read_picture(tmp_path / "me-sheet.png")
    assert told.fields["Y Values"] == "me-000002, me"
    assert read_picture(tmp_path / "me-000002.png").prompt == "a sks face"


def test_the_loss_is_drawn_for_every_stage():
    falling = torch.linspace(1, 0.2, 30)[:, None]
    picture = loss_curve({"fit theta": falling, "finetune LoRA": falling / 2})
    alone = loss_curve({"finetune LoRA": falling})
    assert picture.size == alone.size
    assert picture.tobytes() != alone.tobytes()
    loss_curve({"finetune LoRA": torch.tensor([[0.5]])})
    loss_curve({"finetune LoRA": torch.tensor([[0.5], [float("nan")]])})
    with pytest.raises(ValueError, match="nothing was fitted"):
        loss_curve({"finetune LoRA": torch.empty(0, 1)})
