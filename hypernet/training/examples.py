"""The training examples of a hypernetwork, step by step: which people, which photos, how they are cropped and flipped.

They depend only on the seed, the step number and the person, not on the process or worker that prepares them. So the
step number is enough to resume a run, and processes that share a batch train like a single one.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from hypernet.fitting.targets import TargetStore
from hypernet.inputs.face import Face
from hypernet.inputs.people import People, PreparedPerson, Skipped, derive_seed, prepare_person
from hypernet.recipe import TrainConfig

BLANK = -1
"""A placeholder row that fills up a batch."""

Place = tuple[int, int]
"""(step, row of the data set): the index of an example."""


@dataclass(frozen=True)
class Example:
    """One person in one step.

    Attributes:
        name: empty if the row cannot be used; its pictures are grey then, and its weight is zero.
        seen: the photo for the encoder, ``(3, size_px, size_px)`` in [-1, 1].
        denoised: the photo to denoise, cropped and flipped like ``seen``.
        photo: identifies ``denoised`` before cropping and flipping.
        moments: of ``denoised``, ``(2 * c * h * w)`` float16, if they are stored and it is neither cropped nor flipped.
        target: the person's pre-optimised theta ``(L, row)``; None if there are no targets.
        drops_caption: whether the prompt is empty.
        seed: random seed of the person's noise in this step.
        skipped: photos that could not be used.
    """

    name: str
    seen: Tensor
    denoised: Tensor
    photo: str = ""
    moments: Tensor | None = None
    target: Tensor | None = None
    drops_caption: bool = False
    seed: int = 0
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True)
class Batch:
    """B examples; ``counts`` ``(B,)`` is 1 where one can be used, and ``copies`` is the noisy copies of each photo.

    ``moments`` ``(B, 2 * c * h * w)`` are there if all who can be used have them; those of the others are 0.
    """

    seen: Tensor
    denoised: Tensor
    photos: tuple[str, ...]
    targets: Tensor | None
    drops_caption: Tensor
    counts: Tensor
    seeds: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    copies: int
    moments: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, except ``denoised``: photos with cached latents are not needed there."""
        return self._each(lambda value: value.to(device, non_blocking=device.type == "cuda"), without=("denoised",))

    def pin_memory(self) -> "Batch":
        """Pin the tensors, as `DataLoader` asks, so that copies to a GPU are asynchronous."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor], without: Sequence[str] = ()) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed: dict[str, Any] = {name: change(value) for name, value in tensors.items() if name not in without}
        return replace(self, **changed)

    def generators(self) -> list[torch.Generator]:
        """Each person's own generator, newly seeded."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]


