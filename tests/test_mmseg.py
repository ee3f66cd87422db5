"""Our dense scores against mmsegmentation's own `IoUMetric`, where it is installed (extra `mmseg` in pyproject.toml)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from util.data.transforms import read_label
from util.errors import UserError
from util.score.metrics import SemanticMeter

HINT = "mmsegmentation is not installed: pip install mmcv-lite==2.1.0 mmengine==0.10.7 mmsegmentation==1.2.2"
IoUMetric = pytest.importorskip("mmseg.evaluation.metrics", reason=HINT).IoUMetric


def compare(pairs: list[tuple[Tensor, Tensor]], classes: int) -> int:
    """Compares all scores of (prediction, truth) pairs; returns how many classes neither has."""
    meter, metric = SemanticMeter(range(classes)), IoUMetric()
    metric.dataset_meta = {"classes": [str(c) for c in range(classes)]}
    for pred, truth in pairs:
        meter.update(pred, truth)
        metric.process({}, [{"pred_sem_seg": {"data": pred[None]}, "gt_sem_seg": {"data": truth[None]}}])
    theirs = metric.total_area_to_metrics(*(sum(areas) for areas in zip(*metric.results, strict=True)))
    shown = metric.compute_metrics(metric.results)  # per cent, to two digits
    ours = meter.result()
    iou = np.array([np.nan if ours["per_class"][c] is None else ours["per_class"][c] for c in range(classes)])
    np.testing.assert_allclose(iou, theirs["IoU"], rtol=1e-6)  # theirs are float32; nan where a class is in neither
    np.testing.assert_allclose(ours["background_miou"], np.nanmean(theirs["IoU"]), rtol=1e-6)
    np.testing.assert_allclose(ours["miou"], np.nanmean(theirs["IoU"][1:]), rtol=1e-6)
    np.testing.assert_allclose(ours["pixel_accuracy"], theirs["aAcc"], rtol=1e-6)
    assert shown["mIoU"] == pytest.approx(100 * ours["background_miou"], abs=0.0051)
    assert shown["aAcc"] == pytest.approx(100 * ours["pixel_accuracy"], abs=0.0051)
    return int(np.isnan(iou).sum())


@pytest.mark.parametrize("seed", range(20))
def test_random_label_maps(seed: int) -> None:
    """1 to 4 images of a size each, 2 to 40 classes of which some appear in none, up to all but one pixel ignored."""
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 41))
    used = np.sort(rng.choice(classes, int(rng.integers(1, classes + 1)), replace=False))
    pairs = []
    for _ in range(int(rng.integers(1, 5))):
        height, width = rng.integers(1, 60, 2)
        truth, pred = rng.choice(used, (2, height, width))
        truth[rng.random(truth.shape) < rng.choice([0, 0.2, 0.95])] = 255
        truth[0, 0] = used[-1]
        pairs.append((torch.from_numpy(pred), torch.from_numpy(truth)))
    try:
        absent = compare(pairs, classes)
    except UserError:
        assert used.tolist() == [0]
        return
    assert absent >= classes - len(used)


def test_real_label_maps(voc_mini: Path) -> None:
    """Labels of VOC; the prediction is the label of before, moved, with every third class taken for the next."""
    files = sorted((voc_mini / "SegmentationClassAug").glob("*.png"))[:60]
    pairs = []
    for file in files:
        truth = read_label(file).astype(np.int64)
        pred = np.roll(np.where(truth == 255, 0, truth), (5, -9), (0, 1))
        pred = np.where((pred % 3 == 1) & (pred < 20), pred + 1, pred)
        pairs.append((torch.from_numpy(pred), torch.from_numpy(truth)))
    compare(pairs, 21)
    assert len(pairs) >= 20
