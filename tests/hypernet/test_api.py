"""`from hypernet import ...`: one call each, with defaults that suit the base."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, ViTConfig

import hypernet
import hypernet.training.validation as validation
from converters import FORMATS, detect_format, read_lora
from converters.convert import LIDB_FORMATS
from hypernet import generate, load_base, personalize, personalize_each, preoptimize, train
from hypernet.base_models.loading import load_base as inner_load_base
from hypernet.bundles import base_source, find_bundle, hypernetwork_source
from hypernet.inputs.crops import open_photos
from hypernet.inputs.photos import read_image
from hypernet.recipe import PersonalizeConfig
from lidb_peft import LiDBConfig
from testbed import (
    MINIATURE_RECIPE,
    miniature_hypernetwork_path,
    miniature_lidb_config,
    miniature_path,
)

QUICK = {"crop": False, "steps": 1, "preservation": 0.0, "timesteps_per_step": 1}


def test_names_are_what_they_should_be_after_everything_was_imported():
    for name in hypernet.__all__:
        found = getattr(hypernet, name)
        assert inspect.getdoc(found)
        assert inspect.isclass(found) or inspect.isfunction(inspect.unwrap(found)), name
    assert set(hypernet.__all__) <= set(dir(hypernet))
    with pytest.raises(AttributeError, match="no attribute 'personalise'"):
        _ = hypernet.personalise


def test_importing_hypernet_imports_nothing_heavy():
    script = "import sys, hypernet; sys.exit(bool({'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2]).returncode == 0


@pytest.fixture(scope="module")
def bytes_of_a_photo(photo):
    return np.array(read_image(photo))


@pytest.mark.parametrize(
    "as_photo",
    [
        Image.fromarray,
        lambda array: array,
        lambda array: array.transpose(2, 0, 1),
        lambda array: array / 255,
        lambda array: (array / 255).astype(np.float32),
        torch.from_numpy,
        lambda array: torch.from_numpy(array).permute(2, 0, 1) / 255,
        lambda array: (torch.from_numpy(array) / 255).requires_grad_(),
        lambda array: array[None],
        lambda array: torch.from_numpy(array)[None] / 255,
        lambda array: iter([array]),
    ],
)
def test_pictures_in_memory_are_the_file(photo, bytes_of_a_photo, as_photo):
    ((opened,), _) = open_photos(as_photo(bytes_of_a_photo), crop=False)
    ((from_file,), _) = open_photos(photo, crop=False)
    assert np.array_equal(np.array(opened.image), np.array(from_file.image))
    assert opened.name == "photo 1"


def test_several_pictures_are_several_photos(photo, bytes_of_a_photo):
    opened, _ = open_photos([photo, bytes_of_a_photo], crop=False)
    assert [photo.name for photo in opened] == [str(photo), "photo 2"]
    opened, _ = open_photos(np.stack([bytes_of_a_photo] * 3), crop=False)
    assert len(opened) == 3


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.zeros((40, 40), np.uint8), r"photo 1 has shape \(40, 40\); pass \(h, w, 3\)"),
        (np.zeros((40, 40, 4), np.uint8), r"photo 1 has shape \(40, 40, 4\)"),
        (np.zeros((40, 40, 3)) - 1, "photo 1 holds float64 from -1 to -1; pass bytes"),
        (np.full((40, 40, 3), 200.0), "from 200 to 200"),
        (np.full((40, 40, 3), np.nan), "from nan to nan"),
        (np.zeros((40, 40, 3), np.int64), "photo 1 holds int64"),
        (torch.full((3, 40, 40), 1.5), "photo 1 holds float32 from 1.5 to 1.5"),
        (np.zeros((0, 0, 3), np.float32), r"photo 1 has shape \(0, 0, 3\)"),
    ],
)
def test_numbers_that_are_no_picture_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        open_photos(numbers, crop=False)


def test_what_goes_with_a_base():
    for name in ("testbed", miniature_path(), str(miniature_path())):
        bundle = find_bundle(name)
        assert (bundle.recipe, bundle.lidb_config) == (MINIATURE_RECIPE, miniature_lidb_config())
        assert hypernetwork_source("auto", name) == str(miniature_hypernetwork_path())
    other = find_bundle("someone/a-model")
    assert (other.recipe, other.lidb_config) == (PersonalizeConfig(), LiDBConfig())
    assert hypernetwork_source("auto", "someone/a-model") is None
    assert hypernetwork_source("testbed", "someone/a-model") == str(miniature_hypernetwork_path())
    assert hypernetwork_source("none", "testbed") is None
    assert hypernetwork_source("someone/theirs", "testbed") == "someone/theirs"
    assert base_source("testbed") == str(miniature_path())
    assert base_source("someone/a-model") == "someone/a-model"
    assert load_base is inner_load_base


@pytest.fixture(scope="module")
def result(photo, base):
    return personalize(photo, base, **QUICK)


def test_a_bundled_base_is_personalised_with_its_own_recipe_and_hypernetwork(result, photo, base):
    assert result.bases is not None  # the hypernetwork's
    assert result.config.lr == MINIATURE_RECIPE.lr
    alone = personalize([photo], base, hypernet=None, **QUICK)
    assert alone.bases is None
    assert alone.space.config == miniature_lidb_config()


def test_a_result_is_a_few_lines(result, tmp_path, photo):
    assert 2 <= len(repr(result).splitlines()) <= 5
    assert max(map(len, repr(result).splitlines())) <= 120 + len(result.base.name)
    assert "a sks face" in repr(result)
    result.save(tmp_path / "me.safetensors")
    assert "me.safetensors" in repr(result)


@pytest.mark.parametrize("to", [name for name in FORMATS if name not in LIDB_FORMATS])
def test_a_result_is_saved_in_any_format(result, tmp_path, to):
    path = tmp_path / ("me" if to == "peft" else "me.safetensors")
    result.save(path, to=to, dtype=torch.float32)
    assert detect_format(path) == to
    saved = read_lora(path)
    assert saved.layers.keys() == result.factors.keys()
    for name, (lora_A, lora_B) in result.factors.items():
        layer = saved.layers[name]
        torch.testing.assert_close(layer.scale * layer.lora_B @ layer.lora_A, lora_B @ lora_A, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_a_result_replaces_nothing_unless_it_is_told_to(result, tmp_path, to):
    path = tmp_path / ("me" if to == "peft" else "me.safetensors")
    result.save(path, to=to)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    before = [file.read_bytes() for file in files]
    with pytest.raises(FileExistsError, match=r"me.* exists and is kept"):
        result.save(path, to=to, dtype=torch.float32)
    assert [file.read_bytes() for file in files] == before
    result.save(path, to=to, dtype=torch.float32, overwrite=True)
    assert next(iter(read_lora(path).layers.values())).lora_A.dtype == torch.float32


def test_options_that_there_are_not_name_the_nearest(photo, base):
    with pytest.raises(ValueError, match=r"'step' is not an option of PersonalizeConfig; did you mean 'steps'\?"):
        personalize(photo, base, step=3)


def test_generate_needs_no_space_for_factors(result, base):
    options = {"num_steps": 2, "seed": 1}
    (expected,) = result.draw("a sks face", result.factors, num_steps=2)
    (drawn,) = generate(base, "a sks face", factors=result.factors, num_steps=2, seed=result.config.seed)
    assert np.array_equal(np.array(drawn), np.array(expected))
    plain, other = generate(base, ["a sks face", "a face at night"], **options)
    assert not np.array_equal(np.array(plain), np.array(other))
    with pytest.raises(ValueError, match="there is no prompt"):
        generate(base, [])


def test_a_lora_file_draws_what_its_result_does(result, base, tmp_path):
    result.save(tmp_path / "me.safetensors", dtype=torch.float32)
    (expected,) = result.draw("a sks face", result.factors, num_steps=2)
    (drawn,) = generate(base, "a sks face", lora=tmp_path / "me.safetensors", num_steps=2, seed=result.config.seed)
    assert np.abs(np.array(drawn, dtype=float) - np.array(expected)).max() <= 2


def test_a_folder_of_people_is_personalised_preoptimised_and_trained_on(
    face_folder, datasets_cache, tmp_path, base, monkeypatch
):
    monkeypatch.setattr(validation, "PICTURE_STEPS", 1)
    made = personalize_each(face_folder, base, tmp_path / "loras", previews=None, batch_size=5, **QUICK)
    assert len(made.made) == 5
    assert len(repr(made).splitlines()) == 1
    fit = {"crop": False, "theta_steps": 1, "timesteps_per_step": 1, "preservation": 0.0}
    assert preoptimize(face_folder, tmp_path / "targets", base, batch_size=5, **fit).fitted == 5
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    AutoModel.from_config(vit).save_pretrained(tmp_path / "vit")
    trained = train(
        face_folder, tmp_path / "network", base, targets=tmp_path / "targets", encoder=tmp_path / "vit",
        network_options={"hidden_size": 32, "k": 1}, steps=1, batch_size=2, num_workers=0, crop=False, validation=0.4,
    )  # fmt: skip
    assert trained.folder == tmp_path / "network" / "best"
    first = next(face_folder.iterdir())
    assert personalize(first, base, hypernet=trained.folder, **QUICK).theta.shape[1] == 30
