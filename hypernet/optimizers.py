"""AdamW, or AdamW with its state in 8 bits by bitsandbytes."""

from collections.abc import Sequence
from typing import Any

import torch


def make_adamw(
    name: str, parameters: Sequence[torch.Tensor], lr: float, capturable: bool = False, **options: Any
) -> torch.optim.Optimizer:
    """Make the optimiser ``adamw``, fused for parameters on CUDA, or ``adamw8bit``; ``auto`` is ``adamw``.

    Args:
        capturable: adamw's step may be captured in a CUDA graph; its learning rate is a tensor then.
        options: of both, such as ``betas`` and ``weight_decay``.

    Raises:
        ValueError: bitsandbytes is asked for and is not installed.
    """
    if name != "adamw8bit":
        if all(parameter.is_cuda for parameter in parameters):
            options |= {"fused": True, "capturable": capturable}
            lr = torch.tensor(lr, device=parameters[0].device) if capturable else lr
        return torch.optim.AdamW(parameters, lr=lr, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optimizer adamw8bit needs bitsandbytes, which is not to be had ({error}); pip install 'lidb-peft[cuda]', "
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
