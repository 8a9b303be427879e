"""Two minutes on anybody's card: does what this package relies on hold there, how long does a step take, and how much
memory, beside what was counted without a card (``benchmarks/memory_count.py``).

Every check compares two ways to the same result, on the base that it is given and, where memory allows, on a Stable
Diffusion 1.5 of random weights at full size. The report is JSON, for an issue.
"""

import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hypernet.base_models.base import BaseModel
from hypernet.base_models.full_size import COUNTED_GB, random_sd15
from hypernet.devices import describe_choice, free_bytes, memory_limited, release_memory
from hypernet.errors import first_sentence, is_out_of_memory
from hypernet.fitting.engine import Subject, fit_flat_lora
from hypernet.recipe import FitConfig, PersonalizeConfig, Progress
from lidb_peft import LiDBConfig, LiDBSpace

PACKAGES = ("lidb-peft", "torch", "diffusers", "transformers", "peft", "accelerate", "xformers", "bitsandbytes")
_FULL_SIZE_GB = 5.0  # that must be free
_RANK, _STEPS, _TIMED_STEPS = 4, 8, 10
_AS_GRAPH = 1e-3  # relative differences of losses that are let pass
_AS_BF16 = 0.1
_AS_OTHER_KERNELS = 2e-2


@dataclass
class Finding:
    """What became of one check.

    Attributes:
        outcome: ``ok``, ``failed``, ``skipped``, or ``measured`` for what is neither right nor wrong.
        detail: a sentence.
    """

    name: str
    outcome: str
    detail: str


@dataclass
class Report:
    """All findings, and on what."""

    machine: dict[str, str]
    findings: list[Finding] = field(default_factory=list)

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.outcome == "failed"]

    def to_json(self) -> dict:
        """As `json.dumps` takes it."""
        return asdict(self)


class _Skipped(Exception):  # noqa: N818 - no error: there is nothing to check
    pass


def check(base: BaseModel, lidb_config: LiDBConfig, progress: Progress | None = None) -> Report:
    """Check a device with ``base``, which is on it.

    Args:
        lidb_config: that goes with the base.
        progress: called with (checks done, checks in all).

    Returns:
        A finding for each check; what goes wrong in one is a finding and never raised.
    """
    report = Report(_machine(base))
    checks: list[tuple[str, Callable[[], str]]] = [
        ("CUDA graph equals eager", lambda: _graph_equals_eager(base, lidb_config)),
        ("bf16 near fp32", lambda: _bf16_near_fp32(base, lidb_config)),
        ("xformers near sdpa", lambda: _xformers_near_sdpa(base, lidb_config)),
        ("8-bit AdamW near AdamW", lambda: _adamw8bit_near_adamw(base, lidb_config)),
        ("out of memory is recovered from", lambda: _recovers(base, lidb_config)),
        ("a picture is finite", lambda: _draws(base)),
        ("step of the base given", lambda: _measure(base, lidb_config, {})),
        ("step at full size", lambda: _measure(_full_size(base), LiDBConfig(), COUNTED_GB)),
        ("checkpointing where the memory ends", lambda: _goes_on_checkpointed(_full_size(base))),
    ]
    for number, (name, run) in enumerate(checks, 1):
        report.findings.append(_found(name, run))
        release_memory(base.device)
        if progress is not None:
            progress(number, len(checks))
    return report


def _found(name: str, run: Callable[[], str]) -> Finding:
    try:
        detail = run()
    except _Skipped as reason:
        return Finding(name, "skipped", str(reason))
    except AssertionError as difference:
        return Finding(name, "failed", str(difference))
    except Exception as error:  # whatever a driver, a library or a kernel raises on this machine is what is looked for
        return Finding(name, "failed", f"{type(error).__name__}: {first_sentence(error)}")
    return Finding(name, "measured" if name.startswith("step") else "ok", detail)


