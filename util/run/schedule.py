"""The poly learning-rate schedule, with and without warm-up."""

import torch


def warm_up_poly(step: int, total: int, power: float = 1.0, warm_up: int = 50, start: float = 1e-6) -> float:
    """Factor of a group's initial rate at step 0..total-1: from `start` in a straight line towards 1, and from step `warm_up` on
    the poly decay of all steps, warm-up included."""
    if step < warm_up:
        return 1 - (1 - step / warm_up) * (1 - start)
    return (1 - step / total) ** power


def poly(optimizer: torch.optim.Optimizer, step: int, total: int, power: float) -> None:
    """Sets every group's rate to its initial one times (1 - step / total) ** power, before step 0..total-1."""
    factor = (1 - step / total) ** power
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
