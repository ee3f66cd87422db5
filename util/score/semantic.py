"""Semantic segmentation of single images as a task: a confusion matrix that does not grow, and a row per class and image."""

import contextlib
import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.data.folds import Fold
from util.data.semantic import Images, SemanticDataset
from util.data.source import ImageSource
from util.data.transforms import IGNORE
from util.errors import UserError
from util.files import atomic, written
from util.pool import cores, pool
from util.score.causes import Spread
from util.score.metrics import Counts, SemanticMeter, worst_pairs
from util.score.table import EpisodeTable, Row
from util.score.task import How, Predict, Scores, Test

NO_RULES = {f"Test_Finetune.{key}": "" for key in ("grid", "void", "mean")}  # whole images are scored in one way


class BaseTask(ImageSource):
    """The base classes of a fold, all else background; see `util.score.task.Task`."""

    headline, leaks = "miou", False
    says: ClassVar[dict[str, str]] = NO_RULES | {
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
        prediction has; `confused`: `worst_pairs`; `variants`: the same scores of other predictions of the system, by name
        (`Prediction.variants`).
    """
    context, meter, rows = how.context, SemanticMeter(channels, how.context.device), []
    variants: dict[str, SemanticMeter] = defaultdict(lambda: SemanticMeter(channels, context.device))
    loader = how.loader(data, len(data))
    with how.log.progress(len(loader), label) as bar, after(how, channels, variants) as afterwards:
        for images in loader:
            images: Images = images.to(context.device, non_blocking=True)
            with context.autocast():
                prediction = predict(images)
            for i, placed in enumerate(images.placed):
                decided = prediction.decide(i, placed)
                counted = meter.update(decided, images.original_label[i])
                for name, scores in prediction.variants.items():
                    variants[name].update(placed.restore(scores[i]).argmax(0), images.original_label[i])
                rows += image_rows(int(images.number[i]), counted, channels)
                afterwards(images, i, prediction, decided)
            bar.step(len(images))
    context.all_reduce(meter.state)
    record = meter.result(fold.base, fold.novel) | how.skipped(loader)
    for name in sorted({name for part in context.gather([sorted(variants)]) for name in part}):
        context.all_reduce(variants[name].state)
        found = variants[name].result(fold.base, fold.novel)
        record.setdefault("variants", {})[name] = {key: value for key, value in found.items() if key != "per_class"}
    record["episodes"] = len(data) - len(record.get("skipped", []))
    record["confused"] = worst_pairs(meter.state, channels)
    return Scores(record, sorted(context.gather(rows)))


@contextlib.contextmanager
def after(how: How, channels: Sequence[int], variants: Mapping[str, SemanticMeter]) -> Iterator[Callable[..., None]]:
    """What follows a prediction where `how` asks for it: the CRF in worker processes, and label maps as files.

    Yields a function of (batch, position in it, prediction, its label map H W). At most two jobs a worker wait in memory; the end
    waits for the last ones.
    """
    table = np.array([*channels, *[IGNORE] * (256 - len(channels))], np.uint8)  # channel -> class
    workers, waiting = max(1, cores() // how.context.world), deque()

    def write(name: str, label: np.ndarray) -> None:
        if how.maps is not None:
            file = (how.maps / name).with_suffix(".png")
            with written(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic(file) as temporary:
                    Image.fromarray(table[label]).save(temporary, "PNG")

    def take() -> None:
        future, name, truth = waiting.popleft()
        label, sure = future.result()
        variants["with CRF"].update(torch.from_numpy(label).to(truth.device), truth)
        write(name, sure)

    def afterwards(images: Images, i: int, prediction: Any, decided: Tensor) -> None:
        if processes is None:
            write(images.name[i], decided.cpu().numpy())
            return
        if prediction.crf is None:
            raise UserError("Test_Finetune.crf=true: this system has no CRF; leave it out")
        if tuple(images.image.shape[2:]) != images.placed[i].hw:
            raise UserError("Test_Finetune.crf=true needs images at their own size")
        job = prediction.crf.job(images.image[i], images.placed[i].restore(prediction.final[i]))
        waiting.append((processes.submit(prediction.crf.labels, *job), images.name[i], images.original_label[i]))
        if len(waiting) > 2 * workers:
            take()

    with pool(workers) if how.crf else contextlib.nullcontext() as processes:
        yield afterwards
        while waiting:
            take()


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