class Examples(Dataset):
    """The people of a data set as examples; ``examples[step, row]`` is the same in every process."""

    def __init__(
        self,
        people: People,
        size_px: int,
        config: TrainConfig,
        targets: TargetStore | None = None,
        theta_shape: tuple[int, int] = (0, 0),
        copies: int = 1,
        is_validation: bool = False,
    ) -> None:
        """Prepare ``people`` at ``size_px``.

        Args:
            targets: if given, only people with a target can be used.
            theta_shape: shape of a target.
            copies: see `Batch`.
            is_validation: do not crop, flip or drop anything.
        """
        self.people, self.size_px, self.config, self.targets = people, size_px, config, targets
        self.theta_shape, self.copies, self.is_validation = theta_shape, copies, is_validation
        self._faces: dict[bytes, tuple[Face, ...]] = {}  # each worker has its own

    def __len__(self) -> int:
        return len(self.people.dataset)

    def __getitem__(self, place: Place) -> Example:
        step, row = place
        if row == BLANK:
            return self._blank()
        # Through People, which decodes only this row.
        (person,) = replace(self.people, dataset=self.people.dataset.select([row]))
        config = self.config
        prepared, skipped = prepare_person(
            person, self.size_px, config.crop, config.face_detector, self._faces, config.face
        )
        if prepared is None:
            return self._blank(*skipped)
        if self.targets is not None and prepared.key not in self.targets:
            return self._blank(*skipped, Skipped(person.name, "it has no target that was fitted on these photos"))
        return self._example(step, prepared, tuple(skipped))

    def _example(self, step: int, person: PreparedPerson, skipped: tuple[Skipped, ...]) -> Example:
        purpose = "validate" if self.is_validation else "train"
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, purpose, step, person.key))
        seen, denoised = _choose_photos(len(person.pixels), self.config.same_photo, generator)
        pair = person.pixels[[seen, denoised]]
        is_changed = self.config.augments and not self.is_validation
        if is_changed:
            pair = augment(pair, self.config.flip, self.config.jitter, generator)
        drops = torch.rand((), generator=generator).item() < self.config.caption_dropout
        return Example(
            name=person.name,
            seen=pair[0],
            denoised=pair[1],
            photo=f"{person.key} {denoised}",
            moments=None if person.moments is None or is_changed else person.moments[denoised],
            target=None if self.targets is None else self.targets.thetas([person.key])[0],
            drops_caption=drops and not self.is_validation,
            seed=int(torch.randint(2**62, (), generator=generator)),
            skipped=skipped,
        )

    def _blank(self, *skipped: Skipped) -> Example:
        grey = torch.zeros(3, self.size_px, self.size_px)
        target = None if self.targets is None else torch.zeros(self.theta_shape)
        return Example("", grey, grey, target=target, skipped=skipped)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack examples to a batch."""
        targets = [example.target for example in examples if example.target is not None]
        return Batch(
            seen=torch.stack([example.seen for example in examples]),
            denoised=torch.stack([example.denoised for example in examples]),
            photos=tuple(example.photo for example in examples),
            targets=torch.stack(targets) if targets else None,
            drops_caption=torch.tensor([example.drops_caption for example in examples]),
            counts=torch.tensor([float(bool(example.name)) for example in examples]),
            seeds=tuple(example.seed for example in examples),
            skipped=tuple(entry for example in examples for entry in example.skipped),
            copies=self.copies,
            moments=_stack_moments(examples),
        )


def _stack_moments(examples: Sequence[Example]) -> Tensor | None:
    stored = [example.moments for example in examples if example.moments is not None]
    if not stored or len(stored) < sum(bool(example.name) for example in examples):
        return None
    nothing = torch.zeros_like(stored[0])
    return torch.stack([nothing if example.moments is None else example.moments for example in examples])


def _choose_photos(count: int, same: bool, generator: torch.Generator) -> tuple[int, int]:
    """The photo for the encoder and the one to denoise, two different ones if there are two."""
    order = torch.randperm(count, generator=generator).tolist()
    return order[0], order[0] if same or count == 1 else order[1]


def augment(pixels: Tensor, flip: bool, jitter: float, generator: torch.Generator) -> Tensor:
    """Mirror and crop pictures ``(n, 3, h, w)``, all in the same way, and resize them to their original size.

    Independent choices for the denoised picture and the encoder's would teach the hypernetwork that a photo does not
    show where the face is, or which way it looks.

    Args:
        flip: mirror with probability 1/2.
        jitter: crop up to this fraction of the side, from any side of the picture.
    """
    is_mirrored, cut, top, left = torch.rand(4, generator=generator).tolist()
    if flip and is_mirrored < 0.5:
        pixels = pixels.flip(-1)
    side = pixels.shape[-1]
    removed = round(jitter * cut * side)
    if removed:
        y, x = round(top * removed), round(left * removed)
        pixels = pixels[..., y : y + side - removed, x : x + side - removed]
        pixels = interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    return pixels


def training_places(config: TrainConfig, count: int, step: int, rank: int, world: int) -> Iterator[list[Place]]:
    """Yield the places of process ``rank``'s batches from ``step`` on, one for each accumulated pass of a step.

    People are shuffled in each epoch; an epoch may end in the middle of a step.
    """
    epoch, order = -1, np.arange(0)
    for now in range(step, config.steps):
        for part in range(config.gradient_accumulation_steps):
            places = []
            for slot in range(config.batch_size):
                number = ((now * config.gradient_accumulation_steps + part) * world + rank) * config.batch_size + slot
                if number // count != epoch:
                    epoch = number // count
                    order = np.random.default_rng((config.seed, epoch)).permutation(count)
                places.append((now, int(order[number % count])))
            yield places


def validation_places(config: TrainConfig, count: int, rank: int, world: int) -> Iterator[list[Place]]:
    """Yield the places of process ``rank``'s share of all people, in padded batches."""
    rows = list(range(rank, count, world))
    for first in range(0, len(rows), config.batch_size):
        chosen = rows[first : first + config.batch_size]
        yield [(0, row) for row in chosen + [BLANK] * (config.batch_size - len(chosen))]


