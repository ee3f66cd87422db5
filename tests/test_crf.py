"""The CRF: optional, and what it gives."""

import numpy as np
import pytest
import torch

from util.errors import UserError
from util.score import crf


def test_crf_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydensecrf", None)
    monkeypatch.setitem(__import__("sys").modules, "pydensecrf.densecrf", None)
    with pytest.raises(UserError, match="pip install pydensecrf2"):
        crf.load()


def test_crf_moves_a_border_to_the_edge() -> None:
    pytest.importorskip("pydensecrf.densecrf")
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 200
    probability = np.full((21, 40, 60), 1e-6, np.float32)
    probability[0], probability[7] = 0.3, 0.7
    probability[0, :, :36], probability[7, :, :36] = 0.6, 0.4  # six pixels off
    job = crf.WECLIP.job(torch.from_numpy(image).permute(2, 0, 1).float(), torch.from_numpy(probability).log())
    assert job[2].tolist() == [0, 7]
    label, sure = crf.WECLIP.labels(*job)
    assert (label[:, :30] == 0).all() and (label[:, 30:] == 7).all() and (sure == label).all()


def test_pseudo_labels_are_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crf.Crf, "__call__", lambda self, image, probability: probability)
    probability = np.stack([np.full((2, 2), 0.96), np.array([[0.97, 0.1], [0.2, 0.3]])])
    given = np.zeros((2, 2, 3), np.uint8), probability, np.array([0, 7])
    assert [x.tolist() for x in crf.CLIP_ES.labels(*given)] == [[[7, 0], [0, 0]]] * 2
    half = np.zeros((1, 1, 3), np.uint8), np.full((2, 1, 1), 0.5), np.array([3, 7])
    assert [x.tolist() for x in crf.CLIP_ES.labels(*half)] == [[[3]], [[255]]]
