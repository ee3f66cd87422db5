"""Run a function over many jobs on all cores."""

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from util.errors import UserError


def parallel(function: Callable[[Any], Any], jobs: Collection[Any], workers: int, chunk: int) -> Iterator[Any]:
    """Return the results in order. An error of `function` is raised here.

    Raises:
        UserError: a worker died. (multiprocessing.Pool would wait for ever.)
    """
    with _pool(workers) as pool:
        yield from pool.map(function, jobs, chunksize=chunk)


def stream(function: Callable[..., Any], jobs: Iterable[tuple], workers: int) -> Iterator[Any]:
    """Yield the results of large jobs in order: arguments are taken one by one, at most two per worker wait in memory."""
    with _pool(workers) as pool:
        waiting = deque()
        for arguments in jobs:
            waiting.append(pool.submit(function, *arguments))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(workers, initializer=_signals) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise UserError("a worker process died: killed (out of memory?), or crashed by a damaged file. Run the same command "
                            "again with more memory, or on one core to see at which file (taskset -c 0)") from error


def _signals() -> None:
    """Ignore Ctrl-C, which the parent handles, and let SIGTERM end a worker. (A training's handler would be inherited.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
