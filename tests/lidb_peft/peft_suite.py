"""PEFT's own test-suite, asked about LiDB: a pytest plugin, and the command that runs it.

    python tests/lidb_peft/peft_suite.py                    # gets the sources of the installed version with pip
    python tests/lidb_peft/peft_suite.py peft-0.21.2 -x     # an unpacked source distribution; then pytest's options

PEFT's tests ask the same questions of every method, through lists of cases. Wherever such a list names several methods,
LiDB's cases take their place; lists about one method, and tests without a list, are left out. Nothing of PEFT's is
kept here, and nothing there is changed.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftConfig, PromptLearningConfig
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from lidb_peft import LiDBConfig

ROOT = Path(__file__).parents[2]
MODULES = (
    "test_custom_models.py",
    "test_config.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
)
# These want an adapter from the hub: every method fails them without a network.
NEED_THE_HUB = (
    "test_from_pretrained",
    "test_from_pretrained_cache_dir",
    "test_save_pretrained_with_runtime_config",
)

_MLP = {
    "target lin0 as text": {"target_modules": "lin0"},
    "target lin0": {"target_modules": ["lin0"]},
    "target lin1": {"target_modules": ["lin1"]},
    "target both": {"target_modules": ["lin0", "lin1"]},
    "modules_to_save": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    "exclude": {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]},
    "narrow bases": {"target_modules": ["lin0", "lin1"], "r": 2, "down_dim": 6, "up_dim": 4, "scale": 0.5},
    "patterns": {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 2}, "scale_pattern": {"lin1": 0.5}},
    "dropout": {"target_modules": ["lin0"], "lidb_dropout": 0.1},
    "save_projection": {"target_modules": ["lin0"], "save_projection": True},
}
_LIN0, _LIN1 = {"target_modules": ["lin0"], "init_weights": False}, {"target_modules": ["lin1"], "init_weights": False}
# argument names of a list of cases -> LiDB's
CASES: dict[tuple[str, ...], list[Any]] = {
    ("test_name", "model_id", "config_cls", "config_kwargs"): [
        *((f"MLP {name} LiDB", "MLP", LiDBConfig, kwargs) for name, kwargs in _MLP.items()),
        ("Embedding + transformers Conv1D LiDB", "EmbConv1D", LiDBConfig, {"target_modules": ["conv1d"]}),
        (
            "Conv1D and modules_to_save LiDB",
            "EmbConv1D",
            LiDBConfig,
            {"target_modules": ["conv1d"], "modules_to_save": ["lin0"]},
        ),
    ],
    ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"): [
        ("LiDB Same", "lidb", LiDBConfig, _LIN0, _LIN0),
        ("LiDB Different", "lidb", LiDBConfig, _LIN0, _LIN1),
        ("LiDB Seeds and ranks", "lidb", LiDBConfig, _LIN0, _LIN0 | {"r": 3, "seed": 5}),
    ],
    ("test_name", "config0", "config1"): [
        ("LiDB mixed adapter", LiDBConfig(**_LIN0), LiDBConfig(**_LIN0, r=3)),
        ("LiDB mixed seeds", LiDBConfig(**_LIN0), LiDBConfig(**_LIN0, seed=5)),
    ],
    ("test_name", "config"): [("LiDB wrong adapter name", LiDBConfig(**_LIN0))],
    ("config0",): [LiDBConfig(**_LIN0)],
    ("config_cls",): [LiDBConfig],
    ("config_class", "mandatory_kwargs"): [(LiDBConfig, {})],
    # each with the task that the list is about
    ("config_cls", "config_kwargs"): [(LiDBConfig, {}), (LiDBConfig, {"r": 4, "down_dim": 12, "up_dim": 8, "seed": 3})],
}
# The models that PEFT's tests take from the hub are replaced by random ones, of these architectures and sizes.
_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}
_GPT = {"n_embd": 32, "n_layer": 5, "n_head": 4}
_BART = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
         {"layers": 5, "attention_heads": 4, "ffn_dim": 32}.items()}  # fmt: skip
MODELS: dict[type, dict[str, dict[str, int]]] = {
    AutoModelForCausalLM: {
        "OPT": _SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16},
        "GPT2": _GPT,
        "GPTJ": _GPT | {"rotary_dim": 4},
        "Llama": _SIZES,
        "Qwen2": _SIZES | {"num_key_value_heads": 2},
    },
    AutoModelForSeq2SeqLM: {
        "T5": {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 5, "num_heads": 4, "decoder_start_token_id": 0},
        "Bart": _BART | {"d_model": 16},
    },
    AutoModel: {"Bert": _SIZES, "Roberta": _SIZES, "Deberta": _SIZES, "DebertaV2": _SIZES},
    AutoModelForSequenceClassification: {"Bert": _SIZES, "Roberta": _SIZES, "Llama": _SIZES},
}


def _methods(values: Sequence[Any]) -> set[type]:
    """Return the config classes, but those of prompts, that cases name themselves or through instances."""
    rows = [getattr(value, "values", value) for value in values]  # pytest.param
    flat = [item for row in rows for item in (row if isinstance(row, (tuple, list)) else [row])]
    classes = {item if isinstance(item, type) else type(item) for item in flat}
    return {cls for cls in classes if issubclass(cls, PeftConfig) and not issubclass(cls, PromptLearningConfig)}


@lru_cache
def _model_folders(auto_class: type) -> list[str]:
    """Make the models of a class; return their folders, whose names PEFT's tests read as they read the hub's."""
    folder = Path(tempfile.mkdtemp(prefix="peft-suite-"))
    atexit.register(shutil.rmtree, folder)
    for name, sizes in MODELS[auto_class].items():
        config = getattr(transformers, f"{name}Config")(vocab_size=1000, bos_token_id=0, eos_token_id=2, **sizes)
        config.pad_token_id = 3  # none that the tests feed: its embedding is zero
        torch.manual_seed(0)
        model = auto_class.from_config(config)
        model.save_pretrained(folder / f"tiny-random-{type(model).__name__}")
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Put LiDB's cases in the place of several methods', and ours of the hub's models, before pytest reads them."""
    marks = metafunc.definition.own_markers
    for index, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        names, values = mark.args
        names = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names)
        if names == ("model_id",):
            cases = _model_folders(metafunc.cls.transformers_class)
        elif names in CASES and len(_methods(list(values))) > 1:
            cases = CASES[names]
        else:
            continue
        if names == ("config_cls", "config_kwargs"):
            task = {"task_type": values[0][1]["task_type"]}
            cases = [(config_cls, kwargs | task) for config_cls, kwargs in cases]
        marks[index] = pytest.mark.parametrize(", ".join(names), cases, **mark.kwargs).mark


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def asks_about_lidb(item: pytest.Item) -> bool:
        return hasattr(item, "callspec") and LiDBConfig in _methods(list(item.callspec.params.values()))

    ours = [item for item in items if asks_about_lidb(item) and item.originalname not in NEED_THE_HUB]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(ours)])
    items[:] = ours


def download(folder: Path) -> Path:
    """Get the source distribution of the installed PEFT and return where it is unpacked."""
    name = f"peft-{version('peft')}"
    command = [
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "peft",
        "--dest",
        str(folder),
        name.replace("-", "=="),
    ]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def run(sources: Path, options: Sequence[str] = ()) -> int:
    """Run the suite in ``sources``, the unpacked source distribution; return pytest's exit status."""
    (sources / "tests" / "__init__.py").touch()  # its modules import each other relatively, but this file is not packed
    paths = [str(sources / "tests" / module) for module in MODULES]
    search = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    # PEFT's settings make errors of those that transformers gives, and with the newest one PEFT causes some itself.
    options = ["-W", "ignore::FutureWarning", *options]
    command = ["-q", "-p", Path(__file__).stem, "-o", "addopts=", "--rootdir", str(sources), *options, *paths]
    environment = os.environ | {"PYTHONPATH": search}
    return subprocess.run([sys.executable, "-m", "pytest", *command], env=environment, check=False).returncode


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:2] if not argument.startswith("-")]
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(run(Path(given[0]) if given else download(Path(temporary)), sys.argv[1 + len(given) :]))
