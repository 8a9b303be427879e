import errno
import json
import os
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from PIL import Image

import hypernet.personalization as personalization
from converters import prepare_conversion
from hypernet.base_models.loading import load_base
from hypernet.fitting.subjects import make_subjects
from hypernet.inputs.people import PreparedPerson
from hypernet.inputs.photos import load_photo
from hypernet.personalization import personalize, personalize_to_files
from hypernet.personalized import Personalization
from hypernet.recipe import PersonalizeConfig
from hypernet.request import request_person
from lidb_peft import LiDBConfig, LiDBSpace, load_theta, save_theta
from testbed import MINIATURE_RECIPE, miniature_lidb_config, miniature_path

QUICK = replace(
    MINIATURE_RECIPE, adapt="all", theta_steps=3, theta_lr=0.1, steps=3, lr=0.05, rank=2, crop=False, likeness=0.0
)
SUBNORMAL = 1e-9  # a layer that hardly changes has factors among float16's subnormal numbers


@pytest.fixture(scope="module")
def result(base, photo):
    return personalize([photo], base, QUICK, miniature_lidb_config())


def tree(folder):
    return sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*"))


# ---- the way from photo to LoRA ----


def test_the_file_holds_the_fitted_weights_module_by_module(result, tmp_path, assert_same_deltas):
    assert len(result.factors) == 176
    assert {lora_A.shape[0] for lora_A, _ in result.factors.values()} == {3}  # theta's 1 and the LoRA's 2
    result.save(tmp_path / "half.safetensors")
    assert_same_deltas(tmp_path / "half.safetensors", result.factors, 2e-3, floor=SUBNORMAL)
    result.save(tmp_path / "full.safetensors", dtype=torch.float32)
    assert_same_deltas(tmp_path / "full.safetensors", result.factors, 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2)])
def test_diffusers_draws_with_the_file_what_the_fit_draws(result, tmp_path, dtype, tolerance):
    file = tmp_path / "me.safetensors"
    result.save(file, dtype=dtype)
    settings = {"prompt": "a sks face", "num_inference_steps": 3, "guidance_scale": 4.0, "height": 32, "width": 32,
                "output_type": "latent"}  # fmt: skip

    def latents(pipeline):
        return pipeline(**settings, generator=torch.Generator().manual_seed(0)).images

    plain = latents(result.base.pipeline())
    with result.space.apply(result.factors):
        expected = latents(result.base.pipeline())
    fresh = load_base(str(miniature_path()), device="cpu").pipeline()
    fresh.load_lora_weights(str(tmp_path), weight_name=file.name)
    difference = (latents(fresh) - expected).norm()
    assert difference < tolerance * (expected - plain).norm()


def test_each_stage_moves_on_from_the_one_before(result, space):
    assert not torch.equal(result.theta, space.theta_0)
    for layer, (theta_A, theta_B) in result.theta_factors.items():
        lora_A, lora_B = result.factors[layer]
        assert torch.equal(lora_A[:1], theta_A)
        assert torch.equal(lora_B[:, :1], theta_B)
    assert result.losses["fit theta"].shape == (3, 1)
    assert result.losses["finetune LoRA"].shape == (3, 1)
    assert set(result.seconds) == {"prepare photos", "fit theta", "finetune LoRA"}


def test_stages_can_be_left_out(base, photo, space, taught):
    lora_only = personalize([photo], base, replace(QUICK, theta_steps=0), miniature_lidb_config())
    assert torch.equal(lora_only.theta, space.theta_0)
    assert {len(lora_A) for lora_A, _ in lora_only.factors.values()} == {QUICK.rank}
    assert [name for name, (_, lora_B) in lora_only.factors.items() if lora_B.abs().max() > 1e-6] == taught
    theta_only = personalize([photo], base, replace(QUICK, steps=0), miniature_lidb_config())
    assert theta_only.factors is theta_only.theta_factors
    with pytest.raises(ValueError, match="theta_steps and steps are both 0"):
        personalize([photo], base, replace(QUICK, theta_steps=0, steps=0), miniature_lidb_config())


def test_several_photos_are_one_person(base, photo, tmp_path):
    mirrored = tmp_path / "mirrored.png"
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    both = personalize([photo, mirrored], base, replace(QUICK, steps=0), miniature_lidb_config())
    assert len(both.photos) == 2
    assert both.theta.dim() == 2


