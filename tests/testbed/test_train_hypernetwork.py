import json

import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image

import testbed.train_hypernetwork as recipe
from hypernet.base_models.loading import load_base
from hypernet.fitting.starts import START_FILE, load_start
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.recipe import StartConfig
from hypernet.training.start import first_start
from testbed import MINIATURE_RECIPE, miniature_path
from testbed.measuring import to_pixels
from testbed.protocol import photo


def test_the_recipe_makes_a_hypernetwork_from_nothing_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "HELD_OUT", 1)
    for name in ("START_PREDICTED", "START_ALONE"):
        monkeypatch.setattr(recipe, name, StartConfig(rounds=2, people=2, inner_steps=1))
    arguments = ["--out", str(tmp_path), "--people", "4", "--encoder-steps", "1", "--threads", "1",
                 "--fraction", "1e-6"]  # fmt: skip
    made = CliRunner().invoke(recipe.main, arguments, catch_exceptions=False)
    assert made.exit_code == 0
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "encoder", tmp_path / "train" / "0000003")}
    written = Image.open(tmp_path / "train" / "0000003" / "1.png")
    assert np.array_equal(np.asarray(written), photo(3, 1))
    again = CliRunner().invoke(recipe.main, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert all(file.stat().st_mtime_ns == time for file, time in files.items())
    for phase, terms in ((1, {"denoising"}), (2, {"denoising"}), (3, {"denoising", "preservation"})):
        lines = [json.loads(line) for line in (tmp_path / f"training-{phase}" / "log.jsonl").read_text().splitlines()]
        assert max(line["step"] for line in lines) == 1
        assert {"denoising", "preservation"} & set(lines[0]) == terms

    network = HyperNetwork.from_pretrained(tmp_path / "hypernetwork")
    space = network.space_on(load_base(str(miniature_path()), device="cpu").adapted)
    assert space.num_layers == 128  # the text encoder is left out
    theta = network(to_pixels([photo(0, 0)]))
    assert torch.isfinite(theta).all()
    for file in (tmp_path / "hypernetwork" / START_FILE, tmp_path / "start-alone.safetensors"):
        start = load_start(file)
        assert start.rank == MINIATURE_RECIPE.rank
        assert not torch.equal(start.flat(space), first_start(space, start.rank).start.half().float())
    assert not list(tmp_path.glob("*unfinished*"))
