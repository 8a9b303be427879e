"""One thread for all tests: the models are so small that a second one costs more than it gives on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import pytest
import torch
from PIL import Image

torch.set_num_threads(1)

CLEAR = 300  # times the heads' first weights: predictions as far from theta_0 as those of a trained network


@pytest.fixture(scope="session")
def make_hypernetwork():
    """A function: (space, options) -> a tiny hypernetwork; learned bases are no longer the frozen ones."""
    from transformers import ViTConfig

    from hypernet.network.config import HyperNetworkConfig
    from hypernet.network.hypernetwork import HyperNetwork

    encoder = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8
    )
    decoder = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "rounds": 2}

    @torch.no_grad()
    def make(space, **options):
        network = HyperNetwork(HyperNetworkConfig.for_space(space, encoder, "mini", **decoder | options)).eval()
        network.heads.weight.mul_(CLEAR)
        for index, basis in enumerate((network.bases or {}).values()):
            basis.add_(0.1 * torch.randn(basis.shape, generator=torch.Generator().manual_seed(index)))
        return network

    return make


@pytest.fixture(scope="session")
def portrait(tmp_path_factory):
    """A drawn portrait in a file, to be used with ``crop=False``: a drawing is no face to the detector."""
    from testbed.demo import draw_photos

    path = tmp_path_factory.mktemp("photos") / "portrait.png"
    picture, _ = draw_photos(person=3)
    picture.resize((96, 96), Image.Resampling.NEAREST).save(path)
    return path
