"""How fast is finetuning, and how close to the lower bound? ``python benchmarks/personalization_speed.py``

A LoRA on all attention projections from one photo: ours (`fit_lora`); a plain loop with PEFT's LoRA; and diffusers'
train_dreambooth_lora.py at the path ``--diffusers-script``, with the same modules, rank, precision and number of noisy
copies per step. Ours is measured twice: with the base's own recipe, whose prompt preservation needs more passes through
the base, and without preservation, which does the same work as the others. For comparison, the cost of the base itself
at the same batch size: forward and backward, to the latents and token embeddings, without an adapter.

Each row is a separate process. *s a step* is the fastest step; *s in all* is loading, encoding the photo and the steps,
without imports; the floor is the FLOPs of the bare passes (attention as plain matrix products) at the rate that a large
matrix product reaches here in the same dtype. ``--base sd15-random`` is Stable Diffusion 1.5 at full size.

Predicted on a CPU: ours within 1.2 times the bare base, like PEFT's loop; diffusers' is slower because it runs the VAE
in every step. On a GPU at batch size 1, a loop without a CUDA graph waits for kernel launches.
"""

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import torch
from costs import (
    Passes,
    alone,
    bare_passes,
    base_folder,
    clock,
    lidb_config_for,
    matmul_rate,
    measure,
    new_parser,
    recipe_for,
    report,
)
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import load_base
from hypernet.devices import choose_device, choose_dtype, precision_name
from hypernet.fitting.engine import Subject, fit_lora
from hypernet.recipe import PersonalizeConfig
from lidb_peft import LiDBSpace
from lidb_peft.families import get_family

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # accelerate's names
PROFILED_STEPS, PROFILED_OPERATORS = 3, 25

Tick = Callable[..., None]


@dataclass(frozen=True)
class Job:
    """What all rows share: one person on one base.

    Attributes:
        name: name of the base, for `costs.base_folder`.
        folder: folder of its weights.
        script: diffusers' train_dreambooth_lora.py.
    """

    name: str
    folder: str
    device: torch.device
    precision: str
    recipe: PersonalizeConfig
    script: Path | None = None

    def load(self) -> BaseModel:
        return load_base(self.folder, str(self.device), self.precision)


# ---- rows ----


def ours(job: Job, tick: Tick) -> None:
    base = job.load()
    space = LiDBSpace(base.adapted, lidb_config_for(job.name))
    fit_lora(base, space, [_subject(base, job.recipe)], job.recipe.lora_fit, job.recipe.rank, progress=tick)


def peft_loop(job: Job, tick: Tick) -> None:
    """PEFT's LoRA in eager mode, VAE moments cached, the base in the run's precision and the adapters in float32."""
    base, recipe = job.load(), job.recipe
    subject = _subject(base, recipe)
    for model in base.adapted.values():
        model.add_adapter(
            LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=get_family(base.family).targets)
        )
    cast_training_params(list(base.adapted.values()), dtype=torch.float32)
    trained = [p for model in base.adapted.values() for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
    moments = subject.moments.expand(recipe.timesteps_per_step, -1, -1, -1)
    prompts = base.prepare_prompts([subject.prompt])
    for _ in range(recipe.steps):
        clean = DiagonalGaussianDistribution(moments).sample() * base.vae.config.scaling_factor
        noise = torch.randn_like(clean)
        timesteps = torch.randint(base.scheduler.config.num_train_timesteps, (len(clean),), device=base.device)
        noisy = base.scheduler.add_noise(clean, noise, timesteps)
        is_epsilon = base.prediction_type == "epsilon"
        target = noise if is_epsilon else base.scheduler.get_velocity(clean, noise, timesteps)
        embeds = base.encode_prompts(prompts).rows(torch.zeros_like(timesteps))
        mse_loss(base.denoise(noisy, timesteps, embeds), target).backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.lora_fit.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        tick()


def diffusers_script(job: Job, tick: Tick, *options: str) -> None:
    """The unchanged script, in this process; each optimizer step is a tick.

    Raises:
        ValueError: there is no script, or it does not have the options.
    """
    if job.script is None:
        raise ValueError("no --diffusers-script was given")
    missing = [option for option in options if option not in job.script.read_text()]
    if missing:
        raise ValueError(f"{job.script.name} has no {missing[0]}")
    recipe = job.recipe
    with TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        levels = len(AutoencoderKL.load_config(job.folder, subfolder="vae")["block_out_channels"])
        size_px = UNet2DConditionModel.load_config(job.folder, subfolder="unet")["sample_size"] * 2 ** (levels - 1)
        for copy in range(recipe.timesteps_per_step):  # its batch consists of different files
            _photo(size_px).save(photos / f"{copy}.png")
        arguments = {
            "pretrained_model_name_or_path": job.folder, "instance_data_dir": photos,
            "output_dir": Path(folder) / "out", "instance_prompt": recipe.trigger, "resolution": size_px,
            "rank": recipe.rank,
            "train_batch_size": recipe.timesteps_per_step, "max_train_steps": recipe.steps, "learning_rate": recipe.lr,
            "lr_scheduler": "constant", "lr_warmup_steps": 0, "mixed_precision": MIXED_PRECISION[job.precision],
        }  # fmt: skip
        argv = [str(job.script), "--train_text_encoder", *options]
        argv += [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
        hook = register_optimizer_step_post_hook(tick)
        try:
            with mock.patch.object(sys, "argv", argv):
                runpy.run_path(str(job.script), run_name="__main__")
        finally:
            hook.remove()


def bare(job: Job, tick: Tick) -> None:
    bare_passes(job.load(), Passes.of(job.recipe.lora_fit), job.recipe.steps)(tick)


def _subject(base: BaseModel, recipe: PersonalizeConfig) -> Subject:
    pixels = torch.from_numpy(np.array(_photo(base.size_px))).permute(2, 0, 1)[None] / 127.5 - 1
    return Subject("person", base.encode_photos(pixels), recipe.trigger, recipe.class_prompt)


def _photo(size_px: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size_px, size_px, 3), np.uint8))


