"""A learned start: the LoRA factors from which a few steps of finetuning reach a person, whoever it is.

Reptile (Nichol et al. 2018, arXiv:1803.02999, algorithm 2): a few people are finetuned from the present start, as a
user's are, and the start moves towards the mean of what became of it. Learned beside a hypernetwork's predictions or
without one; a start is part of the LoRA that a user gets, so nothing is lost at export.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hypernet.base_models.base import BaseModel
from hypernet.fitting.engine import Subject, fit_flat_lora
from hypernet.fitting.subjects import make_subjects
from hypernet.inputs.people import People, PreparedPerson, derive_seed, prepare_person
from hypernet.inputs.recognition import Recogniser
from hypernet.network.hypernetwork import HyperNetwork
from hypernet.network.prediction import predict_people
from hypernet.recipe import FitConfig, PersonalizeConfig, Progress, StartConfig
from lidb_peft import LiDBSpace
from lidb_peft.files import atomic_path
from lidb_peft.safe_read import read_tensors

Round = Callable[[int], tuple[Sequence[Subject], Tensor | None]]
"""Called with the number of a round: its people, and the thetas ``(n, L, row)`` beside which they are finetuned."""


@dataclass
class StartState:
    """Where learning a start stands.

    Attributes:
        start: flat LoRA factors ``(lora_size(rank),)``.
        rounds: done.
        losses: the mean denoising loss of each round's fits, first and last step.
    """

    start: Tensor
    rounds: int
    losses: list[tuple[float, float]]


def first_start(space: LiDBSpace, rank: int, seed: int = 0) -> StartState:
    """A fresh LoRA, which changes nothing yet."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "start"))
    return StartState(space.init_lora(rank, generator), 0, [])


def rounds_of(
    people: People,
    base: BaseModel,
    recipe: PersonalizeConfig,
    config: StartConfig,
    network: HyperNetwork | None = None,
    recogniser: Recogniser | None = None,
) -> Round:
    """Rounds of a data set's people, in an order that the seed gives, again and again; who is unusable is left out.

    Args:
        network: finetunings are beside its predictions; None without any.
        recogniser: computes the people's embeddings.
    """
    if not len(people.dataset):
        raise ValueError(f"{people.source} holds no people; pass a data set with at least one image")
    order = np.random.default_rng(config.seed).permutation(len(people.dataset))

    def of_round(number: int) -> tuple[Sequence[Subject], Tensor | None]:
        found: dict[str, PreparedPerson] = {}
        first = number * config.people
        for place in range(first, first + len(order)):
            row = int(order[place % len(order)])
            (person,) = replace(people, dataset=people.dataset.select([row]))
            prepared, skipped = prepare_person(
                person, base.size_px, recipe.crop, recipe.face_detector, face=recipe.face
            )
            if prepared is not None:
                found[prepared.key] = prepared
            if len(found) == config.people:
                break
        if not found:
            raise ValueError(f"nobody in {people.source} can be used ({skipped[0].name}: {skipped[0].reason})")
        chosen = list(found.values())
        theta = None if network is None else predict_people(network, chosen, base.device)[0]
        return make_subjects(base, chosen, recipe.trigger, recipe.class_prompt, recogniser=recogniser), theta

    return of_round


@contextmanager
def resumable_start(
    file: Path, space: LiDBSpace, rank: int, seed: int = 0
) -> Iterator[tuple[StartState, Callable[[StartState], None]]]:
    """The state in ``file``, or the first; and what writes it there. The file goes when the block ends well.

    Raises:
        ValueError: the file is of another rank or other layers, or damaged.
    """
    state = _read_state(file, space, rank) if file.exists() else first_start(space, rank, seed)

    def checkpoint(state: StartState) -> None:
        progress = {"rounds": state.rounds, "losses": state.losses, "layers_hash": space.layers_hash}
        with atomic_path(file) as temporary:
            save_file({"start": state.start}, temporary, metadata={"learn_start": json.dumps(progress)})

    yield state, checkpoint
    file.unlink(missing_ok=True)


def _read_state(file: Path, space: LiDBSpace, rank: int) -> StartState:
    tensors, metadata = read_tensors(file)
    try:
        found, start = json.loads(metadata["learn_start"]), tensors["start"]
        layers, rounds = found["layers_hash"], int(found["rounds"])
        losses = [(float(first), float(last)) for first, last in found["losses"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a start that is being learned; choose another file, or delete it") from error
    if layers != space.layers_hash or start.shape != (space.lora_size(rank),):
        raise ValueError(f"{file} is of another rank or of other layers; continue with its own, or delete it")
    return StartState(start, rounds, losses)


def learn_start(
    base: BaseModel,
    space: LiDBSpace,
    people: Round,
    config: StartConfig,
    fit: FitConfig,
    state: StartState,
    rank: int,
    bases: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    checkpoint: Callable[[StartState], None] | None = None,
    recogniser: Recogniser | None = None,
) -> StartState:
    """Go on from ``state`` to ``config.rounds``.

    Args:
        people: whom each round fits; the same of the same number, so that a stopped run is gone on with.
        fit: how they are fitted: as users' fits will be, for ``config.inner_steps``.
        bases: the learned ones of the thetas, by label; None takes the frozen ones.
        progress: called with (rounds done, rounds in all).
        checkpoint: called after every round.
        recogniser: as for `fit_flat_lora`.

    Raises:
        ValueError: a fit diverged, or start, people and space do not fit together.
    """
    for number in range(state.rounds, config.rounds):
        subjects, theta = people(number)
        own = config.inner_fit(fit, number)
        fitted, losses = fit_flat_lora(
            base, space, subjects, own, rank, theta, bases=bases, start=state.start, recogniser=recogniser
        )
        rate = config.rate * (1 - number / config.rounds)
        state.start = state.start + rate * (fitted.mean(dim=0) - state.start)
        state.losses.append((float(losses[0].mean()), float(losses[-1].mean())))
        state.rounds = number + 1
        if checkpoint is not None:
            checkpoint(state)
        if progress is not None:
            progress(state.rounds, config.rounds)
    return state
