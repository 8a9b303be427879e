"""AdamW, or AdamW with its state in 8 bits by bitsandbytes."""

from collections.abc import Sequence
from typing import Any

import torch


def chosen_optimizer(name: str) -> str:
    """The optimiser that ``name`` means: ``auto`` is ``adamw``."""
    return "adamw" if name == "auto" else name


def make_adamw(
    name: str, parameters: Sequence[torch.Tensor], lr: float, capturable: bool = False, **options: Any
) -> torch.optim.Optimizer:
    """Make the `chosen_optimizer`: ``adamw``, fused for parameters on CUDA, or ``adamw8bit``.

    Args:
        capturable: adamw's step may be captured in a CUDA graph; its learning rate is a tensor then.
        options: of both, such as ``betas`` and ``weight_decay``.

    Raises:
        ValueError: bitsandbytes is asked for and is not installed.
    """
    if chosen_optimizer(name) == "adamw":
        if all(parameter.is_cuda for parameter in parameters):
            options |= {"fused": True, "capturable": capturable}
            rate = torch.tensor(lr, device=parameters[0].device) if capturable else lr
            return torch.optim.AdamW(parameters, lr=rate, **options)
        return torch.optim.AdamW(parameters, lr=lr, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optimizer adamw8bit requires bitsandbytes, which cannot be imported ({error}); pip install bitsandbytes, "
            f"or choose adamw"
        ) from error
    return AdamW8bit(parameters, lr=lr, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Change the learning rate, in place if it is a tensor, which a CUDA graph may read."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
