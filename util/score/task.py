"""Task: the data that a system learns from, and how it is scored. train.py and test.py use these names of a task and no other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import Dataset

from util.config import Config
from util.data.folds import ClassNames, Fold
from util.data.index import Record
from util.data.loading import Loader, RangeSampler
from util.errors import UserError
from util.run.distributed import Context
from util.run.log import RunLog
from util.score.table import EpisodeTable, Row

Predict = Callable[[Any], Any]  # batch on the device -> model.Prediction


@dataclass(frozen=True)
class How:
    """How an evaluation runs: which process of how many, its log, batch size, workers, and what a broken file means.

    crf: also score the prediction after the system's CRF; maps: folder that gets every predicted label map. Dense tasks only.
    trivial: also score predictions that need no system; control: run every episode once more with supports of another class.
    Few-shot tasks only.
    """

    context: Context
    log: RunLog
    batch: int = 1
    workers: int = 0
    on_error: str = "stop"
    crf: bool = False
    maps: Path | None = None
    trivial: bool = False
    control: bool = False

    @classmethod
    def of(cls, config: Config, context: Context, log: RunLog) -> "How":
        return cls(context, log, config.Train.batch_size_val, config.Train.workers, config.Data.on_error)

    def loader(self, data: Dataset, count: int) -> Loader:
        """Return a loader of samples 0..count-1, shared out among the processes."""
        sampler = RangeSampler(0, count, self.batch * self.context.world, self.context, drop_last=False)
        return Loader(data, sampler, self.workers, self.context.device, self.log.warning, on_error=self.on_error)

    def steps(self, test: "Test") -> int:
        """Return how many batches of all processes a test has."""
        return -(-test.count // (self.batch * self.context.world))

    def skipped(self, loader: Loader) -> dict[str, list[str]]:
        """Return {"skipped": messages of all processes}, empty when nothing was skipped."""
        messages = self.context.gather([f"{failure.number}: {failure.message}" for failure in loader.skipped])
        return {"skipped": messages} if messages else {}


@dataclass(frozen=True)
class Test:
    """A part to evaluate: samples 0..count-1 of a data set."""

    label: str
    data: Dataset
    count: int


@dataclass
class Scores:
    """Result of one evaluation.

    Attributes:
        record: what a report stores for one seed: scores by name, fractions 0..1, mostly ...iou; `per_class` {class: IoU};
            `episodes`, the number of samples.
        rows: one per episode, or per class and image; of all processes.
        control: rows of the episodes with supports of another class, where `How.control` asks for them.
    """

    record: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    control: list[Row] = field(default_factory=list)


class Task(Protocol):
    """Data and scores of a fold. The data half is `util.data.source.Source`.

    Attributes:
        unit: what a sample is called; setting: what a result is of, beside the data set.
        headline: the score that chooses a checkpoint.
        classes: those that are scored; clip_patch: see Source.
        leaks: whether a protocol's leaks concern it, so that a row without them is worth a test.
        says: keys of a protocol -> what they mean here, where that differs from few-shot episodes.
    """

    unit: str
    setting: str
    headline: str
    fold: Fold
    names: ClassNames
    clip_patch: int | None
    classes: tuple[int, ...]
    leaks: bool
    says: Mapping[str, str]

    def use_classes(self, names: ClassNames) -> None:
        """Score predictions of these classes instead (`Test_Finetune.classes`). Raises UserError where that cannot be."""
        ...

    @classmethod
    def folds(cls, config: Config) -> Fold: ...

    def records(self, key: str) -> list[Record]: ...

    def training(self) -> Dataset: ...

    def validation(self) -> Test:
        """Return the data that choose the checkpoint."""
        ...

    def tests(self) -> dict[int, Test]:
        """Return the test of each seed."""
        ...

    def evaluate(self, predict: Predict, test: Test, how: How) -> Scores: ...

    def table(self, scores: Mapping[int, Scores]) -> EpisodeTable:
        """Return the rows of all seeds as a table."""
        ...


def headline(task: Task, record: Mapping[str, Any]) -> float:
    """Return the score of a validation that chooses a checkpoint.

    Raises:
        UserError: there is none: of seen or unseen classes, the validation images show none and the predictions have none.
    """
    if task.headline not in record:
        raise UserError(f"Data.val_list gives no {task.headline}: no image of it shows an unseen class, or none a seen one; give "
                        "a list with both")
    return record[task.headline]
