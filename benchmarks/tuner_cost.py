"""What does an adapter cost over the bare model? ``python benchmarks/tuner_cost.py``

LiDB compared with PEFT's LoRA of rank 1, VeRA and TinyLoRA on the 128 attention projections of Stable Diffusion 1.5's
UNet (random weights, float32), in one run. Predicted for LiDB: under 5 % of a forward pass and 10 % of a training step,
most of it the low-rank products that LoRA has too.

An adapter adds a few milliseconds to each of 128 layers, which are lost in the noise of seconds. So layers are timed
one by one: for each distinct shape the bare and the adapted layer alternately, the fastest of many runs. The sum of the
differences over all layers, plus AdamW, is compared with the fastest forward, and forward and backward (to the
latents), of the whole bare UNet. On a CPU, seconds are CPU time.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import peft
import torch
from costs import SD15_UNET, clock
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftConfig, TinyLoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from lidb_peft import LiDBConfig
from lidb_peft.layer import LiDBLayer

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
METHODS: dict[str, PeftConfig] = {
    "LiDB": LiDBConfig(target_modules=TARGETS),
    "LoRA r=1": LoraConfig(r=1, target_modules=TARGETS),
    "VeRA": VeraConfig(target_modules=TARGETS),
    "TinyLoRA": TinyLoraConfig(target_modules=TARGETS),
}
MEGABYTE = 2**20


def share_weights(model: nn.Module) -> nn.Module:
    """Copy the modules of a model; the copies share its weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def added_bytes(model: nn.Module, base: nn.Module) -> int:
    """Count the adapter's memory: weights, buffers and bases, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, LiDBLayer):
            tensors += [basis for pair in module.lidb_aux.values() for basis in pair]
    return stored_bytes(tensors) - stored_bytes(list(base.parameters()))


def stored_bytes(tensors: list[Tensor]) -> int:
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def file_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


class Case:
    """One method on the shared base."""

    def __init__(self, base: nn.Module, config: PeftConfig) -> None:
        device = next(base.parameters()).device
        model = share_weights(base)
        start = clock(device)
        self.model = get_peft_model(model, config)
        self.start_up = clock(device) - start
        self.added = added_bytes(self.model, base)
        self.file = file_bytes(self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.forward = self.step = 0.0  # seconds over the bare model


def find_calls(base: nn.Module, inputs: tuple[Tensor, ...]) -> dict[tuple, list[str]]:
    """Run a forward; return the names of the adapted layers by the shape of their input and weight."""
    calls: dict[tuple, list[str]] = {}

    def note(layer: nn.Module, args: tuple, name: str) -> None:
        calls.setdefault((args[0].shape, layer.weight.shape), []).append(name)

    layers = [(n, m) for n, m in base.named_modules() if any(n.endswith(f".{target}") for target in TARGETS)]
    handles = [layer.register_forward_pre_hook(partial(note, name=name)) for name, layer in layers]
    with torch.no_grad():
        base(*inputs)
    for handle in handles:
        handle.remove()
    return calls


@torch.no_grad()
def infer(run: Callable[..., Tensor], *inputs: Tensor) -> None:
    run(*inputs)


def train(run: Callable[..., Tensor], *inputs: Tensor) -> None:
    output = run(inputs[0].requires_grad_(), *inputs[1:])
    output = output if isinstance(output, Tensor) else output.sample
    output.backward(torch.ones_like(output))


def best(actions: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the fastest seconds of each action; the actions alternate."""
    seconds = dict.fromkeys(actions, float("inf"))
    for _ in range(repeats):
        for name, action in actions.items():
            start = clock(device)
            action()
            seconds[name] = min(seconds[name], clock(device) - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=64, help="side of the latents; 64 are 512 pixels")
    parser.add_argument("--repeats", type=int, default=20, help="of each layer")
    parser.add_argument("--rounds", type=int, default=3, help="of the whole bare UNet")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device, size = torch.device(arguments.device), arguments.latents
    torch.manual_seed(0)
    base = UNet2DConditionModel(**SD15_UNET).to(device).requires_grad_(False)
    inputs = tuple(t.to(device) for t in (torch.randn(1, 4, size, size), torch.tensor([500]), torch.randn(1, 77, 768)))
    calls = find_calls(base, inputs)
    whole = {"forward": partial(infer, base, *inputs), "step": partial(train, base, *inputs)}
    whole = best(whole, arguments.rounds, device)
    cases = {name: Case(base, config) for name, config in METHODS.items()}
    for (input_shape, _), names in calls.items():
        x = torch.randn(input_shape, device=device)
        layers = {name: case.model.base_model.model.get_submodule(names[0]) for name, case in cases.items()}
        layers["none"] = base.get_submodule(names[0])
        forward = best({n: partial(infer, layer, x) for n, layer in layers.items()}, arguments.repeats, device)
        step = best({n: partial(train, layer, x) for n, layer in layers.items()}, arguments.repeats, device)
        for name, case in cases.items():
            case.forward += len(names) * (forward[name] - forward["none"])
            case.step += len(names) * (step[name] - step["none"])
    for case in cases.values():
        for parameter in case.trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(case.trained, lr=1e-4)
        case.step += best({"AdamW": optimizer.step}, arguments.repeats, device)["AdamW"]
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, diffusers, peft))
    print(f"{size} x {size} latents, {device}, {torch.get_num_threads()} threads, {versions}. The bare UNet: forward "
          f"{whole['forward']:.2f} s, forward and backward {whole['step']:.2f} s.\n")  # fmt: skip
    print("| method | numbers | forward + ms | of the UNet's | step + ms | of the UNet's | start-up s "
          "| memory MB | file KB |")  # fmt: skip
    print("|---" * 9 + "|")
    for name, case in cases.items():
        print(
            f"| {name} | {sum(p.numel() for p in case.trained):,} | {1000 * case.forward:.0f} "
            f"| {100 * case.forward / whole['forward']:.1f} % | {1000 * case.step:.0f} "
            f"| {100 * case.step / whole['step']:.1f} % | {case.start_up:.2f} | {case.added / MEGABYTE:.2f} "
            f"| {case.file / 1024:.0f} |"
        )


if __name__ == "__main__":
    main()