def _machine(base: BaseModel) -> dict[str, str]:
    machine = {name: _version(name) for name in PACKAGES}
    machine |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    machine |= {"device": describe_choice(base.device, base.dtype), "base": base.family}
    if base.device.type == "cuda":
        card = torch.cuda.get_device_properties(base.device)
        machine |= {"memory": f"{card.total_memory / 1e9:.1f} GB", "CUDA": str(torch.version.cuda),
                    "capability": f"{card.major}.{card.minor}"}  # fmt: skip
    return machine


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _subjects(base: BaseModel, count: int = 2) -> list[Subject]:
    channels, *size = base.latent_shape
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(count, 1, channels, *size, generator=generator)
    moments = torch.cat([mean, torch.full_like(mean, -4.0)], dim=2)
    return [Subject(f"person {number}", own, "a sks face", "a face") for number, own in enumerate(moments)]


def _fit_config(**options: Any) -> FitConfig:
    recipe = PersonalizeConfig().lora_fit
    settings: dict[str, Any] = {"steps": _STEPS, "gradient_checkpointing": "off", "graph": "off"}
    return replace(recipe, **settings | options)


def _losses(base: BaseModel, lidb_config: LiDBConfig, **options: Any) -> Tensor:
    """Of a short fit of two people, ``(steps, 2)``."""
    space = LiDBSpace(base.adapted, lidb_config)
    return fit_flat_lora(base, space, _subjects(base), _fit_config(**options), _RANK)[1]


def _compare(losses: Tensor, expected: Tensor, tolerance: float) -> str:
    difference = ((losses - expected).abs() / expected.abs()).max().item()
    sentence = f"losses differ by {difference:.1e} of themselves at most; {tolerance:.0e} is let pass"
    assert difference <= tolerance, sentence  # also of NaN
    return sentence


def _graph_equals_eager(base: BaseModel, lidb_config: LiDBConfig) -> str:
    if base.device.type != "cuda":
        raise _Skipped(f"there are no CUDA graphs on {base.device}")
    return _compare(_losses(base, lidb_config, graph="on"), _losses(base, lidb_config), _AS_GRAPH)


def _bf16_near_fp32(base: BaseModel, lidb_config: LiDBConfig) -> str:
    if base.device.type == "mps":
        raise _Skipped("float32 is what is taken on an Apple GPU")
    with _in_dtype(base, torch.float32):
        expected = _losses(base, lidb_config)
    with _in_dtype(base, torch.bfloat16):
        return _compare(_losses(base, lidb_config), expected, _AS_BF16)


@contextmanager
def _in_dtype(base: BaseModel, dtype: torch.dtype) -> Iterator[None]:
    """The base in another precision for a block; its own weights come back as they were."""
    kept = {name: {key: value.clone() for key, value in model.state_dict().items()}
            for name, model in base.adapted.items()}  # fmt: skip
    before = base.dtype
    for model in base.adapted.values():
        model.to(dtype)
    try:
        yield
    finally:
        for name, model in base.adapted.items():
            model.to(before)
            model.load_state_dict(kept[name])


def _xformers_near_sdpa(base: BaseModel, lidb_config: LiDBConfig) -> str:
    if find_spec("xformers") is None:
        raise _Skipped("xformers is not installed")
    if base.device.type != "cuda":
        raise _Skipped(f"xformers does not work on {base.device}")
    expected = _losses(base, lidb_config)
    denoiser: Any = base.denoiser  # one of diffusers', whose methods torch's Module does not name
    denoiser.enable_xformers_memory_efficient_attention()
    try:
        return _compare(_losses(base, lidb_config), expected, _AS_OTHER_KERNELS)
    finally:
        denoiser.disable_xformers_memory_efficient_attention()


def _adamw8bit_near_adamw(base: BaseModel, lidb_config: LiDBConfig) -> str:
    if find_spec("bitsandbytes") is None:
        raise _Skipped("bitsandbytes is not installed")
    return _compare(_losses(base, lidb_config, optimizer="adamw8bit"), _losses(base, lidb_config), _AS_OTHER_KERNELS)


