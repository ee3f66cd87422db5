"""Properties of the way from an index to a score, on random data: folds, episodes, manifests, masks, metrics, intervals."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.make import restore
from tests.make.runs import check
from util.data.episodes import EpisodeList
from util.data.folds import fold
from util.data.index import Index, Record, build_index
from util.data.loading import RangeSampler
from util.data.manifest import read_manifest, write_manifest
from util.data.transforms import ValTransform, bbox_mask
from util.errors import UserError
from util.run.distributed import Context
from util.score.metrics import FewShotMeter, SemanticMeter
from util.score.statistics import bootstrap, pooled
from util.score.table import COLUMNS, read_episodes


def arrays(values: Sequence[int], low: int = 1, high: int = 12) -> st.SearchStrategy[np.ndarray]:
    """H W uint8, sides low..high, drawn from a seed: as many values as a label has cost Hypothesis too much."""

    def make(height: int, width: int, cell: int, seed: int) -> np.ndarray:
        coarse = np.random.default_rng(seed).choice(np.array(values, np.uint8), (-(-height // cell), -(-width // cell)))
        return coarse.repeat(cell, 0).repeat(cell, 1)[:height, :width]

    side = st.integers(low, high)
    return st.builds(make, side, side, st.integers(1, 4), st.integers(0, 2**32))


def record(name: str, label: np.ndarray) -> Record:
    values = [int(v) for v in np.unique(label) if v not in (0, 255)]
    return Record(f"{name}.jpg", f"{name}.png", *label.shape, {v: int((label == v).sum()) for v in values}, tuple(values))


@st.composite
def indices(draw: st.DrawFn) -> Index:
    """An index over classes 1 to 3 of up to 12 images."""
    labels = draw(st.lists(arrays((0, 1, 2, 3, 255), low=4), min_size=draw(st.sampled_from([1, 8])), max_size=12))
    records = [record(str(i), label) for i, label in enumerate(labels)]
    return build_index(records, (1, 2, 3), only=False, min_pixels=draw(st.integers(1, 12)))


# ---- which images, which episodes


@check(150)
@given(st.lists(arrays((0, *range(1, 21), 255)), max_size=8), st.integers(0, 3), st.booleans(), st.integers(1, 12))
def test_fold_index_is_the_rule_of_the_paper(labels: list[np.ndarray], split: int, training: bool, least: int) -> None:
    """Training: no other class however small, and one class that counts. Testing: one novel class that counts."""
    novel = set(range(5 * split + 1, 5 * split + 6))
    wanted = set(range(1, 21)) - novel if training else novel
    found = fold("pascal", split)
    index = build_index([record(str(i), label) for i, label in enumerate(labels)], found.base if training else found.novel,
                        only=training, min_pixels=least)  # fmt: skip
    expected, present = {c: [] for c in wanted}, []
    for i, label in enumerate(labels):
        shown = {int(v) for v in label.ravel()} - {0, 255}
        counting = [c for c in wanted if (label == c).sum() >= least]
        if not counting or (training and not shown <= wanted):
            continue
        present.append(tuple(sorted(shown & wanted)))
        for c in counting:
            expected[c].append(f"{i}.jpg")
    assert {c: [index.records[p].image for p in filed] for c, filed in index.by_class.items()} == expected
    assert index.present == present and len(index.records) == len(present)


@check(150)
@given(indices(), st.integers(1, 3), st.integers(0, 2**31), st.booleans(), st.randoms(use_true_random=False))
def test_episodes(index: Index, shot: int, seed: int, shuffle: bool, rng) -> None:
    """Legal, a pure function of the number in any order of asking; too few images are an error and only then."""
    short = [c for present in index.present for c in present if len(index.by_class[c]) <= shot]
    if short or not index.records:
        with pytest.raises(UserError):
            EpisodeList(index, shot, seed, shuffle)
        return
    numbers = [*range(2 * len(index.records)), 10**9]
    asked = rng.sample(numbers, len(numbers)) + rng.sample(numbers, len(numbers))
    episodes = EpisodeList(index, shot, seed, shuffle)
    specs = {i: episodes.spec(i) for i in asked}
    assert all(EpisodeList(index, shot, seed, shuffle).spec(i) == specs[i] == episodes.spec(i) for i in numbers)
    for i, spec in specs.items():
        assert spec.number == i and spec.cls in index.present[spec.query]
        assert len({spec.query, *spec.supports}) == shot + 1 and set(spec.supports) <= set(index.by_class[spec.cls])
    for start in (0, len(index.records)):
        queries = [specs[start + k].query for k in range(len(index.records))]
        assert sorted(queries) == list(range(len(index.records))) and (shuffle or queries == sorted(queries))


@check(100)
@given(st.integers(0, 50), st.integers(0, 60), st.integers(1, 6), st.integers(1, 5))
def test_every_number_of_processes_sees_the_same_batches(start: int, count: int, share: int, world: int) -> None:
    def batches(world: int, batch: int, drop: bool) -> list[list[int]]:
        contexts = (Context(torch.device("cpu"), rank, world) for rank in range(world))
        steps: dict[int, list[int]] = {}
        for context in contexts:
            for rows in RangeSampler(start, start + count, batch, context, drop):
                steps.setdefault((rows[0] - start) // batch, []).extend(rows)
        return [steps[k] for k in sorted(steps)]

    for drop in (False, True):
        assert batches(world, share * world, drop) == batches(1, share * world, drop)
    assert sum(batches(world, share * world, drop=False), []) == list(range(start, start + count))


RECORDS = [Record(f"images/{n}.jpg", f"{n}.png", 9, 9, {1: 3000, 2: 4000} if n % 3 else {1: 9000}, (1, 2)) for n in range(9)]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory):
    """A manifest of two seeds, its bytes, and its episodes by image name."""
    path = tmp_path_factory.mktemp("manifest") / "episodes.txt"
    index = build_index(RECORDS, (1, 2), only=False)
    lists = {seed: EpisodeList(index, 2, seed) for seed in (7, 321)}
    write_manifest(path, {"data set": "pascal", "shot": "2"}, lists, 12)
    return path, path.read_bytes(), named(lists, 12)


def named(lists, count: int | None = None) -> dict[int, list[tuple]]:
    def one(episodes, i: int) -> tuple:
        spec = episodes.spec(i)
        return spec.number, spec.cls, *(episodes.index.records[p].image for p in (spec.query, *spec.supports))

    return {seed: [one(e, i) for i in range(len(e) if count is None else count)] for seed, e in lists.items()}


def test_manifest_round_trip(manifest) -> None:
    path, _, episodes = manifest
    assert named(read_manifest(path, RECORDS, (1, 2), 2)) == episodes


@check(200)
@given(st.data())
def test_manifest_with_one_byte_changed(manifest, data: st.DataObject) -> None:
    """A byte that is changed, lost or added is refused, or does not matter (in a comment, a zero before a number)."""
    path, content, episodes = manifest
    at = data.draw(st.integers(0, len(content) - 1), label="position")
    new = data.draw(st.one_of(st.binary(max_size=1), st.sampled_from([b"#", b" ", b"\n", b"0", b"3", b"_", b"+"])), label="new")
    keep = data.draw(st.booleans(), label="insert")
    path.write_bytes(content[:at] + new + content[at + (not keep) :])
    try:
        found = read_manifest(path, RECORDS, (1, 2), 2)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert named(found) == episodes
    finally:
        path.write_bytes(content)


# ---- masks and their way back


@check(200)
@given(arrays((0, 1, 255), high=24))
def test_boxes_equal_scipy(mask: np.ndarray) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    expected = np.zeros_like(mask)
    parts, _ = ndimage.label(mask == 1, structure=np.ones((3, 3)))
    for box in ndimage.find_objects(parts):
        expected[box] = 1
    expected[mask == 255] = 255
    np.testing.assert_array_equal(bbox_mask(mask), expected)


@check(200)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([33, 64, 97]), st.booleans(), st.booleans(), st.floats(0, 1))
def test_label_goes_to_the_network_and_back(height: int, width: int, size: int, squash: bool, across: bool, at: float) -> None:
    """A cut through the file is found again within 1.5 cells of the network's grid, and the padding of a letterbox stays out.

    A letterbox rounds both sides down to multiples of 8, as published, and nothing undoes that: so many cells more are lost.
    """
    hw = np.array([height, width])
    label = np.zeros(hw, np.uint8)
    cut = round(at * hw[int(across)])
    label[(slice(None), slice(cut, None)) if across else slice(cut, None)] = 1
    (small,) = ValTransform(size, squash)(None, np.zeros((*hw, 3), np.float32), [label])[2]
    content = np.array([size, size]) if squash else np.maximum(hw * size // max(hw) // 8 * 8, 8)
    assert (small != 255).sum() == content.prod()
    scores = np.stack([small == 0, small == 1, small == 255])
    back = restore(torch.from_numpy(scores).half(), (height, width), squash)
    assert back.shape == (3, height, width) and back.dtype == torch.float32

    scale = size / (hw if squash else hw.max())
    off = (abs(hw * scale - content) + 1.5) / scale + 0.5  # pixels of the file
    row, column = np.indices(hw) + 0.5
    sure = abs((column if across else row) - cut) > off[int(across)]
    if not squash:
        sure &= (row < height - off[0]) & (column < width - off[1])
    np.testing.assert_array_equal(back.argmax(0).numpy()[sure], label[sure])


# ---- scores

counted = st.tuples(arrays((0, 1), 6, 6), arrays((0, 1, 255), 6, 6), st.sampled_from([3, 8]))


@check(60)
@given(st.lists(counted, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_few_shot_scores_are_those_of_torchmetrics(episodes: list[tuple], rng) -> None:
    """... and a sum over shards, in any order, is the whole."""
    jaccard = pytest.importorskip("torchmetrics.functional.classification").multiclass_jaccard_index
    whole, shards = FewShotMeter([3, 8]), [FewShotMeter([3, 8]) for _ in range(3)]
    tensors = [(torch.from_numpy(pred), torch.from_numpy(truth), cls) for pred, truth, cls in episodes]
    for pred, truth, cls in tensors:
        whole.update(pred, truth, cls)
    for pred, truth, cls in rng.sample(tensors, len(tensors)):
        rng.choice(shards).update(pred, truth, cls)
    total = FewShotMeter([3, 8])
    for shard in shards:
        total.merge(shard)
    assert torch.equal(total.state, whole.state)

    def ious(rows: list[tuple]) -> list[float]:
        pred, truth = (torch.cat([row[k].flatten() for row in rows]) for k in (0, 1))
        return jaccard(pred, truth, num_classes=2, ignore_index=255, average="none").tolist()

    by_class = {c: [row for row in tensors if row[2] == c] for c in (3, 8)}
    if not all(any(((p == 1) | (t == 1))[t != 255].any() for p, t, _ in rows) for rows in by_class.values()):
        with pytest.raises(UserError, match="undefined"):
            whole.result()
        return
    result, expected = whole.result(), {c: ious(rows)[1] for c, rows in by_class.items()}
    background, foreground = ious(tensors)
    if not any(((p == 0) | (t == 0))[t != 255].any() for p, t, _ in tensors):
        background = 1.0  # no such pixel anywhere: torchmetrics calls it 0
    assert result["per_class"] == pytest.approx(expected) and result["miou"] == pytest.approx(sum(expected.values()) / 2)
    assert (result["fg_iou"], result["fb_iou"]) == pytest.approx((foreground, (foreground + background) / 2))


@check(60)
@given(st.lists(st.tuples(arrays(range(5), 7, 7), arrays((*range(5), 255), 7, 7)), min_size=1, max_size=4))
def test_semantic_scores_are_those_of_torchmetrics(images: list[tuple]) -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    meter = SemanticMeter(range(5))
    for pred, truth in images:
        meter.update(torch.from_numpy(pred), torch.from_numpy(truth))
    pred, truth = (torch.cat([torch.from_numpy(image[k]).flatten() for image in images]) for k in (0, 1))
    seen = sorted(set(truth[truth != 255].tolist()) | set(pred[truth != 255].tolist()))
    if not any(seen):
        with pytest.raises(UserError, match="no class but background"):
            meter.result()
        return
    counts = functional.multiclass_confusion_matrix(pred, truth, num_classes=5, ignore_index=255)
    assert torch.equal(meter.state, counts)  # rows are the truth
    result = meter.result()
    ious = functional.multiclass_jaccard_index(pred, truth, num_classes=5, ignore_index=255, average="none").tolist()
    assert result["per_class"] == {c: pytest.approx(ious[c]) if c in seen else None for c in range(5)}
    assert result["background_miou"] == pytest.approx(np.mean([ious[c] for c in seen]))
    accuracy = functional.multiclass_accuracy(pred, truth, num_classes=5, ignore_index=255, average="micro")
    assert result["pixel_accuracy"] == pytest.approx(float(accuracy))


@st.composite
def results(draw: st.DrawFn) -> list[list[int]]:
    """Rows of a report: classes 1 to 3, queries that come back, any counts."""
    rows = []
    for number in range(draw(st.integers(1, 40))):
        union, background = draw(st.integers(1, 500)), draw(st.integers(0, 500))
        hits = draw(st.integers(0, union)), draw(st.integers(0, background))
        rows.append([321, number, draw(st.integers(1, 3)), hits[0], union, hits[1], background, draw(st.integers(0, 9))])
    return rows


@check(60)
@given(results(), st.integers(0, 99), st.randoms(use_true_random=False))
def test_bootstrap_intervals(rows: list[list[int]], seed: int, rng) -> None:
    """They hold the score, stay within 0..1, and do not depend on the order of the rows."""

    def read(rows: list[list[int]]):
        lines = [" ".join(map(str, row)) for row in rows]
        return read_episodes({"episodes": {"hash": "x", "columns": " ".join([*COLUMNS, "query"]), "rows": lines}})

    found, scores = bootstrap(read(rows), 200, seed), pooled(read(rows))
    assert bootstrap(read(rng.sample(rows, len(rows))), 200, seed) == found
    for low, high in found.pop("per_class").values():
        assert -1e-12 <= low <= high <= 1 + 1e-12
    for key, (low, high) in found.items():
        assert -1e-12 <= low <= high <= 1 + 1e-12 and low - 1e-9 <= scores[key] <= high + 1e-9
