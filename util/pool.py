"""Run a function over many jobs on all cores."""

import contextlib
import os
import signal
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from util.errors import UserError


def cores() -> int:
    """Return how many cores this process may use. (macOS and Windows cannot say; there it is all of them.)"""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(function: Callable[[Any], Any], jobs: Collection[Any], workers: int, chunk: int) -> Iterator[Any]:
    """Return the results in order. An error of `function` is raised here.

    Raises:
        UserError: a worker died. (multiprocessing.Pool would wait for ever.)
    """
    with pool(workers) as processes:
        yield from processes.map(function, jobs, chunksize=chunk)


@contextlib.contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes. What their jobs raise is raised by `result()`; a dead worker is a UserError at the end of the block."""
    with ProcessPoolExecutor(workers, initializer=_signals) as processes:
        try:
            yield processes
        except BrokenProcessPool as error:
            raise UserError("a worker process died: killed (out of memory?), or crashed by a damaged file. Run the same command "
                            "again with more memory, or on one core to see at which file (taskset -c 0)") from error


def _signals() -> None:
    """Ignore Ctrl-C, which the parent handles, and let SIGTERM end a worker. (A training's handler would be inherited.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
