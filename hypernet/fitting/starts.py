"""A start that was learned (`hypernet.training.start`), as a file: LoRA factors under diffusers' names.

Any author's LoRA of the right layers and rank serves. The norms of both factors are kept as they are, unlike in the
LoRAs that are exported: a finetuning goes elsewhere from other norms, though the product is the same.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from converters import read_lora
from hypernet.errors import differing_names
from hypernet.hub import HYPERNETWORK_FILES, hub_folder
from lidb_peft import LiDBSpace, LoraFactors
from lidb_peft.files import atomic_path
from lidb_peft.safe_read import printable

AUTO_START = "auto"
START_FILE = "start.safetensors"
"""Its name beside a hypernetwork or a base model that it was learned with."""


@dataclass(frozen=True)
class LoraStart:
    """LoRA factors that finetunings start from; ``source`` names them, for messages."""

    factors: LoraFactors
    rank: int
    source: str

    def of_rank(self, rank: int) -> "LoraStart":
        """Return it; raises ValueError if it is of another rank."""
        if self.rank != rank:
            raise ValueError(
                f"{self.source} is a start of rank {self.rank} and the finetuned LoRA has rank {rank}; pass --rank "
                f"{self.rank}, or --start none"
            )
        return self

    def flat(self, space: LiDBSpace) -> Tensor:
        """The factors as `LiDBSpace.split_lora` views them, ``(lora_size(rank),)`` float32.

        Raises:
            ValueError: they are of other layers than the space's.
        """
        theirs = {name: (A.shape[1], B.shape[0]) for name, (A, B) in self.factors.items()}
        ours = dict(zip(space.layer_names, space.shapes, strict=True))
        if theirs != ours:
            differing = differing_names(theirs, ours)
            raise ValueError(
                f"{self.source} starts {len(theirs)} layers and {len(ours)} are finetuned; e.g. "
                f"{printable(differing[0])} is missing in one of them or has another shape; adapt the layers it was "
                f"learned on, or pass --start none"
            )
        flat = torch.empty(space.lora_size(self.rank))
        places = space.lora_factors(flat, self.rank)  # views
        for name, factors in self.factors.items():
            for place, values in zip(places[name], factors, strict=True):
                place.copy_(values)
        return flat


def load_start(path: str | Path) -> LoraStart:
    """Read a start.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, no LoRA, or one of several ranks.
    """
    factors = read_lora(path).factors()
    ranks = {lora_A.shape[0] for lora_A, _ in factors.values()}
    if len(ranks) != 1:
        raise ValueError(f"{path} has layers of ranks {sorted(ranks)}; a start has one rank")
    return LoraStart(factors, ranks.pop(), str(path))


def save_start(path: str | Path, start: Tensor, rank: int, space: LiDBSpace) -> None:
    """Write a start ``(lora_size(rank),)`` of the layers of ``space``, in float16."""
    tensors = {
        f"{name}.{half}.weight": values.half().contiguous()
        for name, factors in space.lora_factors(start, rank).items()
        for half, values in zip(("lora_A", "lora_B"), factors, strict=True)
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def find_start(network_source: str, base_name: str) -> Path | None:
    """The start beside a hypernetwork, or without one (``""``) beside a base model; None if there is none.

    Beside is in the same folder here, or, of a hypernetwork, in the same repository on the hub.
    """
    folder = Path(network_source or base_name)
    if network_source and not folder.exists():
        folder = hub_folder(network_source, HYPERNETWORK_FILES)  # in the cache, where the hypernetwork was read
    file = folder / START_FILE
    return file if file.is_file() else None
