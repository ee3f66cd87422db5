"""Zero-shot segmentation as a task: all classes compete, and the mean over those without labels counts as much as the others'.

Every pixel belongs to a class or does not count; a background (VOC's 0) does not count, so false objects on it cost nothing.
"""

from pathlib import Path
from typing import ClassVar

from util.config import Config
from util.data.augment import CropTransform
from util.data.episodes import Transform
from util.data.folds import ClassNames, Fold
from util.data.transforms import IGNORE, KeepTransform
from util.errors import UserError
from util.score.semantic import NO_RULES, BaseTask
from util.score.task import Test


class ZeroShotTask(BaseTask):
    """All classes of a data set: seen are the base classes of the fold, unseen its novel ones. See `util.score.task.Task`.

    Labels are 0-based: class c of the lists is channel c - 1.
    """

    leaks = False  # what a setting leaks, it leaks in training
    says: ClassVar[dict[str, str]] = NO_RULES | {
        "Train.filter_novel": "all; unseen objects stay in the images",
        "Train.crop": "random crop",
        "Train.resized_val": "short side to a fixed length, windows",
        "Train.selection": "not told by the paper: the best or the last",
        "CLIP.vocabulary": "all classes",
        "Data.min_pixels": "", "Test_Finetune.ann_type": "", "Test_Finetune.test_num": "", "Test_Finetune.seeds": "",
    }  # fmt: skip

    def __init__(self, config: Config, cache: Path | None = None) -> None:
        super().__init__(config, cache)
        self._channels = self.channels_of(self.fold)
        if config.Train.batch_size_val != 1:
            raise UserError(f"Train.batch_size_val = {config.Train.batch_size_val}: images differ in size, so a batch holds one")

    @property
    def setting(self) -> str:
        return f"{self.config.Method.setting}, {len(self.fold.base)} + {len(self.fold.novel)} classes"

    @property
    def headline(self) -> str:
        return "hiou" if self.fold.novel else "miou"

    @classmethod
    def channels_of(cls, fold: Fold) -> tuple[int, ...]:
        return tuple(range(1, fold.num_classes + 1))

    @property
    def channels(self) -> tuple[int, ...]:
        return self._channels

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(sorted(c for c in self.channels if c <= self.fold.num_classes))

    def use_classes(self, names: ClassNames) -> None:
        """Channel c is names[c]. A class of the data set that is not among them does not count; a new one has no labels, it can
        only take pixels from others.

        Raises:
            UserError: no class of the data set is among them.
        """
        self.records("val_list")  # labels are of the data set's own classes, whatever is predicted
        own = self.names.names
        new = [name for name in names.names if name not in own]
        if len(new) == len(names.names):
            raise UserError(f"Test_Finetune.classes: none of its {len(new)} names is a class of {self.config.Train.data_set}, so "
                            f"nothing can be scored; those are {', '.join(own[:8])}{', ...' if len(own) > 8 else ''}")
        self.names = ClassNames((*own, *new), (*self.names.texts, *new))
        self._channels = tuple(self.names.names.index(name) + 1 for name in names.names)

    def target(self, training: bool) -> dict[int, int]:
        return dict.fromkeys(range(self.fold.num_classes + 1), IGNORE) | super().target(training)

    @classmethod
    def transform(cls, config: Config, training: bool) -> Transform:
        train = config.Train
        if not training:
            return KeepTransform(short=train.val_size)
        if train.augment:
            return CropTransform(train.train_h, (train.scale_min, train.scale_max))
        return super().transform(config, training)

    def validation(self) -> Test:
        data = self.images("val_list", training=False)
        return Test("seen and unseen classes" if self.fold.novel else "all classes", data, len(data))
