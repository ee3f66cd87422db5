"""From a config to data sets. No other file knows which keys of a config make which data."""

from pathlib import Path

from torch.utils.data import Dataset

from util.cache import CACHE
from util.config import Config
from util.data import hsnet_splits, replay
from util.data.episodes import EpisodeDataset, EpisodeList, EpisodeSpec, Transform, check_novel
from util.data.folds import ClassNames, Fold, fold_of, read_class_names, read_label_table
from util.data.image_labels import read_image_labels
from util.data.index import Index, Record, build_index, scan
from util.data.manifest import AnyEpisodes, ManifestEpisodes, read_manifest
from util.data.semantic import Masks, SemanticDataset
from util.data.transforms import TrainTransform, ValTransform
from util.errors import UserError


class Source:
    """The data of one fold: its lists, read once, and the resize of its images. Each task builds its samples from them.

    Attributes:
        unit: what a sample is called, "episodes" or "images"; setting: what a result is of, beside the data set.
        clip_patch: patch side of CLIP where the system wants images for it, else None.
    """

    unit: str
    clip_patch: int | None = None

    def __init__(self, config: Config, cache: Path | None = None) -> None:
        self.config, self.cache = config, cache or CACHE
        self._records: dict[str, list[Record]] = {}
        self.fold: Fold = self.folds(config)
        self.names: ClassNames = read_class_names(config.Data.class_names)
        if len(self.names.names) != self.fold.num_classes:
            raise UserError(f"Data.class_names: {config.Data.class_names} names {len(self.names.names)} classes, "
                            f"{config.Train.data_set} has {self.fold.num_classes}")

        table = config.Data.label_table
        self.values = read_label_table(table, self.fold.num_classes) if table else None

    @property
    def setting(self) -> str:
        return f"split {self.config.Train.split}"

    def use_classes(self, names: ClassNames) -> None:
        """Score predictions of other classes; only tasks whose systems take any names can."""
        raise UserError("Test_Finetune.classes: this system predicts the classes of its data set; leave it out")

    @classmethod
    def folds(cls, config: Config) -> Fold:
        """Which classes it has labels of, and which it has not."""
        return fold_of(config)

    def records(self, key: str) -> list[Record]:
        """Return the scanned lines of Data.train_list or Data.val_list, broken ones included; they are read once."""
        if key not in self._records:
            data = self.config.Data
            given = read_image_labels(data.image_labels, self.names) if data.image_labels else None
            self._records[key] = scan(data.data_root, getattr(data, key), self.names, self.cache, skip=data.on_error == "skip",
                                      values=self.values, given=given, masks=self.labelled(key))  # fmt: skip
        return self._records[key]

    def readable(self, key: str) -> list[Record]:
        """Return the records of a list without the broken ones: training learns from what is there."""
        found = [record for record in self.records(key) if not record.broken]
        if not found:
            raise UserError(f"{getattr(self.config.Data, key)}: none of its files can be read; the first: "
                            f"{self.records(key)[0].broken}")
        return found

    @classmethod
    def labelled(cls, key: str) -> bool:
        """Whether the label files of a list are read; else image-level labels are enough."""
        return True

    def masks(self, key: str) -> Masks:
        """Return which label files the samples of a list read."""
        return "all" if self.labelled(key) else "none"

    def training(self) -> Dataset:
        """Return the endless training data: sample i is a pure function of i."""
        raise NotImplementedError

    @classmethod
    def transform(cls, config: Config, training: bool) -> Transform:
        """Return the resize and the augmentation of images."""
        train = config.Train
        if training and train.augment:
            return TrainTransform(train.train_h, train.scale_min, train.scale_max, train.crop)
        if training:
            return ValTransform(train.train_h, squash=True, antialias=train.antialias)
        return ValTransform(train.val_size, squash=train.resized_val, antialias=train.antialias)


