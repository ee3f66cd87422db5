"""util/data: episodes and the base learner's items, from an index to a batch."""

from collections import Counter
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.make import abstract_index
from util.data.episodes import (
    Episode,
    EpisodeDataset,
    EpisodeList,
    EpisodeSpec,
    collate,
    draw,
    generator,
    permutation,
)
from util.data.folds import fold, read_class_names
from util.data.index import Record, build_index, scan
from util.data.semantic import SemanticDataset
from util.data.transforms import TrainTransform, ValTransform, read_label, worker_init
from util.errors import UserError

VOC = read_class_names(Path(__file__).resolve().parents[1] / "lists/pascal/classes.txt")

# Never change these: they are the episodes of every result ever reported.
PINNED_DRAWS = [920, 326, 751, 412, 793, 549]
PINNED_PERMUTATION = [7, 0, 1, 6, 5, 3, 4, 2]
PINNED_SPECS = [
    EpisodeSpec(number=0, query=0, cls=2, supports=(21, 30, 9, 15, 33)),
    EpisodeSpec(number=39, query=39, cls=2, supports=(3, 30, 12, 24, 6)),
    EpisodeSpec(number=1000, query=0, cls=2, supports=(24, 36, 27, 3, 30)),
]
PINNED_SHUFFLED = [(24, 2, 18), (30, 2, 36), (7, 5, 24)]


@pytest.fixture
def tiny(block, write_voc):
    """12 images of classes 6 (images 0-7) and 15 (images 4-11), a small novel 2 in 11; returns (root, records)."""
    labels = {}
    for n in range(12):
        objects = [(6, 900 + 40 * n)] * (n < 8) + [(15, 950 + 30 * n)] * (n >= 4) + [(2, 20)] * (n == 11)
        labels[f"im{n:02d}"] = block((48 + n, 70 - n), *objects)
    root, list_file = write_voc(labels, xml={"im00": ["bus", "person", "bus"], "im11": ["person", "bicycle"]})
    return root, scan(root, list_file, VOC, root.parent / "cache")


def dataset(tiny, transform=None, shot=2, only=False, shuffle=False, **options) -> EpisodeDataset:
    root, records = tiny
    f = fold("pascal", 0)
    episodes = EpisodeList(build_index(records, f.base, only, min_pixels=500), shot, seed=7, shuffle=shuffle)
    options = {"num_classes": 20, "clip_size": None, "patch": 16, "evaluation": False} | options
    return EpisodeDataset(episodes, f, root, transform or TrainTransform(33, 0.9, 1.1), **options)


# ---- episodes: what they are made of


def test_draws_stay_the_same_for_ever():
    assert [draw(1000, 321, i, "class") for i in range(6)] == PINNED_DRAWS
    assert permutation(8, 321, "pass", 0).tolist() == PINNED_PERMUTATION
    episodes = EpisodeList(abstract_index(40, (2, 5, 9)), shot=5, seed=321)
    assert [episodes.spec(i) for i in (0, 39, 1000)] == PINNED_SPECS
    mixed = EpisodeList(abstract_index(40, (2, 5, 9)), shot=1, seed=321, shuffle=True)
    assert [(s.query, s.cls, *s.supports) for s in map(mixed.spec, range(3))] == PINNED_SHUFFLED


def test_draw_is_uniform():
    counts = Counter(draw(7, 5, i, "x") for i in range(7000))
    assert sorted(counts) == list(range(7)) and all(880 < n < 1120 for n in counts.values())


@pytest.mark.parametrize("shot", [1, 5])
def test_supports_are_distinct_images_of_the_class(shot):
    index = abstract_index(30, (2, 5, 9))
    episodes = EpisodeList(index, shot, seed=0)
    for i in range(300):
        spec = episodes.spec(i)
        assert spec.query == i % 30 and spec.cls in index.present[spec.query]
        assert len({spec.query, *spec.supports}) == shot + 1
        assert set(spec.supports) <= set(index.by_class[spec.cls])


def test_supports_and_classes_are_uniform():
    index = abstract_index(12, (2, 5))  # image 0 shows both classes
    specs = [EpisodeList(index, 2, seed).spec(0) for seed in range(3000)]
    classes = Counter(s.cls for s in specs)
    assert all(1380 < classes[c] < 1620 for c in (2, 5))
    others = [p for p in index.by_class[2] if p != 0]
    supports = Counter(s.supports[1] for s in specs if s.cls == 2)
    expected = classes[2] / len(others)
    assert sorted(supports) == others and all(0.75 * expected < n < 1.25 * expected for n in supports.values())


