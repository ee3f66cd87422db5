"""The poly learning-rate schedule."""

import torch


def rate(step: int, total: int, base: float, power: float, floor: float = 0.0, warmup: int = 0) -> float:
    """Learning rate of step 0..total-1: poly decay from `base` to `floor`, multiplied in the first `warmup` steps by a factor
    that rises from 1e-6 to 1."""
    regular = (base - floor) * (1 - step / total) ** power + floor
    return regular if step >= warmup else regular * (1 - (1 - step / warmup) * (1 - 1e-6))


def poly(optimizer: torch.optim.Optimizer, step: int, total: int, power: float) -> None:
    """Sets every group's rate to its initial one times (1 - step / total) ** power, before step 0..total-1."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = rate(step, total, group["initial_lr"], power)
