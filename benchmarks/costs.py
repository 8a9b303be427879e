"""Shared by the benchmarks of speed and memory: bases, timing, peak memory, separate processes, and the report.

On a CPU, seconds are CPU time, which other programs affect least, and the peak is that of the whole process, which only
grows. On CUDA, seconds are wall-clock time after synchronising, and the peak is what torch has allocated.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil  # which accelerate requires
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hypernet.base_models.base import BaseModel, PromptEmbeds
from hypernet.devices import choose_device, choose_dtype, describe_choice
from hypernet.errors import first_sentence
from hypernet.quiet import quiet_libraries
from hypernet.recipe import FitConfig, PersonalizeConfig
from lidb_peft import LiDBConfig
from lidb_peft.files import atomic_path
from testbed import MINIATURE_RECIPE, miniature_lidb_config, miniature_path

RANDOM_SD15 = "sd15-random"
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
       "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}  # fmt: skip
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "xformers", "bitsandbytes")
_MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}


# ---- bases ----


@contextmanager
def base_folder(name: str) -> Iterator[str]:
    """What to pass to `load_base` for a base: ``testbed``, ``sd15-random``, or a folder, file or id, unchanged."""
    if name != RANDOM_SD15:
        yield str(miniature_path()) if name == "testbed" else name
        return
    with TemporaryDirectory() as folder:
        save_random_sd15(folder)
        yield folder


def save_random_sd15(folder: str | Path) -> None:
    """Write Stable Diffusion 1.5 at full size with random weights, float16; the tokenizer is the miniature's."""
    tokenizer = CLIPTokenizer.from_pretrained(miniature_path() / "tokenizer", model_max_length=77)
    text_config = CLIPTextConfig(**CLIP_L, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    with quiet_libraries():
        from diffusers import StableDiffusionPipeline  # warns when it is imported

        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(**VAE, sample_size=512), text_encoder=CLIPTextModel(text_config), tokenizer=tokenizer,
            unet=UNet2DConditionModel(**SD15_UNET), scheduler=schedule,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.to(torch.float16).save_pretrained(folder)


def recipe_for(name: str) -> PersonalizeConfig:
    """The recipe of `base_folder`'s base, without the pictures that a step may draw."""
    return replace(MINIATURE_RECIPE, likeness=0.0) if name == "testbed" else PersonalizeConfig()


def lidb_config_for(name: str) -> LiDBConfig:
    """The bases' dimensions on `base_folder`'s base."""
    return miniature_lidb_config() if name == "testbed" else LiDBConfig()


# ---- the base's share of a step ----


@dataclass(frozen=True)
class Passes:
    """Passes of a step through the base: prompts and samples forward and backward, and samples forward only."""

    prompts: int
    samples: int
    forward_only: int = 0

    @classmethod
    def of(cls, fit: FitConfig, people: int = 1) -> "Passes":
        copies = fit.timesteps_per_step
        preserved = (copies + 1) // 2 if fit.preservation else 0  # see hypernet.fitting.preservation
        return cls(people * (1 + preserved), people * (copies + preserved), people * 2 * preserved)


def bare_passes(base: BaseModel, passes: Passes, steps: int) -> Callable[[Callable], None]:
    """A run of these passes without an adapter, for `measure`; gradients go to the latents and token embeddings."""
    device = base.device
    prompts = base.prepare_prompts(["a face"] * passes.prompts)
    latents = torch.randn(passes.samples, *base.latent_shape, device=device, requires_grad=True)
    others = torch.randn(passes.forward_only, *latents.shape[1:], device=device)
    shift = torch.zeros(1, device=device, dtype=base.dtype, requires_grad=True)  # takes the embeddings' gradient

    def denoise(noisy_latents: Tensor, embeds: PromptEmbeds) -> Tensor:
        samples = torch.arange(len(noisy_latents), device=device)
        return base.denoise(noisy_latents, torch.full_like(samples, 500), embeds.rows(samples % passes.prompts))

    def step() -> None:
        embeds = base.encode_prompts(prompts)
        if passes.forward_only:
            with torch.no_grad():
                denoise(others, embeds)
        denoise(latents, embeds).square().mean().backward()

    def run(tick: Callable) -> None:
        embeddings = [encoder.get_input_embeddings() for encoder in base.text_encoders]
        handles = [module.register_forward_hook(lambda *call: call[-1] + shift) for module in embeddings]
        try:
            for _ in range(steps):
                step()
                tick()
        finally:
            for handle in handles:
                handle.remove()

    return run


# ---- measuring ----


def clock(device: torch.device) -> float:
    """Seconds, see above."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(run: Callable[[Callable], object], device: torch.device) -> tuple[float, int]:
    """Call ``run`` with a progress callback; returns the seconds of a step and the peak memory in bytes.

    Steps are timed one by one and the fastest counts, which excludes loading, warm-up, saving and other programs.
    """
    times: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run(lambda *_: times.append(clock(device)))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _max_rss_bytes()
    return min(after - before for before, after in pairwise(times)), peak


def _max_rss_bytes() -> int:
    try:
        import resource
    except ImportError:  # on Windows
        return psutil.Process().memory_info().peak_wset
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 20) -> float:
    """FLOPs per second of a large matrix product, the best of ``repeats``."""
    side = _MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [clock(device)]
    for _ in range(repeats):
        torch.mm(left, right)
        times.append(clock(device))
    return 2 * side**3 / min(after - before for before, after in pairwise(times))


def alone(function: Callable[..., dict], *arguments) -> dict:
    """Call a module's function in a new process, so that its peak memory is its own.

    Returns:
        What it returns, or ``{"not available": why}`` if a package, a device or memory is missing.
    """
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except (ImportError, ValueError, RuntimeError) as error:
            return {"not available": first_sentence(error)}


# ---- options and report ----


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that these benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="testbed", help=f"testbed, {RANDOM_SD15} (full size), a folder, file or id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    return parser


def report(arguments: argparse.Namespace, tables: dict[str, list[dict]]) -> None:
    """Print the tables as Markdown under their titles; also write them to ``arguments.out``, if given."""
    device = choose_device(arguments.device)
    facts = {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": describe_choice(device, choose_dtype(arguments.precision, device)),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    print(json.dumps(facts))
    for title, rows in tables.items():
        print(f"\n{title}\n\n{table(rows)}")
    if arguments.out:
        with atomic_path(arguments.out) as path:
            path.write_text(json.dumps(facts | {"tables": tables}, indent=1) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(rows: Sequence[dict]) -> str:
    """A Markdown table; cells without a value are empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells))


def _cell(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:,.4g}"
