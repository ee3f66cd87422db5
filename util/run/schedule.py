"""The poly learning-rate schedule."""

import torch


def poly(optimizer: torch.optim.Optimizer, step: int, total: int, power: float) -> None:
    """Sets every group's rate to its initial one times (1 - step / total) ** power, before step 0..total-1."""
    factor = (1 - step / total) ** power
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
