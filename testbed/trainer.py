"""A resumable training loop in which each step depends only on its number."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from lidb_peft.sealed import read_tree, write_tree

EMA_DECAY = 0.9995


@dataclass(frozen=True)
class Run:
    """A working folder, and the fraction of each training to run; below 1 stops early, on the whole run's schedule."""

    out: Path
    fraction: float = 1.0


def falling(step: int, num_steps: int) -> float:
    """From 1 to 0, slightly slower than linear."""
    return (1 - step / num_steps) ** 0.8


def level_then_falling(step: int, num_steps: int) -> float:
    """1 for four fifths of the steps, then linearly to 0: the number of steps need not be known before."""
    return min(1.0, 5 * (1 - step / num_steps))


def _is_trained(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad


class Trainer:
    """A step-numbered training loop: optimiser, linear warm-up and decay, EMA weights, whole checkpoints, a log."""

    def __init__(
        self,
        name: str,
        run: Run,
        modules: torch.nn.Module,
        num_steps: int,
        lr: float,
        ema_decay: float = EMA_DECAY,
        schedule: Callable[[int, int], float] = falling,
        warmup: int = 100,
    ):
        """Train ``modules`` for ``num_steps``, or resume from the run's folder.

        Args:
            schedule: (step, number of steps) -> fraction of ``lr``, after ``warmup`` steps.
        """
        self.ema_decay, self.schedule, self.warmup = ema_decay, schedule, warmup
        self.name, self.file, self.log = name, run.out / f"{name}.safetensors", run.out / f"{name}.jsonl"
        self.modules, self.num_steps, self.lr, self.step = modules, num_steps, lr, 0
        self.last_step = math.ceil(num_steps * run.fraction)
        self.optimizer = torch.optim.AdamW(
            filter(_is_trained, modules.parameters()), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.ema = {name: value.detach().clone() for name, value in modules.state_dict().items()}
        if self.file.exists():
            state = read_tree(self.file)
            modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step = state["ema"], state["step"]

    def run(self, loss_of_step, save_every_s: float = 120.0) -> torch.nn.Module:
        """Train to the last step with ``loss_of_step(step)``; returns the modules with EMA weights loaded."""
        last_save, started, first, running = time.monotonic(), time.monotonic(), self.step, 0.0
        while self.step < self.last_step:
            for group in self.optimizer.param_groups:
                group["lr"] = (
                    self.lr * min(1.0, (self.step + 1) / self.warmup) * self.schedule(self.step, self.num_steps)
                )
            loss = loss_of_step(self.step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self._update_ema()
            running += loss.item()
            if self.step % 100 == 0:
                rate = (self.step - first) / (time.monotonic() - started)
                line = {"step": self.step, "loss": round(running / 100, 5), "steps_per_s": round(rate, 3)}
                left = (self.last_step - self.step) / rate / 60
                click.echo(f"{self.name} {line} {left:.0f} min left", err=True)
                with open(self.log, "a") as file:
                    file.write(json.dumps(line) + "\n")
                running = 0.0
            if time.monotonic() - last_save > save_every_s or self.step == self.last_step:
                self.save()
                last_save = time.monotonic()
        self.modules.load_state_dict(self.ema)
        return self.modules

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.modules.state_dict().items():
            if value.is_floating_point():
                self.ema[name].lerp_(value, 1 - decay)

    def save(self) -> None:
        state = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema}
        write_tree(self.file, {**state, "step": self.step})


def step_generator(stage: int, step: int) -> torch.Generator:
    """The randomness of one step of one stage: a resumed run draws the same as an uninterrupted one."""
    return torch.Generator().manual_seed((stage << 40) + step)


@contextmanager
def fixed_initialisation() -> Iterator[None]:
    """Seed torch's global generator, from which module constructors draw, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
