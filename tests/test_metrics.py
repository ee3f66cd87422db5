"""The counts behind every score, against plain numpy and by hand."""

import numpy as np
import pytest
import torch

from tests.make import restore
from util.data.transforms import Placed
from util.errors import UserError
from util.score.metrics import Counts, FewShotMeter, SemanticMeter, confusion


def iou_counts(pred: np.ndarray, truth: np.ndarray, value: int) -> list[int]:
    """Intersection and union of one value, pixel by pixel: the slow oracle."""
    pixels = [(p == value, t == value) for p, t in zip(pred.flat, truth.flat, strict=True) if t != 255]
    return [sum(p and t for p, t in pixels), sum(p or t for p, t in pixels)]


def masks(rng: np.random.Generator, values: int, size: tuple[int, int] = (9, 13)) -> tuple[np.ndarray, np.ndarray]:
    pred = rng.integers(0, values, size).astype(np.uint8)
    return pred, rng.choice([*range(values), 255], size).astype(np.uint8)


def filled(seed: int, episodes: int, meter: FewShotMeter | None = None) -> FewShotMeter:
    rng = np.random.default_rng(seed)
    meter = meter or FewShotMeter([4, 7])
    for i in range(episodes):
        pred, truth = masks(rng, 2)
        meter.update(torch.from_numpy(pred), torch.from_numpy(truth), (4, 7)[i % 2])
    return meter


def test_counts_equal_the_oracle():
    rng, meter = np.random.default_rng(0), FewShotMeter([3, 8])
    expected = np.zeros((2, 2, 2), np.int64)
    for i in range(6):
        pred, truth = masks(rng, 2)
        got = meter.update(torch.from_numpy(pred), torch.from_numpy(truth), (3, 8)[i % 2])
        counts = np.array([iou_counts(pred, truth, 0), iou_counts(pred, truth, 1)])
        expected[i % 2] += counts
        assert got.iou == counts[1, 0] / counts[1, 1]
    assert meter.counts.dtype == torch.int64
    assert meter.counts.tolist() == expected.tolist()


def test_scores_by_hand():
    meter = FewShotMeter([1, 2])
    meter.update(torch.tensor([[1, 1, 0, 1]]), torch.tensor([[1, 0, 0, 255]]), 1)  # fg 1/2, bg 1/2
    meter.update(torch.tensor([[1, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0]]), 2)  # fg 1/3, bg 1/3
    meter.update(torch.tensor([[0, 0, 0, 0]]), torch.tensor([[1, 0, 0, 0]]), 2)  # fg 0/1, bg 3/4
    result = meter.result()
    assert result["per_class"] == {1: 1 / 2, 2: 1 / 4}  # summed over episodes before dividing
    assert result["miou"] == pytest.approx(3 / 8)
    assert result["fg_iou"] == pytest.approx(2 / 6)
    assert result["fb_iou"] == pytest.approx((2 / 6 + 5 / 9) / 2)
    assert (result["episodes"], result["episodes_per_class"]) == (3, {1: 1, 2: 2})


def test_rows_of_a_confusion_are_the_truth():
    assert confusion(torch.tensor([0, 0, 1]), torch.tensor([2, 2, 1]), 3).tolist() == [[0, 0, 0], [0, 1, 0], [2, 0, 0]]
    assert Counts(0, 0, 4, 4).iou == 1 and Counts(1, 4, 0, 0).iou == 0.25  # nothing there and nothing found is right


def test_without_any_background():
    meter = FewShotMeter([1])
    meter.update(torch.tensor([[1, 1, 1, 1]]), torch.tensor([[1, 1, 255, 1]]), 1)
    assert meter.result()["fb_iou"] == 1  # no background in truth or prediction: nothing about it is wrong


def test_state_is_all_that_ranks_must_sum():
    whole = filled(2, 5, filled(1, 4))
    parts = filled(1, 4), filled(2, 5)
    summed = FewShotMeter([4, 7])
    summed.state += parts[0].state + parts[1].state  # what an all-reduce does
    parts[0].merge(parts[1])
    assert whole.result() == parts[0].result() == summed.result()


def test_class_without_episode_is_named():
    meter = FewShotMeter([5, 11])
    meter.update(torch.ones(2, 2), torch.ones(2, 2), 5)
    with pytest.raises(UserError, match=r"class 11\b"):
        meter.result()


@pytest.mark.parametrize("pred, target", [([[2]], [[0]]), ([[0]], [[7]]), ([[-1]], [[1]]), ([[0, 0]], [[0]])])
def test_wrong_values_are_not_counted(pred, target):
    meter = FewShotMeter([1])
    with pytest.raises(ValueError):
        meter.update(torch.tensor(pred), torch.tensor(target), 1)
    assert meter.state.sum() == 0


