"""Large pictures through overlapping windows: no seams, one row of windows in memory, small pictures as before."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.predict.predictor import Predictor
from model.predict.tiles import Windows, blended
from tests.make import ROOT, make, star, upright
from util.errors import UserError
from util.photos.reading import Photo


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("hw", "tile"), [((300, 517), 128), ((90, 700), 256), ((257, 256), 256), ((64, 64), 64), ((1, 9), 4)])
def test_windows_that_agree_give_the_picture(hw: tuple[int, int], tile: int) -> None:
    """Scores that depend on the pixel alone come back as they are, every row once and no more rows at once than a window has."""
    whole, seen = torch.randn(3, *hw), []

    def scores(top: int, left: int, height: int, width: int) -> Tensor:
        seen.append((top, left))
        assert (height, width) == (min(hw[0], tile), min(hw[1], tile))
        return whole[:, top : top + height, left : left + width]

    strips = [(top, strip.clone()) for top, strip in blended(hw, tile, scores)]
    assert [top for top, _ in strips] == np.cumsum([0, *(strip.shape[1] for _, strip in strips)])[:-1].tolist()
    assert max(strip.shape[1] for _, strip in strips) <= tile and len(set(seen)) == len(seen)
    torch.testing.assert_close(torch.cat([strip for _, strip in strips], 1), whole, atol=1e-5, rtol=1e-5)


def test_no_seam() -> None:
    """Windows that disagree as far as they can, by a slope of 8 from border to border: the score has no step where one begins."""
    side, hw = 256, (256, 900)
    slope = torch.linspace(-4, 4, side).expand(1, side, side)
    (_, strip), = blended(hw, side, lambda *window: slope)
    steps = strip[0, 0].sigmoid().diff().numpy()
    borders = [x for start in Windows.along(hw[1], side).starts for x in (start, start + side) if 0 < x < hw[1]]
    assert len(borders) == 8
    assert all(abs(steps[x - 1] - (steps[x - 2] + steps[x]) / 2) < 1e-3 for x in borders)
    assert np.abs(steps).max() < 0.05


@pytest.mark.parametrize("arch", ["HDMNet", "HSNet"])
def test_predictor_through_windows(arch: str, scenes: Path, tmp_path: Path) -> None:
    """One window is the whole picture, bit for bit; where all windows see the same, the result repeats with them."""
    predictor = Predictor.from_checkpoint(make(tmp_path, arch, "Train.val_size=65")[1])
    images, masks = star(scenes, of=3)
    predictor.set_support(images[:2], masks[:2])
    before = predictor.predict(images[2])
    predictor.set_tiles(max(before.mask.shape))
    same = predictor.predict(images[2])
    assert np.array_equal(same.score, before.score) and np.array_equal(same.mask, before.mask)
    assert same.maps.keys() == before.maps.keys()

    piece = upright(np.random.default_rng(0), (48, 48))
    picture = np.tile(piece, (1, 4, 1))[:, :160]  # windows of 64 begin at 0, 48, 96: each shows the same
    predictor.set_tiles(64)
    found, window = predictor.predict(picture), predictor.predict(picture[:, :64])
    assert found.mask.shape == found.score.shape == (48, 160) and found.maps == {} and found.score.dtype == np.float32
    np.testing.assert_allclose(found.score[:, 20:44], window.score[:, 20:44], atol=1e-5)  # where there is one window alone
    np.testing.assert_allclose(found.score[:, 48:64], found.score[:, 96:112], atol=1e-5)
    assert np.array_equal(found.mask[:, 20:44], window.mask[:, 20:44])
    assert window.score.std() > 1e-5
    predictor.set_tiles(None)
    assert not np.array_equal(predictor.predict(picture).score, found.score)


def test_wrong_tiles(piclip: Path) -> None:
    predictor = Predictor.from_checkpoint(piclip)
    for tile, message in ((0, "must be positive"), (-3, "must be positive"), (7, r"than a patch of the network \(8 pixels")):
        with pytest.raises(UserError, match=message):
            predictor.set_tiles(tile)
    predictor.set_tiles(8)
    predictor.set_support(text="star")
    with pytest.raises(UserError, match="windows need supports"):
        predictor.predict(Photo(np.zeros((20, 20, 3), np.uint8), "black"))