def test_shuffle_visits_every_query_once_a_pass():
    episodes = EpisodeList(abstract_index(30, (2, 5)), 1, seed=0, shuffle=True)
    passes = [[episodes.spec(i).query for i in range(30 * p, 30 * p + 30)] for p in range(3)]
    assert all(sorted(p) == list(range(30)) for p in passes) and passes[0] != passes[1] != passes[2]


def test_too_few_images_is_an_error_not_a_hang():
    index = abstract_index(9, (2, 5, 9))
    enough = min(map(len, index.by_class.values())) - 1
    EpisodeList(index, enough, seed=0)
    with pytest.raises(UserError, match=rf"class \d has {enough + 1} images.*Train\.shot"):
        EpisodeList(index, enough + 1, seed=0)
    small = Record("s", "s", 9, 9, {2: 5000, 7: 3}, ())  # class 7 can be drawn but is filed nowhere
    with pytest.raises(UserError, match="class 7 has 0 images"):
        EpisodeList(build_index([small] * 5, (2, 7), only=True), 1, seed=0)
    with pytest.raises(UserError, match="no image"):
        EpisodeList(build_index([], (2,), only=True), 1, seed=0)


# ---- episodes: what they hold


class Window(Dataset):
    """The first `n` items of a data set that goes on for ever."""

    def __init__(self, items, n):
        self.items, self.n = items, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.items[i]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_episodes_do_not_depend_on_workers_or_batch_size(tiny):
    items = Window(dataset(tiny, shuffle=True, clip_size="original", evaluation=True), 26)  # more than two passes
    runs = []
    for workers, batch_size in ((0, 1), (2, 3), (4, 2), (2, 26)):
        loader = DataLoader(items, batch_size, num_workers=workers, collate_fn=collate, worker_init_fn=worker_init)
        runs.append(collate(list(loader)))
    for run in runs[1:]:
        for field in fields(Episode):
            assert same(getattr(runs[0], field.name), getattr(run, field.name)), field.name
    assert len(runs[0]) == 26


def test_augmentation_changes_with_episode_seed_and_role(tiny):
    data = dataset(tiny)
    first = data[0]
    assert torch.equal(first.query, data[0].query)
    assert not torch.equal(first.query, data[len(data)].query)  # same image, next pass
    numbers = {generator(s, i, role).random() for s in (0, 1) for i in (0, 1) for role in ("query", "shot/0")}
    assert len(numbers) == 8


def test_shapes_and_types(tiny):
    data = dataset(tiny, shot=3, clip_size="train", evaluation=True)
    batch = collate([data[0], data[11]]).to("cpu", non_blocking=True)
    assert len(batch) == 2 and batch.number.tolist() == [0, 11]
    expected = {
        "query": (2, 3, 33, 33), "query_mask": (2, 33, 33),
        "support": (2, 3, 3, 33, 33), "support_mask": (2, 3, 33, 33),
        "base_label": (2, 33, 33), "cls": (2,), "base_rank": (2,), "present": (2, 20), "annotation_hw": (2, 2),
    }  # fmt: skip
    assert {name: tuple(getattr(batch, name).shape) for name in expected} == expected
    assert batch.query.dtype == batch.support.dtype == torch.float32
    assert {getattr(batch, n).dtype for n in ("query_mask", "support_mask", "base_label")} == {torch.uint8}
    assert batch.present.dtype == torch.bool and batch.cls.dtype == torch.int64
    assert batch.query.min() >= 0 and 200 < batch.query.max() <= 255
    assert [tuple(x.shape) for x in batch.clip_query] == [(3, 48, 48)] * 2  # 33 -> 48
    assert batch.annotation_hw.tolist() == [[33, 33]] * 2
    assert [tuple(x.shape) for x in batch.original_mask] == [(48, 70), (59, 59)]
    assert batch.query_name == ["JPEGImages/im00.jpg", "JPEGImages/im11.jpg"]
    assert [len(names) for names in batch.support_names] == [3, 3]
    training = dataset(tiny)[0]
    assert training.clip_query == training.original_mask == training.original_base == []


