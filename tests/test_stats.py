"""util/stats: intervals and comparisons over episodes."""

import copy
import re

import numpy as np
import pytest
import torch

from util.errors import UserError
from util.score.causes import Spread
from util.score.metrics import Counts, FewShotMeter
from util.score.statistics import bootstrap, compare, describe, pooled
from util.score.table import COLUMNS, EpisodeTable, Row, align, read_episodes


def rows(n: int, rng: np.random.Generator, classes: int = 3, gain: float = 0.0) -> np.ndarray:
    """n episodes as rows: IoU about 0.5 + gain, different from class to class."""
    cls = rng.integers(1, classes + 1, n)
    union = rng.integers(500, 3000, n)
    iou = np.clip(rng.beta(4, 4, n) + 0.05 * cls - 0.1 + gain, 0, 1)
    background = rng.integers(3000, 5000, n)
    return np.stack([321 + np.arange(n) % 2, np.arange(n) // 2, cls, (iou * union).astype(int), union,
                     (0.9 * background).astype(int), background], 1)


def result(table: np.ndarray, **extra) -> dict:
    columns = " ".join([*COLUMNS, "query"][: table.shape[1]])
    episodes = {"hash": "abc", "columns": columns, "rows": [" ".join(map(str, row)) for row in table]}
    return {"system": "S", "data_set": "demo", "split": 0, "shot": 1, "checkpoint": "best", "protocol_hash": "f00",
            "protocol": {"name": "published", "resize": "squash"}, "episodes": episodes, **extra}


def test_pooled_scores_are_the_meters():
    rng = np.random.default_rng(0)
    meter, table = FewShotMeter([2, 7]), []
    for number in range(20):
        pred, target = (torch.from_numpy(rng.integers(0, 2, (9, 11))) for _ in range(2))
        before = meter.counts.sum(0).clone()
        meter.update(pred, target, [2, 7][number % 2])
        background, foreground = (meter.counts.sum(0) - before).tolist()
        table.append([321, number, [2, 7][number % 2], *foreground, *background])
    scores = meter.result()
    assert pooled(read_episodes(result(np.array(table)))) == pytest.approx({k: scores[k] for k in ("miou", "fb_iou")})


def test_bootstrap_covers_the_truth():
    """Of 60 runs about 57 intervals hold the score of a very long run; and the width falls with the root of the size."""
    rng = np.random.default_rng(1)
    truth = pooled(read_episodes(result(rows(100_000, rng))))
    runs = [bootstrap(read_episodes(result(rows(300, rng))), resamples=400, seed=i) for i in range(60)]
    for key in ("miou", "fb_iou"):
        assert 50 <= sum(run[key][0] < truth[key] < run[key][1] for run in runs) <= 60
    long = bootstrap(read_episodes(result(rows(4800, rng))), resamples=400)
    width = np.mean([run["miou"][1] - run["miou"][0] for run in runs])
    assert 3.2 < width / (long["miou"][1] - long["miou"][0]) < 4.8


def test_bootstrap_is_deterministic_and_chunked(monkeypatch):
    table = rows(200, np.random.default_rng(2))
    episodes = read_episodes(result(table))
    first = bootstrap(episodes, 300)
    assert first == bootstrap(episodes, 300) == bootstrap(read_episodes(result(table[::-1])), 300) != bootstrap(episodes, 300, 1)
    monkeypatch.setattr("util.score.statistics.CHUNK", 1)  # one resample at a time
    assert bootstrap(episodes, 300) == first


def test_a_rare_class_never_vanishes():
    table = rows(400, np.random.default_rng(3), classes=2)
    table[0, 2:5] = 3, 10, 1000  # the one episode of class 3
    low, high = bootstrap(read_episodes(result(table)), 300)["miou"]
    assert low < pooled(read_episodes(result(table)))["miou"] < high < 0.5  # it counts in each resample with its 1 %


