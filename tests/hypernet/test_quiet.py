import logging
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import transformers
from huggingface_hub.utils import are_progress_bars_disabled

from hypernet.quiet import quiet_libraries

LIBRARIES = {"transformers": transformers.utils.logging, "diffusers": diffusers.utils.logging}


@pytest.fixture
def libraries():
    before = [(library, library.get_verbosity(), library._tqdm_active) for library in LIBRARIES.values()]
    yield LIBRARIES
    for library, verbosity, has_bars in before:
        library.set_verbosity(verbosity)
        (library.enable_progress_bar if has_bars else library.disable_progress_bar)()


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("has_bars", [True, False])
@pytest.mark.parametrize("verbosity", [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL])
def test_a_library_says_errors_only_and_is_the_users_again(libraries, name, has_bars, verbosity):
    library = libraries[name]
    library.set_verbosity(verbosity)
    (library.enable_progress_bar if has_bars else library.disable_progress_bar)()
    is_talkative = verbosity < logging.WARNING

    def load():
        with quiet_libraries():
            assert library.get_verbosity() == (verbosity if is_talkative else max(verbosity, logging.ERROR))
            assert library._tqdm_active == (has_bars and is_talkative)
            raise OSError("no such model")

    with pytest.raises(OSError, match="no such model"):
        load()
    assert (library.get_verbosity(), library._tqdm_active) == (verbosity, has_bars)


@pytest.mark.parametrize("disabled_by_user", [True, None])
def test_downloads_keep_their_bars_unless_the_user_says_otherwise(libraries, monkeypatch, disabled_by_user):
    # What the hub reads from the environment when it is imported: one copy for others, one that outranks all calls.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", disabled_by_user)
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", disabled_by_user)
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", not disabled_by_user)
    with quiet_libraries():
        assert are_progress_bars_disabled() is bool(disabled_by_user)
    assert are_progress_bars_disabled() is bool(disabled_by_user)


@pytest.mark.parametrize(
    "script",
    [
        """
from tempfile import TemporaryDirectory
from hypernet import HyperNetwork, load_base
from testbed import miniature_hypernetwork_path
load_base("testbed")
with TemporaryDirectory() as folder:
    HyperNetwork.from_pretrained(miniature_hypernetwork_path()).save_pretrained(folder)
""",
        """
from tempfile import TemporaryDirectory
from unittest import mock
import costs
from hypernet import load_base
narrow = {"block_out_channels": (32,) * 4, "norm_num_groups": 8}
small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
changed = {
    "CLIP_L": small,
    "SD15_UNET": {**costs.SD15_UNET, **narrow, "layers_per_block": 1, "cross_attention_dim": 32},
    "VAE": {**costs.VAE, **narrow, "layers_per_block": 1},
}
with mock.patch.multiple(costs, **changed), costs.base_folder(costs.RANDOM_SD15) as folder:
    load_base(folder, device="cpu")
""",
    ],
    ids=["the API", "the benchmarks"],
)
def test_loading_and_saving_from_python_print_nothing(script):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "benchmarks")))}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout + ran.stderr == ""