def choose_people(
    people: People, config: TrainConfig, targets: TargetStore | None, held_out: People | None
) -> tuple[People, People | None]:
    """The people to train on, and those to validate on.

    Repeated names and people without a target are left out. Which people a fraction holds out depends only on names.

    Args:
        targets: if given, only people with a target are used.
        held_out: people to validate on instead of a fraction of ``people``; they need no targets.

    Raises:
        ValueError: nobody is left to train on, the data set is streamed, or a shard of the targets is gone.
    """
    for source in (people, held_out):
        if source is not None and source.is_streamed:
            raise ValueError(f"{source.source} is streamed; training comes back to everybody: open it whole")
    rows = _rows(people, targets)
    if not rows:
        raise ValueError(_nobody(people, targets))
    if held_out is not None:
        others = _rows(held_out, None)
        if not others:
            raise ValueError(_nobody(held_out, None))
        return _select(people, rows.values()), _select(held_out, others.values())
    by_chance = sorted(rows, key=lambda name: derive_seed(config.seed, "hold out", name))
    count = max(1, round(config.validation * len(rows))) if config.validation else 0
    if count == len(rows):
        raise ValueError(f"{people.source} holds {len(rows)} people to train on, and validation holds out {count}; add "
                         f"people, or set validation to 0")  # fmt: skip
    chosen = set(by_chance[:count])
    training = _select(people, [row for name, row in rows.items() if name not in chosen])
    return training, _select(people, [rows[name] for name in rows if name in chosen]) if chosen else None


def _rows(people: People, targets: TargetStore | None) -> dict[str, int]:
    """Name -> row, for those with a target."""
    rows: dict[str, int] = {}
    for row, (name, _) in enumerate(people.roster):
        rows.setdefault(name, row)
    if targets is None:
        return rows
    shards = targets.shards()
    gone = sorted(set(range(max(shards, default=0))) - set(shards))
    if gone:
        raise ValueError(f"{targets.folder} lacks {len(gone)} of its shards, {targets.path(gone[0]).name} for one; run "
                         f"hdb preoptimize again to make them")  # fmt: skip
    unknown = rows.keys() - {name for index in shards for name in targets.read(index).rows}
    if 0 < len(unknown) < len(rows):
        warnings.warn(
            f"{len(unknown)} of the {len(rows)} people in {people.source} are in no shard of {targets.folder} and are "
            f"left out; hdb preoptimize makes their targets",
            stacklevel=3,
        )
    fitted = {name for index in shards for name in targets.read(index).names}
    return {name: row for name, row in rows.items() if name in fitted}


def _nobody(people: People, targets: TargetStore | None) -> str:
    if targets is None:
        return f"{people.source} holds no people; pass a data set with at least one image"
    return (
        f"nobody in {people.source} has a target in {targets.place}, which was fitted on "
        f"{targets.manifest.get('source')}; pass the images that the targets were fitted on"
    )


def _select(people: People, rows: Iterable[int]) -> People:
    return replace(people, dataset=people.dataset.select(list(rows)))
