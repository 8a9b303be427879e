"""A hypernetwork's prediction as the start of a fit: one person's personalisation, or the pre-optimisation of many."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from hypernet.inputs.people import PreparedPerson
from hypernet.network.config import HyperNetworkConfig
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.recipe import PersonalizeConfig, Progress
from lidb_peft import LiDBSpace

Start = Callable[[Tensor], Tensor]
"""Photos ``(n, 3, size_px, size_px)`` in [-1, 1] on the CPU -> the thetas ``(n, L, row)`` that their fits start at."""

Hypernet = HyperNetwork | HyperNetworkConfig | str | Path
"""A hypernetwork, or its id or folder, or what `read_config` has read there; the weights are loaded when needed."""


def predict_people(
    network: HyperNetwork, people: Sequence[PreparedPerson], device: torch.device, progress: Progress | None = None
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Predict each person from all of their photos; people of equally many photos in one pass.

    The hypernetwork is moved to ``device`` for this and back, so that it holds no memory there while fitting.

    Returns:
        thetas ``(N, L, row)``, and copies by label of the bases that were learned for them, None if they are the frozen
        ones; on the CPU.
    """
    rows_by_count: dict[int, list[int]] = {}
    for row, person in enumerate(people):
        rows_by_count.setdefault(len(person.photos), []).append(row)
    thetas = torch.empty(len(people), *network.theta_0.shape)
    home, was_training = network.device, network.training
    module: nn.Module = network
    module.to(device).eval()
    try:
        for rows in rows_by_count.values():
            thetas[rows] = network.predict(torch.stack([people[row].pixels for row in rows]))
    finally:
        module.to(home).train(was_training)
    if progress is not None:
        progress(1, 1)
    if network.bases is None:
        return thetas, None
    return thetas, {label: basis.detach().to("cpu", copy=True) for label, basis in network.bases.items()}


def predicted_start(
    config: HyperNetworkConfig, models: dict[str, nn.Module], device: torch.device
) -> tuple[LiDBSpace, Start, str]:
    """Load a hypernetwork to start many fits at its predictions.

    Args:
        models: those that a base adapts, by component name.

    Returns:
        The space of its predictions, the start, and a name for the manifest.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is of other models.
    """
    source, network = config.name_or_path, load_network(config)
    space = network.space_on(models)
    if network.bases is not None:
        raise ValueError(f"{source} has learned bases, on which no target is fitted; pass one with frozen bases")
    named = f"{Path(str(source)).name} {weights_digest(network)}"
    cast(nn.Module, network).to(device)
    return space, network.predict, named


def weights_digest(network: HyperNetwork) -> str:
    """16 hex digits that change with a hypernetwork's weights."""
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


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


def load_network(config: HyperNetworkConfig) -> HyperNetwork:
    """Load the weights of the hypernetwork that ``config`` was read from."""
    return HyperNetwork.from_pretrained(str(config.name_or_path), config=config)