class EpisodeSource(Source):
    """Few-shot episodes of a fold."""

    unit = "episodes"

    @property
    def setting(self) -> str:
        return f"split {self.config.Train.split} · {self.config.Train.shot}-shot"

    def index(self, training: bool, base: bool = False) -> Index:
        """Index the images of the fold: base classes (with Train.filter_novel) in training, novel classes in validation.

        `base`: index the base classes of the validation list instead, in images without any novel object.
        Raises UserError for a label of the validation list that cannot be read: which episodes it belongs to is unknown.
        """
        train, minimum, names = self.config.Train, self.config.Data.min_pixels, self.names.names
        if training:
            return build_index(self.readable("train_list"), self.fold.base, train.filter_novel, minimum, names)
        unknown = [record.broken for record in self.records("val_list") if not record.known]
        if unknown:
            raise UserError(f"{unknown[0]}. Which classes {len(unknown)} image(s) of {self.config.Data.val_list} show is unknown "
                            "without their labels, so the episodes of the protocol cannot be drawn, with Data.on_error=skip "
                            "neither; bring the labels back, or take the lines out of the list: that is then another list")
        classes, data, pairs = self.fold.base if base else self.fold.novel, self.config.Data, None
        if data.pair_lists and not base:
            pairs = hsnet_splits.known_pairs(self._listed(), train.data_set, self.records("val_list"), classes)
        return build_index(self.records("val_list"), classes, base, minimum, names, data.support_pixels, pairs)

    def _listed(self) -> hsnet_splits.Pairs:
        """Return HSNet's validation list of the fold."""
        return hsnet_splits.read(Path(self.config.Data.pair_lists), self.config.Train.data_set, "val", self.config.Train.split)

    def listed(self, index: Index, seed: int, shuffle: bool = False) -> EpisodeList:
        """Return the protocol's endless list of episodes over an index."""
        return EpisodeList(index, self.config.Train.shot, seed, shuffle, start=self.config.Train.draw)

    @property
    def count(self) -> int | None:
        """How many episodes a seed of the test has; None: all of a file, or one pass (Test_Finetune.test_num=0)."""
        return None if self.config.Test_Finetune.episodes else self.config.Test_Finetune.test_num or None

    def drawn(self, seed: int) -> EpisodeList:
        """Return the episodes over the novel classes.

        Raises:
            UserError: a novel class has no image. (One without an episode counts as `Test_Finetune.mean` says.)
        """
        episodes = self.listed(self.index(training=False), seed)
        check_novel(episodes, self.fold, self.names)
        return episodes

    def replayed(self, seed: int) -> ManifestEpisodes:
        """Return the episodes of a seed as a published code draws them (Test_Finetune.generator).

        Raises UserError where its draw would not end.
        """
        train, test, index = self.config.Train, self.config.Test_Finetune, self.index(training=False)
        episodes = self.drawn(seed)  # which looks for classes with too few images
        count, classes = self.count or len(episodes), self.fold.novel
        if test.generator == "workers":
            drawn = replay.by_workers(index, train.shot, count, seed, test.draw_workers)
        elif test.generator == "fold":
            drawn = replay.by_fold(index, classes, train.shot, count, seed + train.split)
        elif self.config.Data.pair_lists:  # in the order of the lists
            listed = self._listed()
            drawn = hsnet_splits.draw(listed, train.data_set, classes, train.shot, count, seed)
            return hsnet_splits.as_manifest(drawn, train.data_set, index, train.shot, seed)
        else:
            candidates = replay.Candidates(episodes.pairs, index.supports, classes)
            drawn = replay.by_numpy(candidates, train.draw, train.shot, count, seed)
        return ManifestEpisodes(index, train.shot, seed, [EpisodeSpec(i, *episode) for i, episode in enumerate(drawn)])

    def training(self) -> EpisodeDataset:
        episodes = self.listed(self.index(training=True), self.config.Train.manual_seed, shuffle=True)
        return self._dataset(episodes, self.transform(self.config, training=True), "mask", evaluation=False)

    def validation_episodes(self) -> EpisodeList:
        """Return the episodes that choose the checkpoint, of the classes that Train.selection names."""
        train = self.config.Train
        if train.selection == "base":
            return self.listed(self.index(training=False, base=True), train.manual_seed)
        return self.drawn(train.manual_seed)

    def test_episodes(self) -> dict[int, AnyEpisodes]:
        """Return the episodes of each seed: drawn, or read from the file Test_Finetune.episodes."""
        test = self.config.Test_Finetune
        if not test.episodes and test.generator != "ours":
            return {seed: self.replayed(seed) for seed in test.seeds}
        if not test.episodes:
            return {seed: self.drawn(seed) for seed in test.seeds}
        return read_manifest(test.episodes, self.records("val_list"), self.fold.novel, self.config.Train.shot,
                             repeats=self.config.Train.draw != "image", names=self.names.names,
                             of={"data set": self.config.Train.data_set, "split": self.config.Train.split})  # fmt: skip

    def episodes(self, episodes: AnyEpisodes) -> EpisodeDataset:
        """Return the data set of these episodes for evaluation."""
        return self._dataset(episodes, self.transform(self.config, training=False), self.config.Test_Finetune.ann_type,
                             evaluation=True)  # fmt: skip

    def _dataset(self, episodes: AnyEpisodes, transform: Transform, ann_type: str, evaluation: bool) -> EpisodeDataset:
        return EpisodeDataset(
            episodes, self.fold, self.config.Data.data_root, transform, num_classes=self.fold.num_classes,
            clip_size=self.config.CLIP.clip_size if self.clip_patch else None, patch=self.clip_patch or 1,
            ann_type=ann_type, evaluation=evaluation, values=self.values,
        )  # fmt: skip


class ImageSource(Source):
    """Single images with their labels: the base classes of a fold, all else background.

    Attributes:
        channels: class of each channel that a system predicts; 0 is the background.
    """

    unit = "images"

    @property
    def channels(self) -> tuple[int, ...]:
        return self.channels_of(self.fold)

    @classmethod
    def channels_of(cls, fold: Fold) -> tuple[int, ...]:
        """Return the channels of a system for these classes."""
        return (0, *fold.base)

    def target(self, training: bool) -> dict[int, int]:
        """Map each class to its channel, or to 255 where it does not count; classes without an entry are background."""
        return {cls: channel for channel, cls in enumerate(self.channels)}

    def training(self) -> SemanticDataset:
        return self.images("train_list", training=True)

    def images(self, key: str, training: bool) -> SemanticDataset:
        """Every image of Data.train_list or Data.val_list."""
        records = self.readable(key) if training else self.records(key)
        return SemanticDataset(
            records, self.target(training), self.fold.num_classes, self.config.Data.data_root,
            self.transform(self.config, training), self.config.Train.manual_seed, evaluation=not training, values=self.values,
            masks=self.masks(key),
        )  # fmt: skip
