"""Validation while a hypernetwork trains: losses on people it never sees, at fixed noise, and pictures of them."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hypernet.sampling import generate, save_picture, to_image
from hypernet.sheets import contact_sheet
from hypernet.training.examples import Example, Examples, validation_places
from hypernet.training.objective import SUMMED, Objective

TIMESTEPS = 4  # noisy copies of each photo, spread over the schedule
PICTURED = 4
PICTURE_STEPS = 20
STYLED = "a pencil drawing of {}"


def validation_loader(examples: Examples, rank: int, world: int, is_cuda: bool = False) -> DataLoader:
    """Loads process ``rank``'s share of the people, again and again; its workers stay, for they take long to start."""
    config = examples.config
    places = list(validation_places(config, len(examples), rank, world))
    return DataLoader(
        examples, batch_sampler=places, collate_fn=examples.collate, num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0, generator=torch.Generator(), pin_memory=is_cuda,
    )  # fmt: skip


@torch.no_grad()
def validation_sums(objective: Objective, loader: DataLoader) -> Tensor:
    """The sums of a batch's `Objective.forward`, over the people of a `validation_loader`."""
    device = objective.base.device
    sums = torch.zeros(len(SUMMED), device=device)
    objective.eval()
    for batch in loader:
        sums += objective(batch.to(device))[1]
    objective.train()
    return sums


@torch.no_grad()
def draw_sheet(objective: Objective, examples: Examples, path: Path) -> None:
    """Write pictures of the first few people, each beside the photo they are predicted from, from a fixed seed."""
    prompt = objective.network.config.trigger
    prompts = (prompt, STYLED.format(prompt))
    objective.eval()
    rows = []
    for example in _usable(examples, PICTURED):
        theta = objective.network(example.seen[None].to(objective.base.device))[0]
        factors = objective.space.factors(theta, objective.network.bases)
        objective.base.release_vae()
        pictures = generate(objective.base, prompts, objective.space, factors, num_steps=PICTURE_STEPS)
        rows.append((example.name, [to_image(example.seen), *pictures]))
    objective.train()
    if rows:
        save_picture(contact_sheet(rows, ("photo", *prompts)), path)


def _usable(examples: Examples, count: int) -> list[Example]:
    found = []
    for row in range(len(examples)):
        example = examples[0, row]
        if example.name:
            found.append(example)
        if len(found) == count:
            break
    return found