def test_semantic_equals_the_oracle():
    rng, meter = np.random.default_rng(3), SemanticMeter(range(5))
    pairs = [masks(rng, 4) for _ in range(3)]  # class 4 never appears
    for pred, truth in pairs:
        meter.update(torch.from_numpy(pred), torch.from_numpy(truth))
    pred, truth = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    ious = [i / u for i, u in (iou_counts(pred, truth, c) for c in range(4))]
    result = meter.result()
    assert result["per_class"] == {**dict(enumerate(ious)), 4: None}
    assert result["miou"] == pytest.approx(np.mean(ious[1:]))
    assert result["background_miou"] == pytest.approx(np.mean(ious))
    assert result["pixel_accuracy"] == pytest.approx((pred == truth)[truth != 255].mean())


def test_semantic_without_foreground_is_an_error():
    meter = SemanticMeter(range(3))
    meter.update(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(UserError, match="no class but background"):
        meter.result()


@pytest.mark.parametrize("squash", [True, False])
@pytest.mark.parametrize("hw", [(100, 180), (180, 100), (90, 90)])
def test_rectangle_returns_to_its_place(hw, squash):
    """A rectangle drawn on the network's square, where the resize of the file puts it, is found again in the file."""
    side, (height, width) = 61, hw
    top, bottom, left, right = 0.2 * height, 0.7 * height, 0.3 * width, 0.9 * width
    to_y, to_x = ((side - 1) / (n - 1) for n in (hw if squash else (max(hw), max(hw))))  # align_corners=True
    y, x = torch.arange(side)[:, None] / to_y, torch.arange(side)[None] / to_x
    inside = (y >= top) & (y <= bottom) & (x >= left) & (x <= right)
    logits = torch.stack([torch.zeros_like(inside), inside * 2.0 - 1]).half()
    got = restore(logits, hw, squash)
    assert got.shape == (2, height, width) and got.dtype == torch.float32
    ys, xs = torch.nonzero(got.argmax(0), as_tuple=True)
    edges = torch.stack([ys.min(), ys.max(), xs.min(), xs.max()])
    assert (edges - torch.tensor([top, bottom, left, right])).abs().max() <= 2.5  # one cell of the square
    assert torch.equal(restore(logits[None], hw, squash)[0], got)


def test_corners_stay_corners():
    ramp = torch.linspace(0, 1, 7).expand(1, 7, 7)
    assert torch.allclose(restore(ramp, (5, 10), squash=True)[0, 2], torch.linspace(0, 1, 10))
    assert torch.allclose(restore(ramp, (10, 5), squash=False)[0, 2], torch.linspace(0, 1, 10)[:5])


def test_half_pixel_centres_where_they_are_asked_for():
    """mmsegmentation's way back (align_corners=False): outer cells are flat, and a letterbox is cut as before."""
    ramp = torch.tensor([0.0, 1.0]).expand(1, 2, 2)
    got = Placed((4, 8), (4, 8), corners=False).restore(ramp)
    assert torch.allclose(got[0, 0], torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]))
    assert torch.allclose(Placed((3, 8), (8, 8), corners=False).restore(ramp)[0], got[0, :1].expand(3, 8))
    assert torch.allclose(Placed((8, 3), (8, 8), corners=False).restore(ramp)[0], got[0, :1, :3].expand(8, 3))


def test_seen_and_unseen_by_hand():
    """A class that neither has is in no mean; one that only the prediction has counts as 0."""
    meter = SemanticMeter([0, 3, 5, 8, 9])  # channels 0..4
    meter.update(torch.tensor([1, 1, 1, 2, 3, 0]), torch.tensor([1, 1, 2, 2, 0, 0]))
    found = meter.result(seen=[3, 5, 9], unseen=[8])
    assert found["per_class"] == {0: 1 / 2, 3: 2 / 3, 5: 1 / 2, 8: 0.0, 9: None}
    assert found["miou"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["background_miou"] == pytest.approx((1 / 2 + 2 / 3 + 1 / 2 + 0) / 4)
    assert (found["seen_miou"], found["unseen_miou"], found["hiou"]) == (pytest.approx(7 / 12), 0, 0)
    meter.update(torch.tensor([3, 3]), torch.tensor([3, 3]))
    found = meter.result(seen=[3, 5, 9], unseen=[8])
    assert found["unseen_miou"] == pytest.approx(2 / 3) and found["hiou"] == pytest.approx(2 * 7 / 12 * 2 / 3 / (7 / 12 + 2 / 3))
    assert "hiou" not in meter.result(seen=[3, 5], unseen=[9]) and "hiou" not in meter.result()
