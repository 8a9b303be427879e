"""How do resizing, merging and converting LoRAs compare with kohya's scripts? ``python benchmarks/lora_algebra.py``

Files with all attention projections of Stable Diffusion 1.5 and XL, half precision, with singular values that fall like
those of trained LoRAs, resized to half their rank. kohya's resize_lora.py and svd_merge_lora.py form each layer's
update and compute its full SVD in float32; that algorithm is reimplemented here. It would take an hour for XL, so it is
timed on one layer of each shape and multiplied by their number. Each measurement is a separate process: CPU seconds,
which a busy machine changes little, and peak memory above that after importing (Linux). Predicted: a hundred times as
fast at low ranks, ten times at 128, and no less exact.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converters import Lora, read_lora, save_kohya
from converters.arithmetic.algebra import merge, relative_errors, resize
from converters.convert import prepare_conversion, prepare_writing
from converters.metadata import KohyaMetadata
from lidb_peft.families import get_family

DECAY = 0.9  # from one singular value to the next
WEIGHTS = {1: (1.0,), 2: (0.8, 0.5)}  # by number of files
CLAMP_QUANTILE = 0.99  # svd_merge_lora.py's


def make_file(path: Path, family: str, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    fall = DECAY ** torch.arange(rank)
    factors = {
        name: (
            torch.randn(rank, width_in, generator=generator) / width_in**0.5,
            torch.randn(width_out, rank, generator=generator) / width_out**0.5 * fall,
        )
        for name, (width_in, width_out) in get_family(family).shapes.items()
    }
    save_kohya(path, factors, KohyaMetadata(family=family))


# ---- kohya's algorithm ----


def kohya(paths: list[Path], out: Path, rank: int) -> float:
    """Write one layer of each shape; return the estimated seconds for all layers."""
    start = time.process_time()
    files = [{name: tensor.float() for name, tensor in load_file(path).items()} for path in paths]
    seconds, result = time.process_time() - start, {}
    for name, count in count_shapes(files[0]).items():
        start = time.process_time()
        update = sum(weight * dense(file, name) for weight, file in zip(WEIGHTS[len(files)], files, strict=True))
        left, singular, right = torch.linalg.svd(update)
        up, down = left[:, :rank] @ torch.diag(singular[:rank]), right[:rank]
        if len(files) > 1:
            limit = torch.quantile(torch.cat([up.flatten(), down.flatten()]), CLAMP_QUANTILE)
            up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
        result[f"{name}.lora_up.weight"] = up.half().contiguous()
        result[f"{name}.lora_down.weight"] = down.half().contiguous()
        result[f"{name}.alpha"] = torch.tensor(float(rank))
        seconds += count * (time.process_time() - start)
    save_file(result, out)
    return seconds


def dense(tensors: dict[str, Tensor], name: str) -> Tensor:
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    return up @ down * (tensors[f"{name}.alpha"] / len(down))


def count_shapes(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return one module of each shape -> how many there are of it."""
    modules = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
    shapes = {
        module: (len(tensors[f"{module}.lora_up.weight"]), tensors[f"{module}.lora_down.weight"].shape[1])
        for module in modules
    }
    counts = Counter(shapes.values())
    return {module: counts[shape] for shape, module in {shape: module for module, shape in shapes.items()}.items()}


# ---- ours ----


def weighted(paths: list[Path]) -> list[tuple[Lora, float]]:
    return [(read_lora(path), weight) for path, weight in zip(paths, WEIGHTS[len(paths)], strict=True)]


def resize_ours(paths: list[Path], out: Path, rank: int) -> None:
    prepare_writing(resize(read_lora(paths[0]), rank)[0], paths, out).write()


def merge_and_resize(paths: list[Path], out: Path, rank: int) -> None:
    prepare_writing(merge(weighted(paths), rank)[0], paths, out).write()


def merge_exactly(paths: list[Path], out: Path, rank: int) -> None:
    prepare_writing(merge(weighted(paths))[0], paths, out).write()


def convert_ours(paths: list[Path], out: Path, rank: int) -> None:
    prepare_conversion(paths[0], out, "diffusers").write()


def load_and_save(paths: list[Path], out: Path, rank: int) -> None:
    save_file(load_file(paths[0]), out)


@dataclass(frozen=True)
class Method:
    """``run`` takes paths, output and new rank; it may return seconds that replace the measured ones."""

    num_files: int
    run: Callable[[list[Path], Path, int], float | None]


METHODS = {
    "resize": Method(1, resize_ours),
    "resize, kohya": Method(1, kohya),
    "merge and resize": Method(2, merge_and_resize),
    "merge and resize, kohya": Method(2, kohya),
    "merge exactly": Method(2, merge_exactly),
    "convert to diffusers": Method(1, convert_ours),
    "load and save": Method(1, load_and_save),
}


def measure(method: Method, paths: list[Path], out: Path, rank: int) -> dict[str, float]:
    """Return the seconds, and the MB above what this process used before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = memory_mb("VmRSS"), time.process_time()
    seconds = method.run(paths, out, rank)
    seconds = time.process_time() - start if seconds is None else seconds
    return {"seconds": seconds, "mb": memory_mb("VmHWM") - before}


def memory_mb(entry: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1000


def missed(paths: list[Path], out: Path) -> float:
    """Return the relative error of the result: the worst over one layer of each shape."""
    parts = weighted(paths)
    sample = {(len(layer.lora_B), layer.lora_A.shape[1]): name for name, layer in parts[0][0].layers.items()}.values()
    truth = merge([(some(lora, sample), weight) for lora, weight in parts], dtype=torch.float32)[0]
    return max(relative_errors(some(read_lora(out), sample), truth).values())


def some(lora: Lora, names: Iterable[str]) -> Lora:
    return replace(lora, layers={name: lora.layers[name] for name in names})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=["sd1", "sdxl"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # method, rank, output, files
    arguments = parser.parse_args()
    if arguments.one:
        method, rank, out, *paths = arguments.one
        print(json.dumps(measure(METHODS[method], [Path(path) for path in paths], Path(out), int(rank))))
        return
    print("| family | rank | what | seconds | MB | misses |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        files, out = [Path(folder, "a.safetensors"), Path(folder, "b.safetensors")], Path(folder, "out.safetensors")
        for family in arguments.families:
            for rank in arguments.ranks:
                for seed, path in enumerate(files):
                    make_file(path, family, rank, seed)
                for name in arguments.methods:
                    paths = files[: METHODS[name].num_files]
                    run = [sys.executable, __file__, "--one", name, str(rank // 2), str(out), *map(str, paths)]
                    found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
                    cells = (family, rank, name, f"{found['seconds']:.2f}", f"{found['mb']:.0f}",
                             f"{missed(paths, out):.3%}")  # fmt: skip
                    print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "decay": DECAY}))


if __name__ == "__main__":
    main()
