"""Large pictures by overlapping windows: scores of every window, blended with weights that fall to zero at its borders.

The windows stand on a grid: a weight is the product of one for the row and one for the column, and both sum to 1 from the start.
Only the scores of one row of windows are in memory; rows of pixels that no later window touches are handed on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.system import Prediction
from util.data.transforms import Placed
from util.errors import UserError
from util.photos.reading import Photo

OVERLAP = 1 / 4  # of a window's side, at least


@dataclass(frozen=True)
class Windows:
    """Windows along one side of a picture.

    Attributes:
        starts: first pixel of each, in order; the last one ends at the picture's border.
        side: pixels of each, at most those of the picture.
        weights: windows x side float32; over all windows on a pixel they sum to 1.
    """

    starts: tuple[int, ...]
    side: int
    weights: Tensor

    @classmethod
    def along(cls, length: int, tile: int) -> "Windows":
        """Place as few windows of `tile` pixels as cover `length` with the overlap, at even distances."""
        side = min(length, tile)
        step = max(1, int(side * (1 - OVERLAP)))
        count = 1 + -(-(length - side) // step)
        starts = tuple(round(i * (length - side) / max(1, count - 1)) for i in range(count))
        # sin^2 falls to zero at both ends, so that a window comes and goes without a step
        hill = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
        total = np.zeros(length)
        for start in starts:
            total[start : start + side] += hill
        weights = np.stack([hill / total[start : start + side] for start in starts])
        return cls(starts, side, torch.from_numpy(weights.astype(np.float32)))


def check_tile(tile: int, patch: int) -> None:
    """Raise UserError where a window of `tile` pixels is no window, or smaller than the network's patch."""
    if tile < 1:
        raise UserError(f"--tile {tile}: the side of a window in pixels must be positive")
    if tile < patch:
        raise UserError(f"--tile {tile}: a window is smaller than a patch of the network ({patch} pixels); give some "
                        "hundred pixels, about as large as the photos of its training")


def blended(hw: tuple[int, int], tile: int, scores: Callable[[int, int, int, int], Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield the blended scores of a picture from top to bottom, as (first row, C rows W float32).

    Args:
        hw: height and width of the picture.
        tile: side of a window in pixels; a side of the picture that is shorter takes one window.
        scores: returns C h w float32 of the window (top, left, height, width).
    """
    rows, columns = Windows.along(hw[0], tile), Windows.along(hw[1], tile)
    strip: Tensor | None = None  # of the present row of windows
    above = 0  # its first row
    for top, down in zip(rows.starts, rows.weights, strict=True):
        if strip is not None:
            yield above, strip[:, : top - above]
            strip = torch.cat([strip[:, top - above :], torch.zeros_like(strip[:, : top - above])], 1)
        above = top
        for left, across in zip(columns.starts, columns.weights, strict=True):
            found = scores(top, left, rows.side, columns.side)
            if strip is None:
                strip = found.new_zeros(len(found), rows.side, hw[1])
            weight = (down[:, None] * across).to(found.device)
            strip[:, :, left : left + columns.side] += weight * found
    yield above, strip


def windows(photo: Photo, tile: int) -> Iterator[Photo]:
    """Yield the windows of a photo, each as a photo."""
    rows, columns = (Windows.along(length, tile) for length in photo.hw)
    for top in rows.starts:
        for left in columns.starts:
            yield cut(photo, top, left, rows.side, columns.side)


def cut(photo: Photo, top: int, left: int, height: int, width: int) -> Photo:
    return Photo(photo.image[top : top + height, left : left + width], photo.name)


def through_windows(photo: Photo, tile: int, predict: Callable[[Photo], list[tuple[Tensor, Tensor | None]]]
                    ) -> Iterator[tuple[slice, list[tuple[np.ndarray, np.ndarray]]]]:  # fmt: skip
    """Yield rows of a photo with a mask, bool, and a score 0..1, float32, for each of several targets.

    predict: returns for each target the scores 2 h w of a window at its own size, and where shots vote those of each, K 2 h w.
    """
    sizes: list[int] = []  # channels of each target

    def scores(*window: int) -> Tensor:
        found = predict(cut(photo, *window))
        parts = [final if votes is None else torch.cat([final, votes.flatten(0, 1)]) for final, votes in found]
        sizes[:] = map(len, parts)
        return torch.cat(parts)

    for top, strip in blended(photo.hw, tile, scores):
        hw, found = tuple(strip.shape[1:]), []
        for part in strip.split(sizes):
            votes = part[None, 2:].unflatten(1, (-1, 2)) if len(part) > 2 else None
            mask = Prediction(part[None, :2], votes=votes).decide(0, Placed(hw, hw)) == 1
            found.append((mask.cpu().numpy(), part[:2].softmax(0)[1].cpu().numpy()))
        yield slice(top, top + hw[0]), found