RECIPE_RUNS = {"bare passes of the recipe": (bare,), "ours, the recipe": (ours,)}
SAME_WORK_RUNS = {
    "bare forward and backward": (bare,),
    "ours without preservation": (ours,),
    "PEFT's LoRA, eager": (peft_loop,),
    "diffusers' script as shipped": (diffusers_script,),
    "diffusers' script, cached latents": (diffusers_script, "--cache_latents"),
}


# ---- measuring ----


def measure_row(job: Job, run: Callable[..., None], *options: str) -> dict:
    start = clock(job.device)
    seconds, peak = measure(lambda tick: run(job, tick, *options), job.device)
    return {"s a step": seconds, "s in all": clock(job.device) - start, "peak memory, GB": peak / 1e9}


def measure_floor(job: Job) -> dict:
    """FLOPs of a step's passes, and the rate of a large matrix product."""
    base = job.load()
    rate = matmul_rate(base.device, base.dtype)
    for model in base.adapted.values():
        model.to("meta")  # counts without computing
    run = bare_passes(base, Passes.of(job.recipe.lora_fit), steps=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are counted on CUDA only
        run(lambda: None)
    return {"flops": counter.get_total_flops(), "rate": rate}


def write_profile(job: Job, path: Path) -> dict:
    """Write how the time of our steps is spent, the costliest operators first."""
    steps = []
    short = replace(job, recipe=replace(job.recipe, steps=2 * PROFILED_STEPS))

    def tick(*_) -> None:
        steps.append(clock(job.device))
        if len(steps) == PROFILED_STEPS:  # warm
            profiler.start()

    profiler = profile()
    ours(short, tick)
    profiler.stop()
    on_cuda = job.device.type == "cuda"
    events = profiler.key_averages()
    order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    kernels = sum(event.count for event in events if event.device_type != DeviceType.CPU)
    calls = sum(event.count for event in events if event.key.startswith("aten::"))
    header = f"{PROFILED_STEPS} steps: {calls:,} calls of operators, {kernels:,} kernels\n"
    path.write_text(header + events.table(sort_by=order, row_limit=PROFILED_OPERATORS, max_name_column_width=60))
    return {"operators a step": calls / PROFILED_STEPS, "kernels a step": kernels / PROFILED_STEPS}


def compare(job: Job, runs: dict[str, tuple], rounds: int) -> list[dict]:
    """A row for each of ``runs``, the fastest of the rounds; the first is the bare base.

    Args:
        runs: name -> one of the functions above and its options.
    """
    floor = alone(measure_floor, job)
    found = [[alone(measure_row, job, *run) for run in runs.values()] for _ in range(rounds)]
    rows = [min(each, key=lambda row: row.get("s a step", 0)) for each in zip(*found, strict=True)]
    missing = [row for row in (floor, rows[0]) if "not available" in row]
    return [
        {"row": name} | row | ({} if missing or "not available" in row else _relate(row, rows[0], floor))
        for name, row in zip(runs, rows, strict=True)
    ]


def _relate(row: dict, bare_row: dict, floor: dict) -> dict:
    seconds = row["s a step"]
    return {"x bare": seconds / bare_row["s a step"], "TFLOP a step": floor["flops"] / 1e12,
            "of the floor, %": 100 * floor["flops"] / floor["rate"] / seconds}  # fmt: skip


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1, help="all rows in turn, so often; each row's best counts")
    parser.add_argument("--diffusers-script", type=Path, help="examples/dreambooth/train_dreambooth_lora.py of a clone")
    parser.add_argument("--profile", action="store_true", help="write the costliest operators beside --out")
    arguments = parser.parse_args()
    if arguments.profile and not arguments.out:
        parser.error("--profile is written beside --out; pass it too")
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.precision, device)
    precision = precision_name(dtype)
    recipe = replace(recipe_for(arguments.base), steps=arguments.steps)
    with base_folder(arguments.base) as folder:
        full = Job(arguments.base, folder, device, precision, recipe, arguments.diffusers_script)
        same = replace(full, recipe=replace(recipe, preservation=0.0))
        rows = compare(full, RECIPE_RUNS, arguments.rounds) + compare(same, SAME_WORK_RUNS, arguments.rounds)
        tables = {f"{arguments.steps} steps on {arguments.base}, {recipe.timesteps_per_step} noisy copies a step": rows}
        if arguments.profile:
            path = arguments.out.with_suffix(".profile.txt")
            tables["Profile of ours without preservation"] = [alone(write_profile, same, path)]
    report(arguments, tables)


if __name__ == "__main__":
    main()