def test_labels_of_an_episode(tiny):
    """Fold 0: base ranks (1-based) of 6 and 15 are 1 and 10; class 2 is novel."""
    root, records = tiny
    data = dataset(tiny, ValTransform(64, squash=True), clip_size="original", evaluation=True)
    n = len(data)
    for i in (0, 4, 4 + n, 4 + 2 * n, 11):
        episode, label = data[i], read_label(root / records[i % n].label)
        cls = int(episode.cls)
        base = np.where(label == 6, 1, np.where(label == 15, 10, np.where(label == 255, 255, 0)))
        mask = np.where(label == cls, 1, np.where(label == 255, 255, 0))
        np.testing.assert_array_equal(episode.original_base[0], base)
        np.testing.assert_array_equal(episode.original_mask[0], mask)
        np.testing.assert_array_equal(
            episode.query_mask[0], cv2.resize(mask.astype(np.uint8), (64, 64), interpolation=cv2.INTER_NEAREST)
        )
        assert int(episode.base_rank) == {6: 0, 15: 9}[cls]
        assert episode.annotation_hw.tolist() == [list(label.shape)]
        assert episode.clip_query[0].shape == (3, *(-(-side // 16) * 16 for side in label.shape))
    assert {int(data[4 + k * n].cls) for k in range(12)} == {6, 15}
    present = data[0].present[0].nonzero().flatten() + 1
    assert present.tolist() == [6, 15]  # from the XML; the label shows only 6
    assert (data[11].present[0].nonzero().flatten() + 1).tolist() == [2, 15]
    assert (data[5].present[0].nonzero().flatten() + 1).tolist() == [6, 15]  # no XML: from the label


def test_clip_undoes_the_squash_and_nothing_else(tiny):
    """A crop or a letterbox kept the shape of things: stretching it to the file's size would distort them."""
    for transform in (ValTransform(64, squash=False), TrainTransform(64, 0.9, 1.1, crop=True)):
        episode = dataset(tiny, transform, clip_size="original")[0]
        assert episode.annotation_hw.tolist() == [[64, 64]] and episode.clip_query[0].shape == (3, 64, 64)
    squashed = dataset(tiny, TrainTransform(64, 0.9, 1.1), clip_size="original")[0]
    assert squashed.annotation_hw.tolist() != [[64, 64]]


def test_novel_class_has_no_base_rank(tiny):
    root, records = tiny
    f = fold("pascal", 1)  # class 6 is novel
    episodes = EpisodeList(build_index(records, f.novel, False, 500), 1, 0)
    data = EpisodeDataset(
        episodes, f, root, ValTransform(32, True), num_classes=20, clip_size=None, patch=16, evaluation=True
    )
    episode = data[5]
    assert (int(episode.cls), int(episode.base_rank)) == (6, -1)
    assert sorted(episode.original_base[0].unique().tolist()) == [0, 10, 255]  # 15 is the tenth base class


def test_supports_show_their_class(tiny):
    """Red minus blue of the picture must agree with the mask, through every augmentation, for masks and boxes."""
    data = dataset(tiny, TrainTransform(97, 0.9, 1.1), shot=3)
    for i in range(12):
        episode = data[i]
        for image, mask in zip(episode.support[0], episode.support_mask[0], strict=True):
            seen = mask != 255
            shown = (image[0] > image[2] + 60) & (image[1] < 12 * episode.cls + 6) & (image[1] > 12 * episode.cls - 6)
            assert ((mask == 1) == shown)[seen].float().mean() > 0.9


def test_bbox_annotation(tiny):
    boxed = dataset(tiny, ValTransform(64, True), ann_type="bbox")[4].support_mask
    exact = dataset(tiny, ValTransform(64, True))[4].support_mask
    assert ((boxed == 1) | (exact != 1)).all() and (boxed == 1).sum() > (exact == 1).sum()
    with pytest.raises(UserError, match="Test_Finetune.ann_type.*mask or bbox"):
        dataset(tiny, ann_type="box")
    with pytest.raises(UserError, match="CLIP.clip_size.*original or train"):
        dataset(tiny, clip_size="big")


# ---- the base learner's data


def test_semantic_dataset(tiny):
    root, records = tiny
    target = {c: rank for rank, c in enumerate(fold("pascal", 0).base, start=1)}
    val = SemanticDataset(records, target, 20, root, ValTransform(32, True), seed=3, evaluation=True)
    last = val[11]
    assert last.name == ["JPEGImages/im11.jpg"]
    assert last.image.shape == (1, 3, 32, 32) and last.label.shape == (1, 32, 32)
    label = read_label(root / records[11].label)
    assert (label == 2).any()  # novel: painted background
    np.testing.assert_array_equal(last.original_label[0], np.where(label == 15, 10, np.where(label == 255, 255, 0)))
    train = SemanticDataset(records, target, 20, root, TrainTransform(24, 0.5, 2, crop=True), seed=3, evaluation=False)
    passes = [[train[i].name[0] for i in range(12 * p, 12 * p + 12)] for p in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == [r.image for r in records] and passes[0] != passes[1]
    batches = [
        collate(list(DataLoader(Window(train, 14), b, num_workers=w, collate_fn=collate))) for b, w in ((1, 0), (4, 2))
    ]
    assert same(batches[0].image, batches[1].image) and same(batches[0].label, batches[1].label)
    assert batches[0].original_label == [] and set(batches[0].label.unique().tolist()) <= {0, 1, 10, 255}