def _recovers(base: BaseModel, lidb_config: LiDBConfig) -> str:
    """Ask for more memory than there is, and fit again."""
    if base.device.type != "cuda":
        raise _Skipped(f"{base.device} shares the machine's memory, which is not filled here")
    release_memory(base.device)
    before = torch.cuda.memory_allocated(base.device)
    try:
        torch.empty(64 * torch.cuda.get_device_properties(base.device).total_memory, dtype=torch.uint8,
                    device=base.device)  # fmt: skip
    except RuntimeError as error:
        recognised = is_out_of_memory(error)
    else:
        recognised = False
    assert recognised, "running out of memory was not recognised"
    release_memory(base.device)
    _losses(base, lidb_config)
    release_memory(base.device)
    left = torch.cuda.memory_allocated(base.device) - before
    assert left <= 64e6, f"{left / 1e6:.0f} MB are still held after a fit"
    return "recognised, and a fit afterwards leaves no memory taken"


def _draws(base: BaseModel) -> str:
    """Decode latents, which an fp16 VAE may turn into NaN, a black picture."""
    vae = base.pipeline().vae
    channels, *size = base.latent_shape
    latents = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        picture = vae.decode((latents / vae.config.scaling_factor).to(base.device, vae.dtype)).sample
    base.release_vae()
    assert torch.isfinite(picture).all(), f"the VAE in {picture.dtype} draws NaN; pass --precision fp32"
    return f"decoded in {str(picture.dtype).removeprefix('torch.')}"


def _measure(base: BaseModel, lidb_config: LiDBConfig, counted: dict[str, float]) -> str:
    """Seconds and peak memory of a step for one person, with and without checkpointing, as a sentence."""
    space, subject = LiDBSpace(base.adapted, lidb_config), _subjects(base, 1)
    found = []
    for name, options in {"step": {"graph": "auto"}, "step, checkpointed": {"gradient_checkpointing": "on"}}.items():
        release_memory(base.device)
        if base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(base.device)
        seconds = _seconds_a_step(base, space, subject, _fit_config(steps=_TIMED_STEPS, **options))
        sentence = f"{name}: {seconds:.4f} s"
        if base.device.type == "cuda":
            sentence += f", {torch.cuda.max_memory_allocated(base.device) / 1e9:.2f} GB at most"
        if name in counted:
            sentence += f" ({counted[name]:.2f} counted)"
        found.append(sentence)
    return "; ".join(found)


def _seconds_a_step(base: BaseModel, space: LiDBSpace, subjects: Sequence[Subject], config: FitConfig) -> float:
    """Of the later half of the steps, after kernels are chosen and the graph is captured."""
    ends: list[float] = []

    def note(done: int, total: int) -> None:
        if base.device.type == "cuda":
            torch.cuda.synchronize(base.device)
        ends.append(time.perf_counter())

    fit_flat_lora(base, space, subjects, config, _RANK, progress=note)
    half = len(ends) // 2
    return (ends[-1] - ends[half - 1]) / (len(ends) - half)


def _goes_on_checkpointed(base: BaseModel) -> str:
    """Fit in less memory than a step takes without checkpointing, and more than one takes with it."""
    space, subject, peaks = LiDBSpace(base.adapted, LiDBConfig()), _subjects(base, 1), {}
    for checkpointing in ("on", "off"):
        release_memory(base.device)
        torch.cuda.reset_peak_memory_stats(base.device)
        fit_flat_lora(base, space, subject, _fit_config(steps=2, gradient_checkpointing=checkpointing), _RANK)
        peaks[checkpointing] = torch.cuda.max_memory_allocated(base.device)
    release_memory(base.device)
    with memory_limited(base.device, sum(peaks.values()) // 2), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, losses = fit_flat_lora(base, space, subject, _fit_config(steps=2, gradient_checkpointing="auto"), _RANK)
    assert any("gradient checkpointing is on now" in str(one.message) for one in told), "no step ran out of memory"
    assert torch.isfinite(losses).all(), "the losses are not finite"
    return f"a step that takes {peaks['off'] / 1e9:.2f} GB went on in {peaks['on'] / 1e9:.2f}"


def _full_size(base: BaseModel) -> BaseModel:
    if base.device.type != "cuda":
        raise _Skipped(f"full size is measured on CUDA; on {base.device} it would take minutes and gigabytes")
    free = free_bytes(base.device) / 1e9
    if free < _FULL_SIZE_GB:
        raise _Skipped(f"{free:.1f} GB are free, and {_FULL_SIZE_GB} are wanted")
    return random_sd15(base)
