"""Semantic segmentation of single images as a task: a confusion matrix that does not grow, and a row per class and image."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from util.data.folds import Fold
from util.data.semantic import Images, SemanticDataset
from util.data.source import ImageSource
from util.score.causes import Spread
from util.score.metrics import Counts, SemanticMeter
from util.score.table import EpisodeTable, Row
from util.score.task import How, Predict, Scores, Test


class BaseTask(ImageSource):
    """The base classes of a fold, all else background; see `util.score.task.Task`."""

    headline, leaks = "miou", False
    says: ClassVar[dict[str, str]] = {
        "Train.selection": "best mIoU on base classes in all validation images, novel objects painted background",
    }

    @property
    def classes(self) -> tuple[int, ...]:
        return self.fold.base

    def validation(self) -> Test:
        data = self.images("val_list", training=False)
        return Test("base classes", data, len(data))

    def tests(self) -> dict[int, Test]:
        return {0: self.validation()}

    def evaluate(self, predict: Predict, test: Test, how: How) -> Scores:
        found = evaluate_images(predict, test.data, self.channels, self.fold, how, test.label)
        found.record["per_class"] = {c: found.record["per_class"][c] for c in self.classes}
        found.rows = [row for row in found.rows if row.cls in self.classes]
        return found

    def table(self, scores: Mapping[int, Scores]) -> EpisodeTable:
        listed = [record.image for record in self.records("val_list")]
        digest = hashlib.sha256(repr((listed, self.classes)).encode()).hexdigest()[:16]
        return EpisodeTable.of(digest, {seed: found.rows for seed, found in scores.items()}, dense=True)


def evaluate_images(
    predict: Predict, data: SemanticDataset, channels: Sequence[int], fold: Fold, how: How, label: str = "test"
) -> Scores:
    """Evaluate every image of the list, shared out among the processes. Their number and the batch size change no count.

    Args:
        channels: class of each channel of the prediction; 0 is the background.
    Returns:
        record: `SemanticMeter.result()` with `episodes`, how many images; a row for each class of each image that truth or
        prediction has; `variants`: the same scores of other predictions of the system, by name (`Prediction.variants`).
    """
    context, meter, rows = how.context, SemanticMeter(channels, how.context.device), []
    variants: dict[str, SemanticMeter] = defaultdict(lambda: SemanticMeter(channels, context.device))
    loader = how.loader(data, len(data))
    with how.log.progress(len(loader), label) as bar:
        for images in loader:
            images: Images = images.to(context.device, non_blocking=True)
            with context.autocast():
                prediction = predict(images)
            for i, placed in enumerate(images.placed):
                counted = meter.update(prediction.decide(i, placed), images.original_label[i])
                for name, scores in prediction.variants.items():
                    variants[name].update(placed.restore(scores[i]).argmax(0), images.original_label[i])
                rows += image_rows(int(images.number[i]), counted, channels)
            bar.step(len(images))
    context.all_reduce(meter.state)
    record = meter.result(fold.base, fold.novel) | how.skipped(loader)
    for name in sorted({name for part in context.gather([sorted(variants)]) for name in part}):
        context.all_reduce(variants[name].state)
        found = variants[name].result(fold.base, fold.novel)
        record.setdefault("variants", {})[name] = {key: value for key, value in found.items() if key != "per_class"}
    record["episodes"] = len(data) - len(record.get("skipped", []))
    return Scores(record, sorted(context.gather(rows)))


def image_rows(number: int, confusion: Tensor, channels: Sequence[int]) -> list[Row]:
    """Return a row for each class with a pixel in truth or prediction.

    confusion: C C int64 counts (truth, prediction) of one image.
    """
    confusion = confusion.cpu()
    hit, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    others = confusion.clone()
    others.fill_diagonal_(0)
    others[[c == 0 for c in channels]] = 0  # background is no object
    most, which = others.max(0)
    union = truth + predicted - hit
    total, rows = int(confusion.sum()), []
    for c in torch.nonzero(union).flatten().tolist():
        inside, around = int(hit[c]), int(union[c])
        other = channels[which[c]] if most[c] else 0
        rows.append(Row(number, channels[c], number, Counts(inside, around, total - around, total - inside),
                        Spread(int(predicted[c]), int(others[:, c].sum()), other)))  # fmt: skip
    return rows
