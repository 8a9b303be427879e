import json

import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image

import testbed.train_hypernetwork as recipe
from hypernet.bases.loading import load_base
from hypernet.network.hypernetwork import HyperNetwork
from lidb_peft import LiDBSpace
from testbed import miniature_lidb_config, miniature_path
from testbed.measuring import to_pixels
from testbed.protocol import photo


def test_the_recipe_makes_a_hypernetwork_from_nothing_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "HELD_OUT", 1)
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
    network.check_space(LiDBSpace(load_base(str(miniature_path()), device="cpu").adapted, miniature_lidb_config()))
    theta = network(to_pixels([photo(0, 0)]))
    best = HyperNetwork.from_pretrained(tmp_path / "training-2" / "best")(to_pixels([photo(0, 0)]))
    assert theta.shape == best.shape
    assert (theta - best).abs().max() < 1e-2 * (best - network.theta_0).abs().max()  # float16 on disk
    assert torch.isfinite(theta).all()