def test_the_same_photo_has_the_same_noise_under_any_name(base, photo, tmp_path):
    copy = tmp_path / "another name.png"
    copy.write_bytes(photo.read_bytes())
    people = [PreparedPerson(file.name, (load_photo(file, 32, crop=False),)) for file in (photo, copy)]
    keys = [subject.key for subject in make_subjects(base, people, "a face")]
    assert keys[0] == keys[1]


def test_all_files_are_written_and_named(base, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(Personalization, "draw", partialmethod(Personalization.draw, num_steps=1))
    out, theta = tmp_path / "me.safetensors", tmp_path / "me-theta.safetensors"
    result = personalize_to_files(
        [photo], base, out, QUICK, miniature_lidb_config(), previews=["a sks face at night"], save_theta=theta
    )
    written = ["me-preview.png", "me-theta.safetensors", "me.json", "me.png", "me.safetensors"]
    assert tree(tmp_path) == written
    assert sorted(file.name for file in result.files) == written
    assert json.loads((tmp_path / "me.json").read_text())["activation text"] == "a sks face"
    assert Image.open(tmp_path / "me.png").size == (32, 32)


# ---- theta files ----


def test_theta_goes_out_and_comes_back(result, base, photo, tmp_path, assert_same_deltas):
    file = tmp_path / "theta.safetensors"
    result.save_theta(file)
    stored = result.theta.half().float()
    again = personalize([photo], base, replace(QUICK, theta_steps=0, steps=0), from_theta=file)
    assert torch.equal(again.theta, stored)
    prepare_conversion(file, tmp_path / "lora.safetensors", "kohya", family="sd1", models=base.adapted).write()
    assert_same_deltas(tmp_path / "lora.safetensors", result.space.factors(stored), 2e-3, floor=SUBNORMAL)


def test_a_theta_file_brings_its_own_bases(result, base, photo, tmp_path):
    other = LiDBSpace(base.adapted, LiDBConfig(down_dim=8, up_dim=6, seed=3))
    file = tmp_path / "theta.safetensors"
    save_theta(file, other.theta_0, other)
    started = personalize([photo], base, replace(QUICK, theta_steps=1, steps=0), miniature_lidb_config(), file)
    assert started.space.config.seed == 3
    assert started.theta.shape == (176, 14)


def test_a_theta_of_another_layer_list_is_refused(base, photo, tmp_path):
    half = LiDBSpace({"unet": base.unet.down_blocks}, miniature_lidb_config())
    file = tmp_path / "theta.safetensors"
    save_theta(file, half.theta_0, half)
    with pytest.raises(ValueError, match=f"{file} belongs to another list of 48 layers"):
        personalize([photo], base, QUICK, from_theta=file)
    assert tree(tmp_path) == ["theta.safetensors"]


def test_a_theta_of_the_denoiser_goes_out_and_comes_back(base, photo, tmp_path):
    made = personalize([photo], base, replace(QUICK, adapt="denoiser"), miniature_lidb_config())
    made.save_theta(tmp_path / "theta.safetensors")
    started = personalize(
        [photo], base, replace(QUICK, theta_steps=0, steps=1), from_theta=tmp_path / "theta.safetensors"
    )
    assert torch.allclose(started.theta, made.theta, atol=1e-3)  # float16 on disk
    assert {name.partition(".")[0] for name in started.factors} == {"unet"}


def test_a_theta_of_another_checkpoint_is_a_warning(result, photo, tmp_path):
    file = tmp_path / "theta.safetensors"
    result.save_theta(file)
    finetuned = load_base(str(miniature_path()), device="cpu")
    with torch.no_grad():
        for parameter in finetuned.unet.parameters():
            parameter.mul_(1.1)
    with pytest.warns(UserWarning, match="weights differ from this model's"):
        prepare_conversion(file, tmp_path / "lora.safetensors", "kohya", family="sd1", models=finetuned.adapted)


# ---- whole or not at all ----


@pytest.mark.parametrize(
    ("stage", "left"),
    [
        ("fit theta", []),
        ("finetune LoRA", []),
        ("draw preview", ["me.json", "me.safetensors", "theta.safetensors"]),  # the work comes before the picture
    ],
)
def test_an_interruption_leaves_what_is_whole(base, photo, tmp_path, stage, left):
    def interrupt(name, done, total):
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        personalize_to_files(
            [photo], base, tmp_path / "me.safetensors", QUICK, miniature_lidb_config(),
            save_theta=tmp_path / "theta.safetensors", progress=interrupt,
        )  # fmt: skip
    assert tree(tmp_path) == left


def test_weights_alone_replace_nothing_unless_they_are_told_to(result, tmp_path):
    (tmp_path / "theta.safetensors").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError, match=r"theta\.safetensors exists and is kept"):
        result.save_theta(tmp_path / "theta.safetensors")
    assert (tmp_path / "theta.safetensors").read_bytes() == b"somebody's"
    result.save_theta(tmp_path / "theta.safetensors", overwrite=True)
    assert torch.equal(load_theta(tmp_path / "theta.safetensors").theta.half(), result.theta.half())


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(result, tmp_path, monkeypatch):
    file = tmp_path / "me.safetensors"
    file.write_text("the one from yesterday")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        result.save(file, overwrite=True)
    assert caught.value.filename == str(file.with_suffix(".json"))  # the sidecar comes first, the LoRA last
    assert file.read_text() == "the one from yesterday"
    with pytest.raises(OSError, match="No space left"):
        result.save_theta(tmp_path / "theta.safetensors")
    assert tree(tmp_path) == ["me.safetensors"]