def test_repeated_queries_are_no_new_evidence():
    """Twenty seeds, or twenty passes, over the same 50 images tell as much as one."""
    one = rows(50, np.random.default_rng(4), classes=1)
    one[:, :2] = np.stack([np.full(50, 321), np.arange(50)], 1)
    seeds = np.concatenate([one + [s, 0, 0, 0, 0, 0, 0] for s in range(20)])
    passes = np.concatenate([one + [0, 50 * s, 0, 0, 0, 0, 0] for s in range(20)])
    tables = {"one": one, "seeds": seeds, "passes": np.column_stack([passes, passes[:, 1] % 50]), "blind": passes}
    width = {name: np.diff(bootstrap(read_episodes(result(t)), 1000)["miou"])[0] for name, t in tables.items()}
    assert [width["seeds"], width["passes"]] == pytest.approx([width["one"]] * 2, rel=0.1)
    assert width["blind"] < 0.3 * width["one"]  # why the query column is there


def test_comparison():
    rng = np.random.default_rng(5)
    table = rows(600, rng)
    better = table.copy()
    better[:, 3] = np.minimum(table[:, 4], table[:, 3] + 0.02 * table[:, 4] * (1 + rng.normal(size=600))).clip(0)
    found = compare(result(table), result(better))
    assert found.comparable and found.significant and found.p_value < 0.01
    assert found.interval[0] < found.difference < found.interval[1] < 0.03 and found.interval[0] > 0.01
    back = compare(result(better), result(table))
    assert back.difference == pytest.approx(-found.difference) and back.p_value == found.p_value
    assert "+1.9" in describe(found, result(table), result(better)) or "+2.0" in describe(found, result(table), result(better))
    same = compare(result(table), result(table))
    assert (same.difference, same.p_value, same.significant) == (0, 1, False)
    assert "not significant" in describe(same, result(table), result(table))
    marked = describe(found, result(table), result(better, mark="[random CLIP]"))
    assert [line.endswith("[random CLIP]") for line in marked.splitlines()] == [False, True, False]


def test_significant_where_the_interval_leaves_out_zero():
    """Both are two-sided, so they agree; a one-sided p value would be half as large."""
    rng, close = np.random.default_rng(8), 0
    table = rows(300, rng)
    noise = rng.normal(0, 60, 300)
    for shift in np.linspace(-12, 12, 25):
        other = table.copy()
        other[:, 3] = np.clip(table[:, 3] + noise + shift, 0, table[:, 4])
        found = compare(result(table), result(other), resamples=1000)
        if abs(found.p_value - 0.05) > 0.01:
            assert found.significant == (found.interval[0] * found.interval[1] > 0)
            close += 0.05 < found.p_value < 0.1
    assert close > 1


def test_without_any_background():
    """Where no pixel is background in truth or prediction, its IoU is 1, as in the meter."""
    table = rows(20, np.random.default_rng(9), classes=1)
    table[:, 5:7] = 0
    found = read_episodes(result(table))
    assert pooled(found)["fb_iou"] == pytest.approx((1 + pooled(found)["miou"]) / 2)


def test_no_false_alarms():
    """Two systems of equal worth differ significantly in about 1 of 20 runs."""
    rng = np.random.default_rng(6)
    alarms = 0
    for i in range(80):
        table = rows(200, rng)
        other = table.copy()
        other[:, 3] = np.clip(table[:, 3] + rng.normal(0, 100, 200).astype(int), 0, table[:, 4])
        pair = [result(table), result(other)][:: 1 if i % 2 else -1]
        alarms += compare(*pair, resamples=300, seed=i).significant
    assert alarms <= 12


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"protocol_hash": "bad", "protocol": {"name": "target", "resize": "letterbox"}}, r"published \(f00\).*resize"),
        ({"protocol_hash": "bad", "protocol_parts": {"input resize": "1", "mean": "3"}}, r"\(bad\); other parts: mean$"),
        ({"protocol_hash": "bad"}, r"protocol: published \(f00\) and published \(bad\)"),
        ({"split": 1}, "split: 0 and 1"),
        ({"shot": 5}, "shot: 1 and 5"),
        ({"data_set": "coco"}, "data_set: demo and coco"),
        ({"hash": "def"}, "episodes: 40 of seeds 321, 322"),
        ({"row": "321 0 9 1 2 3 4"}, "rows tell of other episodes"),
    ],
)
def test_not_comparable(change, says):
    a = result(rows(40, np.random.default_rng(7)), protocol_parts={"input resize": "1", "mean": "2"})
    b = copy.deepcopy(a)
    if "hash" in change:
        b["episodes"] |= change
    elif "row" in change:
        b["episodes"]["rows"][0] = change["row"]
    else:
        b |= change
    found = compare(a, b)
    assert not found.comparable and len(found.reasons) == 1
    assert (found.mious, found.difference, found.interval, found.p_value, found.significant) == (None,) * 5
    assert re.search(says, describe(found, a, b))


