"""`sh train.sh ... --dry-run`: estimate time, memory and disk of a training from a few measured steps. Writes nothing."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from util.config import Config
from util.data.episodes import collate
from util.run import checkpoint
from util.run.distributed import Context
from util.run.log import duration
from util.run.place import Experiment
from util.run.schedule import Schedule, Stop

STEPS = 3  # measured, after one to warm up


@dataclass(frozen=True)
class Plan:
    """The size of a training, and measured seconds of a training step and of a validated episode or image."""

    title: str
    facts: dict[str, str]
    steps: int
    step: float
    validated: int
    validation: float
    memory: int  # bytes, peak

    def __str__(self) -> str:
        training, validation = self.steps * self.step, self.validated * self.validation
        lines = self.facts | {
            "time": f"{duration(training + validation)} = {self.steps:,} steps of {self.step:.3g} s"
                    + (f" + {self.validated:,} validated at {self.validation:.3g} s" if self.validated else ""),
            "memory": f"{self.memory / 2**30:.1f} GB at its peak in one process",
        }  # fmt: skip
        rows = [f"  {name:<11} {text}" for name, text in lines.items()]
        return "\n".join([f"{self.title}: what a run would do (nothing is written)", *rows])


def checkpoints(parameters: int) -> int:
    """Return the bytes of three resume points (weights and two moments each) and of the best and last weights."""
    return 44 * parameters


class Planned(Protocol):
    """What train.py has of a run before its start."""

    system: Any  # model.System, which nothing in util/ may import
    optimizer: torch.optim.Optimizer
    data: Dataset
    schedule: Schedule
    stops: list[Stop]
    config: Config
    place: Experiment
    context: Context
    validation: Any  # util.score.task.Test, one floor up; None: nothing is validated
    per_epoch: int


def measure(run: Planned) -> Plan:
    """Measure a few steps of a run."""
    train, context, place = run.config.Train, run.context, run.place
    system, device = run.system, context.device
    batch = collate([run.data[i] for i in range(train.batch_size // context.world)]).to(device)

    def step() -> None:
        with context.autocast():
            loss = sum(system.losses(batch, 0).values())
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        run.optimizer.step()

    system.train()
    taken, validated, validation = seconds(step, device), 0, 0.0
    found = checkpoint.load_resume(place.snapshot) if train.resume == "auto" else None
    done = found[2]["progress"]["step"] if found else 0
    left = run.schedule.total - done
    if run.validation is not None:
        sample = run.validation.data[0].to(device)
        system.eval()
        validation = seconds(lambda: system.predict(sample), device)
        times = sum(stop.validate and stop.step > done for stop in run.stops)
        validated = times * -(-run.validation.count // context.world)
    parameters = sum(p.numel() for p in system.trained.parameters())
    frozen = sum(p.numel() for p in system.parameters()) - parameters
    facts = {
        "data": f"{len(run.data):,} samples from {run.config.Data.train_list}",
        "steps": f"{run.per_epoch:,} an epoch, {-(-run.schedule.total // run.per_epoch)} epochs; "
                 f"{train.batch_size} samples in {context.world} process(es)",
        "starts": f"at step {done:,}, where an earlier run stopped" if found else "at step 0",
        "parameters": f"{parameters / 1e6:.2f} M trained, {frozen / 1e6:.2f} M frozen",
        "disk": f"{checkpoints(parameters) / 2**20:,.0f} MB of checkpoints in {place.folder}",
    }
    title = f"{place.arch} on {place.data_set} {place.exp}"
    return Plan(title, facts, left, taken, validated, validation, peak_memory(device))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median wall time of a call."""
    times = []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes, of the GPU or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
