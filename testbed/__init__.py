"""A miniature world to test on: procedural portraits, and a small Stable Diffusion trained on them that ships here."""

from pathlib import Path

from hypernet.bundles import Bundle
from hypernet.recipe import BaselineConfig, PersonalizeConfig

MINIATURE_SIZE_PX = 32
MINIATURE_RECIPE = PersonalizeConfig(
    adapt="denoiser", theta_lr=5e-2, steps=20, lr=8e-3, rank=8, timesteps_per_step=2, max_timestep=500, likeness=0.5,
    guidance=3.0,
)  # fmt: skip
# Chosen on validation identities, docs/results.md.
MINIATURE_BASELINES = BaselineConfig(
    dreambooth_steps=400, dreambooth_lr=3e-4, lora_steps=400, lora_lr=1e-3, lora_rank=8,
    inversion_steps=400, inversion_lr=1e-2, inversion_start="sks",
)  # fmt: skip
# About the fractions of each width that the paper's 100 and 50 keep in SD1.5: 31 % and 16 % of the narrowest.
MINIATURE_DIMS = {"down_dim": 20, "up_dim": 10}


def miniature_path() -> Path:
    """The folder of the bundled Stable Diffusion, in diffusers' layout.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    return _bundled("miniature", "model_index.json", "model", "run python -m testbed.train")


def miniature_hypernetwork_path() -> Path:
    """The folder of the bundled hypernetwork, which predicts the miniature's thetas.

    Raises:
        FileNotFoundError: the weights are not there.
    """
    return _bundled("hypernetwork", "config.json", "hypernetwork", "pass --hypernet none")


def _bundled(folder_name: str, index: str, what: str, remedy: str) -> Path:
    folder = Path(__file__).parent / folder_name
    if not (folder / index).is_file():
        raise FileNotFoundError(f"{folder} has no {what}; install lidb-peft from its wheel, or {remedy}")
    return folder


def miniature_lidb_config():
    """The `LiDBConfig` of the miniature."""
    from lidb_peft import LiDBConfig

    return LiDBConfig(**MINIATURE_DIMS)


def bundle() -> Bundle:
    """The recipe, hypernetwork and other settings for ``base="testbed"``."""
    return Bundle(
        miniature_path, miniature_hypernetwork_path, MINIATURE_RECIPE, MINIATURE_DIMS, MINIATURE_BASELINES, _faces,
        _recogniser,
    )  # fmt: skip


def _faces():
    from testbed.faces import DrawnFaces

    return DrawnFaces()


def _recogniser():
    from testbed.faces import DrawnRecogniser

    return DrawnRecogniser()
