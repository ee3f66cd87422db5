"""How a test runs: in several processes, on many examples of Hypothesis."""

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import settings

from util import cli
from util.run.distributed import Context

CPU = torch.device("cpu")


def work(rank: int, world: int, rendezvous: str, task: Callable[[Context], object], out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", timedelta(seconds=60), world, rank)
    torch.save(task(Context(CPU, rank, world)), f"{out}.{rank}")
    dist.destroy_process_group()


def in_processes(world: int, folder: Path, task: Callable[[Context], object]) -> list:
    """What the task returns in each of `world` processes."""
    out = folder / f"out{world}"
    mp.spawn(work, (world, str(folder / f"meet{world}"), task, str(out)), nprocs=world)
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(world)]


def check(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True)


def run_program(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object
                ) -> tuple[int, str]:  # fmt: skip
    """Run a program as its command line does, in this process; exit code and everything printed."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    code = 0
    try:
        cli.run(main)
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err
