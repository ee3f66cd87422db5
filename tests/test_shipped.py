"""The network for photographs that comes along (demo/photos): it loads anywhere, is what its page says, and finds things."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.predict.opening import NAMED
from model.predict.predictor import Predictor
from model.predict.presence import threshold
from tests.make import ROOT, palette_mask
from util.data.index import read_list
from util.data.transforms import read_label
from util.run.checkpoint import read_meta

FILE = ROOT / NAMED["photos"]
EPISODES = 20


def test_its_page_has_its_numbers() -> None:
    meta, page = read_meta(FILE), (FILE.parent / "README.md").read_text()
    mean, sd = meta["result"]["mean"], meta["result"]["sd"]
    assert f"{100 * mean['miou']:.2f} ± {100 * sd['miou']:.2f}" in page and meta["result"]["protocol_hash"] in page
    assert meta["selection"] == "last" and not meta["result"].get("warnings")  # nothing was chosen on what is tested
    assert FILE.stat().st_size < 20 * 2**20


def test_it_works_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    predictor = Predictor.from_checkpoint(device="cpu")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    predictor.set_support(photo, boxes=[50, 40, 200, 250])
    found = predictor.predict(photo)
    page = (FILE.parent / "README.md").read_text()
    assert 0 < predictor.presence(photo) < 1 and f"threshold {threshold(predictor.system)}" in page
    assert found.mask.shape == (300, 400) and np.isfinite(found.score).all() and found.score.std() > 0


@pytest.mark.slow
def test_it_finds_things_it_was_not_trained_on(voc_mini: Path) -> None:
    """Far better than everything foreground, on photographs."""
    predictor = Predictor.from_checkpoint(device="cpu")
    shown: dict[int, list[tuple[str, str]]] = {c: [] for c in predictor.fold.novel}
    for image, label in read_list(ROOT / "lists/pascal_mini/val.txt"):
        for c, pairs in shown.items():
            if (read_label(voc_mini / label) == c).sum() > 5000:
                pairs.append((image, label))
    inside = union = everything = pixels = 0
    for i in range(EPISODES):
        c = predictor.fold.novel[i % 5]
        (support, its_label), (query, truth) = shown[c][i // 5], shown[c][-1 - i // 5]
        predictor.set_support(voc_mini / support, palette_mask(voc_mini / its_label, c))
        found, label = predictor.predict(voc_mini / query).mask, read_label(voc_mini / truth)
        counts = label != 255
        inside += (found & (label == c)).sum()
        union += ((found | (label == c)) & counts).sum()
        everything, pixels = everything + (label == c).sum(), pixels + counts.sum()
    assert inside / union > 1.6 * everything / pixels
