"""Read batches with worker processes, and deal with broken files.

A worker returns an error as a value: raised there, it would reach the user inside a traceback. With `Data.on_error:
stop` it is raised here. With `skip`, training takes another sample instead, a pure function of the broken one's number;
evaluation leaves the episode out and counts it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from util.data.episodes import collate
from util.data.transforms import worker_init
from util.errors import BrokenFile, UserError

PATIENCE = 900  # seconds without a batch until a worker counts as hanging
ATTEMPTS = 10  # samples in place of a broken one
FAR = 10**12 + 39  # distance of a substitute's number, beyond all samples of the run; prime


class Shard(Protocol):
    """This process among all (`util.run.distributed.Context` is one)."""

    rank: int
    world: int


class RangeSampler(Sampler[list[int]]):
    """Batches over start..stop-1 in order, each global batch cut evenly among the ranks.

    So 1 process with batch 8 and 2 with batch 4 see the same episodes in the same steps.

    Args:
        drop_last: leave out an incomplete global batch (training); else its rows are shared out, some ranks get fewer.
    """

    def __init__(self, start: int, stop: int, batch: int, shard: Shard, drop_last: bool):
        if batch % shard.world:
            raise UserError(f"a global batch of {batch} cannot be divided among {shard.world} processes")
        self.start, self.stop, self.batch, self.shard, self.drop_last = start, stop, batch, shard, drop_last

    def __len__(self) -> int:
        count = self.stop - self.start
        return count // self.batch if self.drop_last else -(-count // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.shard.world
        for step in range(len(self)):
            first = self.start + step * self.batch + self.shard.rank * share
            rows = list(range(first, min(first + share, self.stop)))
            if rows:
                yield rows


@dataclass(frozen=True)
class Failure:
    """A sample that could not be read."""

    number: int
    message: str
    broken: bool  # a file is missing or damaged; any other error always stops the run


class Loader:
    """Batches of a data set in the sampler's order, decoded by `workers` processes.

    Args:
        warn: called with a line about every skipped sample.
        training: a skipped sample is replaced, so that every batch is full.
    Attributes:
        skipped: failures of this process so far.
    Raises:
        UserError: a file is broken and `on_error` is "stop", or too many samples in a row are broken.
    """

    def __init__(self, data: Dataset, sampler: RangeSampler, workers: int, device: torch.device,
                 warn: Callable[[str], None], *,
                 on_error: str = "stop", training: bool = False):  # fmt: skip
        self.on_error, self.training, self.warn = on_error, training, warn
        self.skipped: list[Failure] = []
        self.batches = DataLoader(
            _Guarded(data, ATTEMPTS if training and on_error == "skip" else 0), batch_sampler=sampler, num_workers=workers,
            collate_fn=_collate, worker_init_fn=worker_init, pin_memory=device.type == "cuda",
            timeout=PATIENCE if workers else 0,
            generator=torch.Generator(),  # its own, since draws from the global one would shift dropout after a resume
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch, failures, missing in self.batches:
            for failure in failures:
                if not failure.broken:
                    raise UserError(failure.message)
                if self.on_error == "stop":
                    raise BrokenFile(f"{failure.message}. (Data.on_error=skip leaves such files out, and counts them)")
                self.skipped.append(failure)
                self.warn(f"skipped, number {failure.number}: {failure.message}")
            if missing and self.training:
                raise UserError(f"{1 + ATTEMPTS} samples in a row cannot be read; the last one: {failures[-1].message}")
            if batch is not None:
                yield batch


class _Guarded(Dataset):
    """Return (sample or None, failures); after a failure try up to `substitutes` others."""

    def __init__(self, data: Dataset, substitutes: int):
        self.data, self.substitutes = data, substitutes

    def __getitem__(self, i: int) -> tuple[Any, list[Failure]]:
        failures = []
        for attempt in range(1 + self.substitutes):
            try:
                return self.data[i + attempt * FAR], failures
            except UserError as error:
                failures.append(Failure(i, str(error), isinstance(error, BrokenFile)))
        return None, failures


def _collate(samples: list[tuple[Any, list[Failure]]]) -> tuple[Any, list[Failure], int]:
    """Return (batch of the readable samples or None, failures, how many samples are missing)."""
    whole = [sample for sample, _ in samples if sample is not None]
    failures = [failure for _, failures in samples for failure in failures]
    return collate(whole) if whole else None, failures, len(samples) - len(whole)
