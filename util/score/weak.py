"""Segmentation learned from image-level labels as a task: no mask is read in training, all classes are scored in testing."""

from dataclasses import replace
from typing import ClassVar

from util.config import Config
from util.data.crops import PaddedCrop
from util.data.episodes import Transform
from util.data.folds import Fold, read_class_names
from util.data.semantic import Masks
from util.data.transforms import KeepTransform
from util.score.semantic import NO_RULES, BaseTask, evaluate_images
from util.score.task import How, Predict, Scores, Test


class WeakTask(BaseTask):
    """All classes of a data set and the background; it has no folds. See `util.score.task.Task`.

    mIoU is the mean over all classes and the background, as papers on weak supervision have it; `foreground_miou` leaves the
    background out. Tested images keep their size.
    """

    setting = "image-level labels"
    says: ClassVar[dict[str, str]] = NO_RULES | {
        "Train.use_split_coco": "", "Train.filter_novel": "", "Train.draw": "", "Train.augment": "", "Train.antialias": "",
        "Train.crop": "scaled, flipped, cropped at random", "Train.resized_val": "none: the system scales a tested image itself",
        "Train.selection": "best mIoU in the validation images, whose masks it needs",
        "CLIP.vocabulary": "where labels are made: the image's labels against background texts",
        "Data.min_pixels": "", "Test_Finetune.ann_type": "", "Test_Finetune.test_num": "", "Test_Finetune.seeds": "",
    }  # fmt: skip

    @classmethod
    def folds(cls, config: Config) -> Fold:
        count = len(read_class_names(config.Data.class_names).names)
        return Fold(config.Train.data_set, 0, (), tuple(range(1, 1 + count)))

    @property
    def classes(self) -> tuple[int, ...]:
        return self.channels

    @classmethod
    def labelled(cls, key: str) -> bool:
        return key != "train_list"

    def masks(self, key: str) -> Masks:
        return "all" if self.labelled(key) else "found" if self.config.Train.watch_labels else "none"

    @classmethod
    def transform(cls, config: Config, training: bool) -> Transform:
        train = config.Train
        return PaddedCrop(train.train_h, train.scale_min, train.scale_max) if training else KeepTransform()

    def validation(self) -> Test:
        return replace(super().validation(), label="all classes")

    def evaluate(self, predict: Predict, test: Test, how: How) -> Scores:
        found = evaluate_images(predict, test.data, self.channels, self.fold, how, test.label)
        for scores in (found.record, *found.record.get("variants", {}).values()):
            scores["foreground_miou"], scores["miou"] = scores["miou"], scores.pop("background_miou")
        return found