@pytest.mark.parametrize(
    ("episodes", "says"),
    [
        (None, "older reports"),
        ({"hash": "a", "columns": " ".join(COLUMNS), "rows": []}, "incomplete"),
        ({"columns": " ".join(COLUMNS), "rows": ["1 1 1 1 1 1 1"]}, "incomplete"),
        ({"hash": "a", "columns": "seed number", "rows": ["1 1"]}, "columns 'seed number'"),
        *(({"hash": "a", "columns": " ".join(COLUMNS), "rows": ["1 0 1 1 2 3 4", row]}, "row 2")
          for row in ("1 1 1", "1 1 1 1.5 2 3 4", "1 1 1 3 2 3 4", "1 1 1 0 0 3 4", "1 1 1 1 2 5 4", 7, f"1 1 1 1 {2**70} 3 4")),
        ({"hash": "a", "columns": " ".join(COLUMNS), "rows": ["1 0 1 1 2 3 4"] * 2}, "episode 0 of seed 1 twice"),
    ],
)  # fmt: skip
def test_malformed_episodes(episodes, says):
    given = result(rows(4, np.random.default_rng(8))) | {"episodes": episodes}
    with pytest.raises(UserError, match=says):
        read_episodes(given)
    with pytest.raises(UserError, match=says):
        compare(given, given)


def test_older_report_without_a_protocol_hash():
    given = result(rows(4, np.random.default_rng(9)))
    del given["protocol_hash"]
    with pytest.raises(UserError, match="no protocol hash"):
        compare(given, given)


def dense(rows: dict[tuple[int, int], tuple[int, int]]) -> dict:
    """A result over images: (image, class) -> (intersection, union)."""
    found = [Row(image, cls, image, Counts(hit, union, 90 - union, 90 - hit), Spread(hit, 0, 0))
             for (image, cls), (hit, union) in rows.items()]  # fmt: skip
    return result(np.empty((0, 7)), episodes=EpisodeTable.of("abc", {0: found}, dense=True).to_json())


def test_dense_rows_are_aligned_before_they_are_compared():
    """One prediction finds class 2 where nothing is, the other does not: a row in one, a zero in the other."""
    truth = {(0, 1): (30, 40), (0, 2): (10, 20), (1, 1): (25, 50), (2, 2): (20, 30)}
    more = truth | {(1, 2): (0, 10), (0, 1): (20, 40)}
    a, b = read_episodes(dense(truth)), read_episodes(dense(more))
    one, two = align(a, b)
    assert (len(a), len(b), len(one), len(two)) == (4, 5, 5, 5)
    for left, right in ((one.cls, two.cls), (one.number, two.number), (one.query, two.query)):
        assert np.array_equal(left, right)
    assert one.counts[np.flatnonzero((one.number == 1) & (one.cls == 2))[0]].tolist() == [0, 0, 0, 0]
    assert pooled(one)["miou"] == pooled(a)["miou"] == pytest.approx((55 / 90 + 30 / 50) / 2)
    found = compare(dense(truth), dense(more), resamples=200)
    assert found.comparable and found.mious == pytest.approx(((55 / 90 + 30 / 50) / 2, (45 / 90 + 30 / 60) / 2))
    assert compare(dense(more), dense(truth), resamples=200).difference == pytest.approx(-found.difference)
    with pytest.raises(UserError, match="twice"):
        read_episodes({"episodes": dense(truth)["episodes"] | {"dense": False}})
