"""Course of a training: the learning rate as a pure function of the step, the stops, and a guard against losses not finite."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from util.config import Train
from util.run.distributed import Context


@dataclass(frozen=True)
class Schedule:
    """Poly decay with warm-up and floor.

    Attributes:
        total: steps of the whole run; power: of the decay, 0 keeps the rate.
        warmup: steps in which a factor grows linearly from `ratio` to 1.
        of_decayed: the factor multiplies the decayed rate (mmcv, CLIP-RC) and not the initial one (WeCLIP).
        floor: rate at the end of the decay.
    """

    total: int
    power: float
    warmup: int = 0
    ratio: float = 0.0
    floor: float = 0.0
    of_decayed: bool = False

    @classmethod
    def of(cls, train: Train, total: int) -> "Schedule":
        return cls(total, train.power, train.warmup, train.warmup_ratio, train.min_lr, train.warmup_of == "decayed")

    def rate(self, initial: float, step: int) -> float:
        """Return the rate before step 0..total-1 of a group whose initial rate is given.

        Decay counts from step 0, in the warm-up too, as in published code.
        """
        factor = (1 - step / self.total) ** self.power
        decayed = initial * factor if not self.floor else (initial - self.floor) * factor + self.floor
        if step >= self.warmup:
            return decayed
        return (decayed if self.of_decayed else initial) * (1 - (1 - step / self.warmup) * (1 - self.ratio))

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rate of every group; return the highest, which the log shows."""
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = self.rate(group["initial_lr"], step)
        return max(group["lr"] for group in optimizer.param_groups)


@dataclass(frozen=True)
class Stop:
    """A step after which a training validates or keeps weights.

    Attributes:
        step: number of steps done; epoch: 0-based, of the last of them; label: the epoch's name in the log.
        validate: validate, keep the weights if they are the best; last: keep them as the last ones; keep: keep them by step.
    """

    step: int
    epoch: int
    label: str
    validate: bool
    last: bool
    keep: bool


def stops(train: Train, per_epoch: int) -> list[Stop]:
    """List every stop of a training in order: ends of epochs, validations, kept weights, the end."""
    total = train.iterations or per_epoch * train.epochs
    epochs = -(-total // per_epoch)
    ends = {min(epoch * per_epoch, total) for epoch in range(1, epochs + 1)}
    judged = ends if train.validate_every == 0 else {*validations(train, per_epoch, total), total}
    kept = {step for step in train.keep if step <= total}
    found = []
    for step in sorted(ends | judged | kept):
        epoch = (step - 1) // per_epoch
        found.append(Stop(step, epoch, f"epoch {epoch + 1}/{epochs}", step in judged, step in ends, step in kept))
    return found


def validations(train: Train, per_epoch: int, total: int) -> Iterator[int]:
    """Yield a step every `validate_every` epochs, or every `validate_every` steps where `iterations` gives the length."""
    each = train.validate_every * (1 if train.iterations else per_epoch)
    k = 1
    while (step := int(k * each)) < total:
        if step:
            yield step
        k += 1


class Guard:
    """Keep a loss that is not finite from ever changing the weights, without waiting for a GPU at each step.

    After the first such loss, in any process, no step changes the weights. `stopped()` reports it, and waits for the GPU.
    """

    def __init__(self, context: Context):
        self.context = context
        self.bad = torch.zeros((), device=context.device)  # more than 0: a loss was not finite
        self.first = torch.full((), -1, device=context.device)  # the first such step

    def step(self, optimizer: torch.optim.Optimizer, loss: Tensor, number: int) -> None:
        """Take step `number` of the optimizer, unless a loss was not finite."""
        before = self.bad.clone()
        self.bad = self.context.all_reduce((~torch.isfinite(loss.detach())).float()) + before
        self.first = torch.where((before == 0) & (self.bad > 0), number, self.first)
        if self.context.device.type == "cuda":
            optimizer.found_inf = (self.bad > 0).float()  # fused optimizers look at it on the GPU
            optimizer.step()
        elif not self.stopped():
            optimizer.step()

    def stopped(self) -> bool:
        return bool(self.bad)
