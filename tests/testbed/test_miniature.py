"""What the bundled miniature must be, whatever its weights."""

import warnings

import pytest
import torch

from hypernet.base_models.loading import load_base
from hypernet.fitting.starts import START_FILE, find_start, load_start
from hypernet.network.hypernetwork import HyperNetwork
from lidb_peft import LiDBSpace
from testbed import (
    MINIATURE_RECIPE,
    MINIATURE_SIZE_PX,
    miniature_hypernetwork_path,
    miniature_lidb_config,
    miniature_path,
)
from testbed.demo import COLUMNS, draw_photos, run_demo
from testbed.measuring import measuring_path, to_pixels


@pytest.fixture(scope="module")
def base():
    return load_base(str(miniature_path()), device="cpu")


def test_it_has_the_layers_of_sd15(base):
    names = LiDBSpace(base.adapted, miniature_lidb_config()).layer_names
    assert len(names) == 176
    assert sum(name.startswith("unet.") for name in names) == 128
    blocks = base.unet.config.down_block_types
    assert blocks == ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    assert base.unet.config.norm_num_groups == 32


def test_its_bases_are_far_from_complete(base):
    space = LiDBSpace(base.adapted, miniature_lidb_config())
    for index, (fan_in, fan_out) in enumerate(space.shapes):
        down, up = space.basis_keys(index)
        assert down.dim <= 0.32 * fan_in
        assert up.dim <= 0.16 * fan_out


def test_its_hypernetwork_predicts_for_its_recipe(base):
    network = HyperNetwork.from_pretrained(miniature_hypernetwork_path())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of another base
        space = network.space_on(base.adapted)
    assert space.num_layers == 128  # the denoiser's
    assert (network.config.prompt, network.config.token) == (MINIATURE_RECIPE.prompt, MINIATURE_RECIPE.token)
    for folder in (miniature_hypernetwork_path(), miniature_path()):
        start = load_start(find_start("", str(folder))).of_rank(MINIATURE_RECIPE.rank)
        assert start.flat(space).isfinite().all()


def test_it_is_small(base):
    starts = [folder / START_FILE for folder in (miniature_path(), miniature_hypernetwork_path())]
    assert max(start.stat().st_size for start in starts) <= 500_000
    files = {*miniature_path().rglob("*"), measuring_path()} - {*starts}
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 16_000_000
    assert sum(file.stat().st_size for file in miniature_hypernetwork_path().iterdir()) <= 10_000_000
    assert base.size_px == MINIATURE_SIZE_PX


def test_its_autoencoder_reconstructs_test_portraits(base):
    from testbed.corpus import portrait
    from testbed.train import psnr_db

    pixels = to_pixels([portrait(index, "test")[0] for index in range(64)])
    with torch.no_grad():
        output = base.vae.decode(base.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    assert psnr_db(output, pixels) > 24.5


def test_demo_writes_everything_and_counts_progress(tmp_path, monkeypatch):
    from dataclasses import replace

    import testbed.demo as demo

    monkeypatch.setattr(demo, "MINIATURE_RECIPE", replace(demo.MINIATURE_RECIPE, steps=2))
    monkeypatch.setattr(demo, "NUM_STEPS", 2)
    seen = []
    files, result = run_demo(tmp_path / "out", progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert {stage for stage, _, _ in seen} >= {"predict", "finetune LoRA", "draw prediction", "draw LoRA"}
    assert all(done <= total for _, done, total in seen)
    assert set(result.seconds) >= {"predict", "finetune LoRA"}
    for file in (files.photo, files.lora, files.sheet, files.lora.with_suffix(".json")):
        assert file.stat().st_size > 0
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(draw_photos(0)[1]) == len(COLUMNS)
