"""util/causes and util/priors: why episodes fail, and how good the priors are alone, from whole counts."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.make import placed, restore
from util.errors import UserError
from util.run.distributed import Context
from util.score.causes import CAUSES, NAMES, Spread, causes, examples, spread, tally
from util.score.metrics import FewShotMeter
from util.score.priors import THRESHOLDS, PriorMeter

CLS, OTHER, THIRD = 3, 7, 5
LABEL = np.zeros((20, 40), np.uint8)  # 100 pixels of the object, 100 and 50 of others, 20 that do not count
LABEL[:10, :10], LABEL[:10, 20:30], LABEL[10:15, 20:30], LABEL[19, :20] = CLS, OTHER, THIRD, 255


def boxes(*slices: tuple[slice, slice]) -> np.ndarray:
    pred = np.zeros_like(LABEL)
    for box in slices:
        pred[box] = 1
    return pred


def cause(pred: np.ndarray) -> tuple[str, Spread]:
    truth = np.where(LABEL == 255, 255, LABEL == CLS).astype(np.uint8)
    counts = FewShotMeter([CLS]).update(torch.from_numpy(pred), torch.from_numpy(truth), CLS)
    where = spread(torch.from_numpy(pred), torch.from_numpy(LABEL), CLS)
    return NAMES[causes(np.array([counts]), np.array([where]))[0]], where


@pytest.mark.parametrize(
    ("pred", "name", "where"),
    [
        (boxes((slice(0, 10), slice(0, 10))), "found", (100, 0, 0)),
        (boxes((slice(0, 10), slice(0, 5))), "found", (50, 0, 0)),  # the IoU is one half
        (boxes(), "missed", (0, 0, 0)),
        (boxes((slice(0, 1), slice(0, 9))), "missed", (9, 0, 0)),
        (boxes((slice(19, 20), slice(0, 20))), "missed", (0, 0, 0)),  # all where nothing counts
        (boxes((slice(0, 10), slice(20, 30))), "confused", (100, 100, OTHER)),
        (boxes((slice(8, 15), slice(20, 30))), "confused", (70, 70, THIRD)),  # 20 and 50 pixels of the two
        (boxes((slice(0, 10), slice(0, 10)), (slice(0, 15), slice(20, 30))), "confused", (250, 150, OTHER)),
        (boxes((slice(0, 10), slice(30, 40))), "false alarm", (100, 0, 0)),
        (boxes((slice(0, 10), slice(6, 16))), "false alarm", (100, 0, 0)),
        (boxes((slice(0, 19), slice(0, 16))), "too much", (304, 0, 0)),
        (boxes((slice(0, 10), slice(25, 35))), "confused", (100, 50, OTHER)),  # exactly half
        (boxes((slice(0, 1), slice(0, 10))), "part", (10, 0, 0)),  # exactly a tenth
        (boxes((slice(0, 4), slice(0, 10))), "part", (40, 0, 0)),
        (boxes((slice(0, 4), slice(0, 12))), "part", (48, 0, 0)),
    ],
)
def test_the_rule_on_masks(pred, name, where):
    assert cause(pred) == (name, where)


def table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns cls, counts, spread of 200 episodes with masks of random boxes."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        label = np.zeros((16, 16), np.uint8)
        pred = np.zeros_like(label)
        for value in (9, 4, CLS):
            y, x = rng.integers(0, 10, 2)
            label[y : y + 6, x : x + 6] = value
        y, x, h, w = rng.integers(0, 13, 4)
        pred[y : y + h + 1, x : x + w + 1] = 1
        counts = FewShotMeter([CLS]).update(torch.from_numpy(pred), torch.from_numpy(label == CLS).byte(), CLS)
        rows.append([rng.integers(1, 4), *counts, *spread(torch.from_numpy(pred), torch.from_numpy(label), CLS)])
    rows = np.array(rows)
    return rows[:, 0], rows[:, 1:5], rows[:, 5:]


def test_tally_is_the_sum_of_its_parts():
    cls, counts, spreads = table()
    whole = tally(cls, counts, spreads)
    assert sum(whole["counts"].values()) == 200 and all(whole["counts"].values())  # every cause is among them
    for name in CAUSES:
        assert whole["counts"][name] == sum(n[name] for n in whole["per_class"].values())
    assert set(whole["confused"]) == {4, 9} and sum(whole["confused"].values()) == whole["counts"]["confused"]
    assert all(a >= b for a, b in pairwise(whole["confused"].values()))
    order = np.random.default_rng(1).permutation(200)
    assert tally(cls[order], counts[order], spreads[order]) == whole


def test_examples_show_their_cause():
    _, counts, spreads = table()
    found, names = examples(counts, spreads), [NAMES[i] for i in causes(counts, spreads)]
    assert list(found) == list(NAMES[1:]) and all(len(set(at)) == 2 for at in found.values())
    assert all(names[i] == name for name, at in found.items() for i in at)
    others = examples(counts, spreads, without=sum(found.values(), []))
    assert not set(sum(found.values(), [])) & set(sum(others.values(), []))
    assert examples(counts[:1], spreads[:1]) == {name: [0] if name == names[0] else [] for name in NAMES[1:]}


@pytest.mark.parametrize("squash", [True, False])
def test_one_histogram_serves_all_thresholds(squash):
    generator = torch.Generator().manual_seed(2)
    meter = PriorMeter([4, 6])
    plain = [FewShotMeter([4, 6]) for _ in THRESHOLDS]
    for i in range(6):
        cls, size = (4, 6)[i % 2], (20 + i, 30 - i)
        prior = torch.rand(7, 7, generator=generator)
        truth = torch.randint(0, 3, size, generator=generator).byte()
        truth[truth == 2] = 255
        meter.update({"a new prior": prior}, truth, cls, placed(size, squash))  # of whatever name
        for threshold, one in zip(THRESHOLDS, plain, strict=True):
            one.update((restore(prior[None], size, squash)[0] > threshold).long(), truth, cls)
    found = meter.result(Context(torch.device("cpu")))
    assert list(found) == ["a new prior"] and found["a new prior"] == pytest.approx([one.result()["miou"] for one in plain])
    assert len(set(found["a new prior"])) == 9


def test_a_threshold_is_exceeded_not_reached():
    meter, truth = PriorMeter([1]), torch.tensor([[1, 1, 0, 0]], dtype=torch.uint8)
    meter.update({"vvp": torch.tensor([[0.5, 0.51, 0.5, 0.0]])}, truth, 1, placed((1, 4), True))
    (found,) = meter.result(Context(torch.device("cpu"))).values()
    assert found == pytest.approx([2 / 3] * 4 + [1 / 2] + [0] * 4)


def test_priors_that_are_not_numbers_or_leave_the_range():
    meter, truth = PriorMeter([1]), torch.ones(4, 4, dtype=torch.uint8)
    with pytest.raises(UserError, match="not finite"):
        meter.update({"vvp": torch.full((3, 3), float("nan"))}, truth, 1, placed((4, 4), True))
    meter.update({"vvp": torch.full((3, 3), 7.0)}, truth, 1, placed((4, 4), True))
    assert meter.result(Context(torch.device("cpu"))) == {"vvp": [1.0] * 9}
    assert PriorMeter([1]).result(Context(torch.device("cpu"))) == {}
