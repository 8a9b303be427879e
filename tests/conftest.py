"""One thread for all tests: the models are so small that a second one costs more than it gives on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def portrait(tmp_path_factory):
    """A drawn portrait in a file, to be used with ``crop=False``: a drawing is no face to the detector."""
    from testbed.demo import draw_photos

    path = tmp_path_factory.mktemp("photos") / "portrait.png"
    picture, _ = draw_photos(person=3)
    picture.resize((96, 96), Image.Resampling.NEAREST).save(path)
    return path