def test_a_diverged_fit_writes_nothing(base, photo, tmp_path):
    with pytest.raises(ValueError, match="diverged"):
        personalize_to_files([photo], base, tmp_path / "me.safetensors", replace(QUICK, lr=1e30),
                             miniature_lidb_config())  # fmt: skip
    assert tree(tmp_path) == []


@pytest.fixture
def no_work(monkeypatch):
    """Anything that would take time fails the test."""
    monkeypatch.setattr(personalization, "make_person", lambda *_: pytest.fail("work began"))


def test_bad_outputs_are_found_before_any_work(base, photo, tmp_path, no_work):
    def run(out, **options):
        personalize_to_files([photo], base, out, QUICK, **options)

    with pytest.raises(FileNotFoundError, match="nowhere does not exist; make the folder first"):
        run(tmp_path / "nowhere/me.safetensors")
    with pytest.raises(ValueError, match=r"me.pt does not end in .safetensors"):
        run(tmp_path / "me.pt")
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"dir.safetensors is a folder"):
        run(tmp_path / "dir.safetensors")
    out = tmp_path / "me.safetensors"
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run(out, save_theta=tmp_path / "nowhere/theta.safetensors")
    with pytest.raises(ValueError, match="both the LoRA and the LiDB weights"):
        run(out, save_theta=out)
    with pytest.raises(ValueError, match="both what is read and what is written"):
        run(out, from_theta=tmp_path / "dir.safetensors/../me.safetensors")


def test_a_folder_that_cannot_be_written_is_found_before_any_work(base, photo, tmp_path, monkeypatch, no_work):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(PermissionError, match="is not writable"):
        personalize_to_files([photo], base, tmp_path / "me.safetensors", QUICK)


def test_bad_inputs_are_found_before_a_base_is_loaded(photo, tmp_path):
    out = tmp_path / "me.safetensors"
    request_person([photo], out, QUICK)
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    with pytest.raises(ValueError, match=r"notes.txt is not an image"):
        request_person([text], out, QUICK)
    with pytest.raises(FileNotFoundError, match=r"nobody.jpg does not exist"):
        request_person([tmp_path / "nobody.jpg"], out, QUICK)
    with pytest.raises(ValueError, match=r"notes.txt is .*not a safetensors file"):
        request_person([photo], out, QUICK, from_theta=text)


def test_no_photo_is_refused(base):
    with pytest.raises(ValueError, match="there is no photo"):
        personalize([], base, QUICK, miniature_lidb_config())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": "a face"}, r"it must hold \[V\]"),
        ({"prompt": "[V]"}, "nothing is left without the person"),
        ({"token": " "}, "token is empty"),
        ({"rank": 0}, "rank is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"theta_lr": 0}, "lr is 0"),
    ],
)
def test_bad_settings_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        PersonalizeConfig(**change)
