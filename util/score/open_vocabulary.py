"""Open-vocabulary segmentation without training as a task: every class of a data set competes by its name, none is held out."""

from pathlib import Path
from typing import ClassVar

from util.config import Config
from util.data.episodes import Transform
from util.data.folds import Fold, read_class_names
from util.data.transforms import IGNORE, WorkingTransform
from util.errors import UserError
from util.score.semantic import BaseTask
from util.score.task import How, Predict, Scores, Test


class OpenVocabularyTask(BaseTask):
    """All classes of a data set; see `util.score.task.Task`. Counts are summed over the data set at file size.

    With words for the background (Method.background) it is a class like the others; without them its pixels do not count.
    """

    says: ClassVar[dict[str, str]] = {
        "Train.use_split_coco": "", "Train.filter_novel": "", "Train.draw": "", "Train.augment": "", "Train.antialias": "",
        "Train.crop": "", "Train.resized_val": "short side to a fixed length, windows", "Train.selection": "",
        "CLIP.vocabulary": "all classes, and the words of the background",
        "Data.min_pixels": "", "Test_Finetune.ann_type": "", "Test_Finetune.test_num": "", "Test_Finetune.seeds": "",
    }  # fmt: skip

    def __init__(self, config: Config, cache: Path | None = None) -> None:
        super().__init__(config, cache)
        if config.Train.batch_size_val != 1:
            raise UserError(f"Train.batch_size_val = {config.Train.batch_size_val}: images differ in size, so a batch holds one")

    @property
    def setting(self) -> str:
        return f"open vocabulary, {len(self.fold.base)} classes" + (" and the background" if self.background else "")

    @property
    def background(self) -> bool:
        return bool(self.config.Method.background)

    @classmethod
    def folds(cls, config: Config) -> Fold:
        count = len(read_class_names(config.Data.class_names).names)
        return Fold(config.Train.data_set, 0, (), tuple(range(1, 1 + count)))

    @property
    def channels(self) -> tuple[int, ...]:
        return (0, *self.fold.base) if self.background else self.fold.base

    @property
    def classes(self) -> tuple[int, ...]:
        return self.channels

    def target(self, training: bool) -> dict[int, int]:
        return {0: IGNORE} | super().target(training)

    @classmethod
    def transform(cls, config: Config, training: bool) -> Transform:
        return super().transform(config, training) if training else WorkingTransform(config.Train.val_size)

    def validation(self) -> Test:
        data = self.images("val_list", training=False)
        return Test("all classes", data, len(data))

    def evaluate(self, predict: Predict, test: Test, how: How) -> Scores:
        found = super().evaluate(predict, test, how)
        record = found.record
        if "background_miou" in record:
            record["foreground_miou"], record["miou"] = record["miou"], record.pop("background_miou")
        return found
