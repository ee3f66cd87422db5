"""One process or many: device, ranks, reductions, and the end after a signal."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from util.config import Runtime
from util.errors import Terminated, UserError
from util.pool import cores


@dataclass(frozen=True)
class Context:
    """This process among all of a run. (torchrun sets the environment variables.)"""

    device: torch.device
    rank: int = 0
    world: int = 1
    precision: str = "fp32"  # fp32 | bf16

    @property
    def main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """Return the autocast of this process, the same in training, evaluation and pictures."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place (through this rank's device)."""
        if self.world > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved)
            tensor.copy_(moved)
        return tensor

    def gather(self, value: list[Any]) -> list[Any]:
        """Join the lists of all ranks in rank order."""
        if self.world == 1:
            return value
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, value)
        return [item for part in parts for item in part]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise UserError in all processes when one of them, perhaps on another machine, has another value of a fact."""
        everyone = self.gather([dict(facts)])
        wrong = [f"{key} (process {rank}: {theirs.get(key)}, process 0: {value})" for key, value in everyone[0].items()
                 for rank, theirs in enumerate(everyone) if theirs.get(key) != value]
        if wrong:
            raise UserError("the processes differ, so they would not train one model: " + "; ".join(wrong))

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


class Termination:
    """Catch SIGTERM, which clusters send before they kill; a context manager.

    `asked()` gives all processes the same answer at the same step, so that none waits for one that has ended.
    """

    def __init__(self, context: Context):
        self.context, self.caught = context, False

    def __enter__(self) -> Self:
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "caught", True))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def asked(self) -> bool:
        """Return whether any process caught SIGTERM. All processes must call it at the same step."""
        if self.context.world == 1:
            return self.caught
        return bool(self.context.all_reduce(torch.tensor([int(self.caught)], device=self.context.device)))

    @staticmethod
    def ended(step: int) -> Terminated:
        return Terminated(f"terminated; saved after iteration {step}, the same command continues there")


def start(gpus: int, runtime: Runtime) -> Context:
    """Join the process group when torchrun started several processes.

    Args:
        gpus: number to use of this machine; 0 is the CPU; more than there are is an error.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    found = torch.cuda.device_count()
    if gpus > found:
        raise UserError(f"GPUS={gpus}, but torch sees {found} on this machine; 0 runs on the CPU")
    wanted = gpus or runtime.processes
    if world == 1 and "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise UserError(f"SLURM_NTASKS={os.environ['SLURM_NTASKS']}, WORLD_SIZE is not set: each task would train alone. Ask for "
                        "one task a machine (--ntasks-per-node=1); train.sh starts a process for every GPU")
    if wanted > 1 and world == 1:
        raise UserError(f"{wanted} processes are started by torchrun: `sh train.sh EXP DATASET GPUS`, or on the CPU "
                        "`sh train.sh EXP DATASET 0 Runtime.processes=N` (on the command line, not in a file)")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(runtime.threads or max(1, cores() // local_world))
    if runtime.precision == "bf16" and (reason := no_bf16(device)):
        raise UserError(f"Runtime.precision=bf16: {reason}; use fp32")
    if world > 1:
        end_with_parent()
        dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(minutes=30))
    return Context(device, rank, world, runtime.precision)


def no_bf16(device: torch.device) -> str:
    """Say why bfloat16 is of no use on a device; "" where it is.

    oneDNN has no bf16 convolution for a processor without AVX-512: torch then runs a plain loop, some 100 times slower than fp32.
    """
    if device.type == "cuda":
        return "" if torch.cuda.is_bf16_supported() else f"{torch.cuda.get_device_name(device)} has no bfloat16"
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no fast bfloat16 (AVX-512), convolutions would take some 100 times as long as in fp32"
    return ""


def end_with_parent() -> None:
    """Lets the kernel send SIGTERM to this process when torchrun is gone, so that no worker trains on as an orphan. (Linux)"""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
