"""A hypernetwork's prediction as the start of a fit: one person's personalisation, or the pre-optimisation of many."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hypernet.inputs.photos import Photo
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork, read_config
from hypernet.recipe import PersonalizeConfig, Progress
from lidb_peft import LiDBSpace

Start = Callable[[Tensor], Tensor]
"""Photos ``(n, 3, size_px, size_px)`` in [-1, 1] on the CPU -> the thetas ``(n, L, row)`` that their fits start at."""

Hypernet = HyperNetwork | HyperNetworkConfig | str | Path
"""A hypernetwork, or its id or folder, or what `read_config` has read there; the weights are loaded when needed."""


def predict_person(
    network: HyperNetwork, photos: Sequence[Photo], device: torch.device, progress: Progress | None = None
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Predict the person in all of ``photos``.

    The hypernetwork is moved to ``device`` for this and back, so that it holds no memory there while fitting.

    Returns:
        theta ``(L, row)``, and copies by label of the bases that were learned for it, None if they are the frozen ones;
        on the CPU.
    """
    home, was_training = network.device, network.training
    network.to(device).eval()
    try:
        theta = network.predict(torch.stack([photo.to_tensor() for photo in photos])[None])[0]
    finally:
        network.to(home).train(was_training)
    if progress is not None:
        progress(1, 1)
    if network.bases is None:
        return theta, None
    return theta, {label: basis.detach().to("cpu", copy=True) for label, basis in network.bases.items()}


def predicted_start(source: str | Path, space: LiDBSpace, device: torch.device) -> tuple[Start, str]:
    """Load a hypernetwork to start many fits at its predictions; return that and a name for the manifest.

    Raises:
        FileNotFoundError, ValueError: there is none, or it predicts no thetas of ``space``.
    """
    network = HyperNetwork.from_pretrained(source)
    network.check_space(space)
    if network.bases is not None:
        raise ValueError(f"{source} has learned bases, on which no target is fitted; pass one with frozen bases")
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    return network.to(device).predict, f"{Path(source).name} {digest.hexdigest()[:16]}"


def predicted_recipe(network: HyperNetworkConfig, recipe: PersonalizeConfig | None = None) -> PersonalizeConfig:
    """Return ``recipe`` as it goes with a prediction, which is worth half of the steps.

    The prompt and the token are the hypernetwork's, and theta is not fitted.
    """
    recipe = recipe or PersonalizeConfig()
    return replace(recipe, prompt=network.prompt, token=network.token, theta_steps=0, steps=math.ceil(recipe.steps / 2))


def check_recipe(network: HyperNetworkConfig, recipe: PersonalizeConfig | None) -> PersonalizeConfig:
    """Return ``recipe``, by default the `predicted_recipe`.

    Raises:
        ValueError: its prompt or token is not what the hypernetwork predicts for.
    """
    recipe = recipe or predicted_recipe(network)
    if (recipe.prompt, recipe.token) != (network.prompt, network.token):
        raise ValueError(
            f"the hypernetwork predicts for the prompt {network.prompt!r} with the token {network.token!r}, not for "
            f"{recipe.prompt!r} with {recipe.token!r}; leave --prompt and --token out, or pass --hypernet none"
        )
    return recipe


def read_once(hypernet: Hypernet | None) -> HyperNetwork | HyperNetworkConfig | None:
    """Return ``hypernet``, in place of an id or folder its config; raises as `read_config` does."""
    return read_config(hypernet) if isinstance(hypernet, str | Path) else hypernet


def config_of(hypernet: HyperNetwork | HyperNetworkConfig | None) -> HyperNetworkConfig | None:
    return hypernet.config if isinstance(hypernet, HyperNetwork) else hypernet
