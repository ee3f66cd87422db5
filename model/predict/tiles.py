"""Large pictures by overlapping windows: scores of every window, blended with weights that fall to zero at its borders.

The windows stand on a grid: a weight is the product of one for the row and one for the column, and both sum to 1 from the start.
Only the scores of one row of windows are in memory; rows of pixels that no later window touches are handed on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from util.errors import UserError

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
