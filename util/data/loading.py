"""Batches from files, read by worker processes; and what happens when a file is broken.

The error of a worker travels as a value: raised there, it would reach the user inside a traceback. With `Data.on_error:
stop` it is raised here. With `skip` training takes another sample in its place, a pure function of the broken one's number;
evaluation leaves the episode out and counts it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from util.data.episodes import collate
from util.data.transforms import worker_init
from util.distributed import RangeSampler
from util.errors import BrokenFile, UserError
from util.log import RunLog

PATIENCE = 900  # seconds without a batch until a worker counts as hanging
ATTEMPTS = 10  # samples in place of a broken one
FAR = 10**12 + 39  # a substitute's number is that far away, where no other sample of the run is; prime


@dataclass(frozen=True)
class Failure:
    """A sample that could not be read."""

    number: int
    message: str
    broken: bool  # a file is missing or damaged; else something that no policy excuses


class Loader:
    """Batches of a data set in the sampler's order, decoded by `workers` processes.

    Args:
        training: a skipped sample is replaced, so that every batch is full.
    Attributes:
        skipped: failures of this process so far.
    Raises:
        UserError: a file is broken and `on_error` is "stop", or nothing but broken files is found.
    """

    def __init__(self, data: Dataset, sampler: RangeSampler, workers: int, device: torch.device, log: RunLog, *,
                 on_error: str = "stop", training: bool = False):  # fmt: skip
        self.on_error, self.training, self.log = on_error, training, log
        self.skipped: list[Failure] = []
        self.batches = DataLoader(
            _Guarded(data, ATTEMPTS if training and on_error == "skip" else 0), batch_sampler=sampler, num_workers=workers,
            collate_fn=_collate, worker_init_fn=worker_init, pin_memory=device.type == "cuda",
            timeout=PATIENCE if workers else 0,
            generator=torch.Generator(),  # its own: drawing from the global one would shift dropout after a resume
        )  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        for batch, failures, missing in self.batches:
            for failure in failures:
                if not failure.broken:
                    raise UserError(failure.message)
                if self.on_error == "stop":
                    raise BrokenFile(f"{failure.message}. (Data.on_error=skip goes on without such files, and counts them)")
                self.skipped.append(failure)
                self.log.warning(f"skipped, number {failure.number}: {failure.message}")
            if missing and self.training:
                raise UserError(f"{1 + ATTEMPTS} samples in a row cannot be read; the last one: {failures[-1].message}")
            if batch is not None:
                yield batch


class _Guarded(Dataset):
    """(sample or None, failures); after a failure up to `substitutes` others are tried."""

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
    """(batch of what could be read or None, failures, how many samples are missing)"""
    whole = [sample for sample, _ in samples if sample is not None]
    failures = [failure for _, failures in samples for failure in failures]
    return collate(whole) if whole else None, failures, len(samples) - len(whole)
