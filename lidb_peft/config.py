"""The definition of a LiDB adapter: ``LiDBConfig``, saved next to the weights as ``adapter_config.json``."""

import enum
import math
from dataclasses import dataclass, field

from peft.config import PeftConfig

from .bases import BASIS_KINDS, BasisKey, basis_keys
from .patterns import find_pattern


class LiDBPeftType(str, enum.Enum):
    """PEFT's own enum is closed; it compares members as strings, so one of ours serves."""

    LIDB = "LIDB"


@dataclass
class LiDBConfig(PeftConfig):
    """Configuration of a LiDB adapter; the defaults are the paper's (arXiv:2307.06949, section 4.1).

    Args:
        r: rank of the update.
        down_dim: size of the basis on the input side, the paper's a; clipped to a narrower layer's width.
        up_dim: size of the basis on the output side, the paper's b; clipped in the same way.
        scale: factor that multiplies the update.
        rank_pattern: ranks that override ``r`` for some layers: layer name (a suffix or regular expression) -> rank.
        scale_pattern: the same for ``scale``, like ``alpha_pattern`` for LoRA.
        lidb_dropout: dropout probability of the update's input while training.
        seed: random seed of the bases and the starting vector.
        basis: kind of basis made from the seed: "orthogonal", the paper's. `LiDBModel.use_bases` sets others.
        target_modules: names (suffixes), or one regular expression for the whole name. None: all attention projections
            of a UNet or FLUX transformer of diffusers, and of a CLIP text encoder.
        exclude_modules: names, or a regular expression, of modules to leave alone.
        init_weights: True starts at the shared vector, which is the identity (``up`` is zero); False draws both halves
            from the global generator, for tests.
        save_projection: store the bases in the checkpoint, one per width and side (1.8 MB for SD1.5), instead of a
            fingerprint and a few values to check the rebuilt ones by.
        bias: "none", "all" or "lidb_only".
        modules_to_save: further modules to train and save in full.
        layers_to_transform: indices of the layers to adapt, as in PEFT's other tuners.
        layers_pattern: name of the list those indices count in.
    """

    r: int = field(default=1, metadata={"help": "Rank of the update."})
    down_dim: int = field(default=100, metadata={"help": "Size of the input side's basis, the paper's a."})
    up_dim: int = field(default=50, metadata={"help": "Size of the output side's basis, the paper's b."})
    scale: float = field(default=1.0, metadata={"help": "Multiplies the update."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Layer name -> its own rank."})
    scale_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Layer name -> its own scale."})
    lidb_dropout: float = field(default=0.0, metadata={"help": "Dropout of the input of the update."})
    seed: int = field(default=0, metadata={"help": "Chooses the bases and the starting vector."})
    basis: str = field(default="orthogonal", metadata={"help": "Kind of basis."})
    target_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression; None: the attention projections."}
    )
    exclude_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone."}
    )
    init_weights: bool = field(default=True, metadata={"help": "True: the identity. False: random, for tests."})
    save_projection: bool = field(default=False, metadata={"help": "Store the bases in the checkpoint."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'lidb_only'."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "The list those indices count in."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LiDBPeftType.LIDB
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern, self.scale_pattern = self.rank_pattern or {}, self.scale_pattern or {}
        ranks = {"r": self.r} | {f"rank_pattern of {name!r}": rank for name, rank in self.rank_pattern.items()}
        for name, value in (ranks | {"down_dim": self.down_dim, "up_dim": self.up_dim}).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; choose an integer of 1 or more")
        if max(ranks.values()) > min(self.down_dim, self.up_dim):
            raise ValueError(
                f"rank is {max(ranks.values())} but the bases have {self.down_dim} and {self.up_dim} vectors; "
                f"choose r <= {min(self.down_dim, self.up_dim)}"
            )
        for name, factor in ({"scale": self.scale} | self.scale_pattern).items():
            if not isinstance(factor, (int, float)) or not math.isfinite(factor):
                raise ValueError(f"{name} is {factor!r}; choose a finite number")
        if not isinstance(self.lidb_dropout, (int, float)) or not 0 <= self.lidb_dropout < 1:
            raise ValueError(f"lidb_dropout is {self.lidb_dropout!r}; choose a number from 0 to below 1")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed is {self.seed!r}; choose an integer")
        if self.basis not in BASIS_KINDS:
            raise ValueError(f"basis is {self.basis!r}; choose one of {', '.join(BASIS_KINDS)}")
        if self.bias not in ("none", "all", "lidb_only"):
            raise ValueError(f"bias is {self.bias!r}; choose 'none', 'all' or 'lidb_only'")
        indices = self.layers_to_transform if self.layers_to_transform is not None else []
        if not all(isinstance(index, int) for index in (indices if isinstance(indices, list | tuple) else [indices])):
            raise ValueError(f"layers_to_transform is {indices!r}; choose the indices of layers")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """Return the rank and the scale of the layer called ``name``."""
        rank_key, scale_key = (find_pattern(pattern, name) for pattern in (self.rank_pattern, self.scale_pattern))
        rank = self.r if rank_key is None else self.rank_pattern[rank_key]
        return rank, self.scale if scale_key is None else self.scale_pattern[scale_key]

    def basis_keys(self, in_features: int, out_features: int) -> tuple[BasisKey, BasisKey]:
        """Return the keys of the down and the up basis of a layer of that shape."""
        return basis_keys(in_features, out_features, self.down_dim, self.up_dim, self.seed, self.basis)
