"""What is installed, what the hardware offers, and what `auto` chooses here."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import lidb_peft
from hypernet.devices import choose_device, choose_dtype, describe_choice, has_bf16

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors",
            "opencv-python-headless")  # fmt: skip
OPTIONAL = {"xformers": "faster attention on some cards; torch's own is used without it",
            "bitsandbytes": "8-bit optimizers; saves memory only where a large encoder is trained"}  # fmt: skip


def report() -> list[tuple[str, str]]:
    """Findings as (topic, sentence), in reading order. Imports no optional package: some take seconds."""
    rows = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    rows.append(("lidb-peft", lidb_peft.__version__))
    rows += [(name, _version(name) or f"not installed: pip install {name}") for name in PACKAGES]
    rows += [(name, _version(name) or f"not installed ({why}): pip install {name}") for name, why in OPTIONAL.items()]
    rows += _hardware()
    device = choose_device("auto")
    rows.append(("auto chooses", f"{describe_choice(device, choose_dtype('auto', device))}, because {_reason(device)}"))
    return rows


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}, but no device or driver found" if torch.version.cuda else \
            "this torch is a build without CUDA"  # fmt: skip
        return [("CUDA", f"no: {built}"), ("CPU threads", str(torch.get_num_threads()))]
    rows = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
        rows.append((f"cuda:{index}", f"{card.name}, {memory}"))
    return rows


def _reason(device: torch.device) -> str:
    if device.type == "cuda":
        return "a CUDA device is there" + ("" if has_bf16(device) else ", without bf16")
    if device.type == "mps":
        return "there is an Apple GPU and no CUDA device; float32 trains most reliably there"
    return "no GPU is usable; float32 is the CPU's own precision"
