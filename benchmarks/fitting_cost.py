"""What do time and memory of a finetuning step depend on? ``python benchmarks/fitting_cost.py``

`fit_lora` with the base's own recipe and one change at a time, each row in a separate process:

- ``memory``: pictures of 1/2, 1 and 3/2 of the base's side, 1 to 4 noisy copies per step, gradient checkpointing; and
  the least memory that works at the base's own side.
- ``variants``: eager steps, steps replayed as a CUDA graph, compiled steps; attention by SDPA or xformers; AdamW with
  32-bit or 8-bit states; channels-last convolutions.
- ``scaling``: number of people at once, adapted layers, rank.

Rows whose package or device is missing say so. ``--base sd15-random`` is Stable Diffusion 1.5 at full size.
Predicted: memory grows with pixels and copies, and checkpointing recovers most of that for half as much time again; the
cost grows less than proportionally with people; neither layers nor rank cost much; 8-bit states save a few MB.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from costs import alone, base_folder, lidb_config_for, measure, new_parser, recipe_for, report

from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import load_base
from hypernet.devices import choose_device, limit_memory
from hypernet.fitting.engine import Subject, fit_lora
from lidb_peft import LiDBSpace
from lidb_peft.families import get_family

SIDES = (0.5, 1.0, 1.5)
COPIES = (1, 2, 4)
PEOPLE = (1, 2, 4, 8, 16)
LAYERS = {"queries": {"to_q", "q_proj"}, "queries and keys": {"to_q", "to_k", "q_proj", "k_proj"},
          "all attention": get_family("sd1").targets}  # fmt: skip
RANKS = (1, 4, 16, 64)
LIMITS = (1.02, 1.05, 1.1, 1.2, 1.4)  # times the peak, to look for what works


@dataclass(frozen=True)
class Case:
    """One row: what it changes.

    Attributes:
        labels: columns that identify the row.
        side: side of the pictures, relative to the base's own.
        load, fit: changed options of `load_base` and of the recipe's `FitConfig`.
        limit_bytes: limit on a CUDA device's memory.
    """

    labels: dict[str, Any]
    people: int = 1
    side: float = 1.0
    rank: int | None = None
    layers: frozenset[str] | None = None
    channels_last: bool = False
    load: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    limit_bytes: int | None = None


def memory_cases() -> list[Case]:
    return [
        Case({"side": side, "copies": copies, "checkpointing": checkpointing}, side=side,
             fit={"timesteps_per_step": copies, "gradient_checkpointing": checkpointing})
        for side in SIDES for copies in COPIES for checkpointing in ("off", "on")
    ]  # fmt: skip


def variant_cases() -> list[Case]:
    eager = {"graph": "off"}
    changes: dict[str, dict[str, Any]] = {
        "as the recipe chooses": {},
        "eager": {"fit": eager},
        "CUDA graph": {"fit": {"graph": "on"}},
        "torch.compile": {"fit": eager, "load": {"compile": True}},
        "attention sdpa, eager": {"fit": eager, "load": {"attention": "sdpa"}},
        "attention xformers, eager": {"fit": eager, "load": {"attention": "xformers"}},
        "adamw, eager": {"fit": eager | {"optimizer": "adamw"}},
        "adamw8bit, eager": {"fit": eager | {"optimizer": "adamw8bit"}},
        "channels-last, eager": {"fit": eager, "channels_last": True},
    }
    return [Case({"variant": name}, **options) for name, options in changes.items()]


def scaling_cases() -> list[Case]:
    people = [Case({"changed": "people", "to": str(count)}, people=count) for count in PEOPLE]
    layers = [Case({"changed": "layers", "to": name}, layers=frozenset(each)) for name, each in LAYERS.items()]
    return people + layers + [Case({"changed": "rank", "to": str(rank)}, rank=rank) for rank in RANKS]


QUESTIONS: dict[str, Callable[[], list[Case]]] = {
    "memory": memory_cases, "variants": variant_cases, "scaling": scaling_cases,
}  # fmt: skip


def measure_case(case: Case, name: str, folder: str, device: str, precision: str, steps: int) -> dict:
    if case.limit_bytes:
        limit_memory(choose_device(device), case.limit_bytes)
    base, recipe = load_base(folder, device, precision, **case.load), recipe_for(name)
    if case.channels_last:
        base.unet.to(memory_format=torch.channels_last)
    config = lidb_config_for(name)
    if case.layers is not None:
        config = replace(config, target_modules=set(case.layers))
    space = LiDBSpace(base.adapted, config)
    subjects = [_subject(base, index, case.side) for index in range(case.people)]
    fit, rank = replace(recipe.lora_fit, steps=steps, **case.fit), case.rank or recipe.rank
    seconds, peak = measure(lambda tick: fit_lora(base, space, subjects, fit, rank, progress=tick), base.device)
    return {"s a step": seconds, "s a step and person": seconds / case.people, "peak memory, GB": peak / 1e9}


def _subject(base: BaseModel, index: int, side: float) -> Subject:
    latents = int(base.unet.config.sample_size * side)
    return Subject(str(index), torch.randn(1, 2 * base.vae.config.latent_channels, latents, latents), "a sks face",
                   "a face")  # fmt: skip


def find_least(cases: list[Case], rows: list[dict], measure_row: Callable[[Case], dict], on_cuda: bool) -> list[dict]:
    """The row at the base's own side with the lowest peak; on CUDA with the lowest memory limit under which it works.

    That is slightly more than its peak, because torch allocates memory in blocks.
    """
    own = [i for i, row in enumerate(rows) if row["side"] == 1 and "peak memory, GB" in row]
    if not own:
        return []
    index = min(own, key=lambda i: rows[i]["peak memory, GB"])
    for share in LIMITS if on_cuda else ():
        limit = int(share * 1e9 * rows[index]["peak memory, GB"])
        row = measure_row(replace(cases[index], limit_bytes=limit))
        if "not available" not in row:
            return [row | {"works within, GB": limit / 1e9}]
    return [rows[index]]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("--steps", type=int, default=6, help="timed of each; the first is left out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name, device, precision, steps = arguments.base, arguments.device, arguments.precision, arguments.steps
    cases = QUESTIONS[arguments.question]()
    with base_folder(name) as folder:

        def measure_row(case: Case) -> dict:
            return case.labels | alone(measure_case, case, name, folder, device, precision, steps)

        rows = [measure_row(case) for case in cases]
        tables = {f"{arguments.question}, {name}": rows}
        if arguments.question == "memory":
            least = find_least(cases, rows, measure_row, choose_device(device).type == "cuda")
            tables["The least that the base's own side needs"] = least
    report(arguments, tables)


if __name__ == "__main__":
    main()
