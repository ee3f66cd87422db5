"""From a config to data sets: the one place that knows which keys make which data."""

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from util.config import Config
from util.data.episodes import EpisodeDataset, EpisodeList, Transform, check_novel
from util.data.folds import ClassNames, Fold, fold_of, read_class_names
from util.data.index import Index, Record, build_index, scan
from util.data.manifest import AnyEpisodes, read_manifest
from util.data.semantic import SemanticDataset
from util.data.transforms import TrainTransform, ValTransform
from util.errors import UserError


@dataclass
class Source:
    """A data set of one fold, ready to give training and validation data.

    Attributes:
        task: "episodes" or "images" (the base learner's).
        clip_patch: patch side of CLIP when the system wants the query for its text prior, else None.
    """

    config: Config
    task: str
    cache: Path
    clip_patch: int | None = None

    def __post_init__(self) -> None:
        train, data = self.config.Train, self.config.Data
        self._records: dict[str, list[Record]] = {}
        self.fold: Fold = fold_of(self.config)
        self.names: ClassNames = read_class_names(data.class_names)
        if len(self.names.names) != self.fold.num_classes:
            raise UserError(f"Data.class_names: {data.class_names} names {len(self.names.names)} classes, "
                            f"{train.data_set} has {self.fold.num_classes}")

    def records(self, key: str) -> list[Record]:
        """Scanned lines of Data.train_list or Data.val_list; read once."""
        if key not in self._records:
            data = self.config.Data
            self._records[key] = scan(data.data_root, getattr(data, key), self.names, self.cache, skip=data.on_error == "skip")
        return self._records[key]

    def index(self, training: bool, base: bool = False) -> Index:
        """Images of the fold: base classes (BAM's filter if asked for) in training, novel classes in validation.

        `base`: base classes of the validation list instead, in images without any novel object.
        """
        train, minimum = self.config.Train, self.config.Data.min_pixels
        if training:
            return build_index(self.records("train_list"), self.fold.base, only=train.filter_novel, min_pixels=minimum)
        classes = self.fold.base if base else self.fold.novel
        return build_index(self.records("val_list"), classes, only=base, min_pixels=minimum)

    def training(self) -> Dataset:
        train, seed = self.config.Train, self.config.Train.manual_seed
        transform: Transform = TrainTransform(
            train.train_h, train.scale_min, train.scale_max, train.rotate_min, train.rotate_max, train.crop
        ) if train.augment else ValTransform(train.train_h, squash=True, antialias=train.antialias)  # fmt: skip
        if self.task == "images":
            return SemanticDataset(self.records("train_list"), self.fold, self.config.Data.data_root, transform, seed, False)
        episodes = EpisodeList(self.index(training=True), train.shot, seed, shuffle=True, start=train.draw)
        return self._episodes(episodes, transform, "mask", False)

    def validation(self) -> Dataset:
        """What chooses the checkpoint: all images for the base learner, else episodes of the classes that
        Train.selection names."""
        train = self.config.Train
        if self.task == "images":
            records = self.records("val_list")
            return SemanticDataset(records, self.fold, self.config.Data.data_root, self._plain(), train.manual_seed, True)
        if train.selection == "base":
            index = self.index(training=False, base=True)
            return self.episodes(EpisodeList(index, train.shot, train.manual_seed, start=train.draw))
        return self.episodes(self.drawn(train.manual_seed, train.val_episodes))

    def test_episodes(self) -> dict[int, AnyEpisodes]:
        """Seed -> its episodes: drawn, or those of the file Test_Finetune.episodes."""
        test = self.config.Test_Finetune
        if not test.episodes:
            return {seed: self.drawn(seed, test.test_num) for seed in test.seeds}
        found = read_manifest(test.episodes, self.records("val_list"), self.fold.novel, self.config.Train.shot,
                              repeats=self.config.Train.draw != "image")  # fmt: skip
        for episodes in found.values():
            check_novel(episodes, self.fold, self.names, len(episodes))
        return found

    def drawn(self, seed: int, count: int) -> EpisodeList:
        """Episodes over the novel classes, of which the first `count` are to be evaluated.

        Raises:
            UserError: a novel class has no image or no episode among them.
        """
        episodes = EpisodeList(self.index(training=False), self.config.Train.shot, seed, start=self.config.Train.draw)
        check_novel(episodes, self.fold, self.names, count)
        return episodes

    def episodes(self, episodes: AnyEpisodes) -> EpisodeDataset:
        """Episodes as evaluation reads them."""
        return self._episodes(episodes, self._plain(), self.config.Test_Finetune.ann_type, True)

    def _plain(self) -> ValTransform:
        train = self.config.Train
        return ValTransform(train.val_size, squash=train.resized_val, antialias=train.antialias)

    def _episodes(self, episodes: AnyEpisodes, transform: Transform, ann_type: str, evaluation: bool) -> EpisodeDataset:
        return EpisodeDataset(
            episodes, self.fold, self.config.Data.data_root, transform, num_classes=self.fold.num_classes,
            clip_size=self.config.CLIP.clip_size if self.clip_patch else None, patch=self.clip_patch or 1,
            ann_type=ann_type, evaluation=evaluation,
        )  # fmt: skip
