"""Rules of scoring: on which grid, what void pixels are, over which classes the mean is.

The published rule sets differ in all three (docs/protocols.md). `Rule` places one episode's truth on a grid of pixels, and says
how a prediction gets there. `tally` counts an episode once for all of them: `under` gives the counts of any grid and void rule
from these whole numbers, years later and without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from util.config import Config
from util.data.transforms import IGNORE, Placed
from util.score.metrics import Counts

GRIDS, VOIDS = ("original", "square", "letterbox"), ("ignore", "background")
PARTS = (*Counts._fields, "void_foreground", "void_background")  # void pixels by prediction; the others without void pixels
COLUMNS = (*(f"{grid}_{part}" for grid in ("original", "square") for part in PARTS),
           "padding_foreground", "padding_background", "area", "object")  # fmt: skip

@dataclass(frozen=True)
class Rule:
    """How an episode is scored; the values are those of `Test_Finetune`.

    grid   original: the file's own pixels; square: the side of the network's input, truth squashed to it (nearest); letterbox: a
           square on the file's longer side, truth in its top left corner, the rest void
    void   ignore: a void pixel (255) counts nowhere; background: its truth is background
    mean   m0: over all classes of the fold, a class never drawn counts 0; m1: over the classes that were drawn
    """

    grid: str = "original"
    void: str = "ignore"
    mean: str = "m0"

    @classmethod
    def of(cls, config: Config) -> Rule:
        asked = config.Test_Finetune
        return cls(asked.grid, asked.void, asked.mean)

    def place(self, placed: Placed, side: int) -> Placed:
        """Return the way of scores to this grid. side: S, of the network's square input."""
        height, width = placed.hw
        if self.grid == "square":  # the part of the canvas that shows the image becomes S x S
            canvas = tuple(round(c * side / length) for c, length in zip(placed.canvas, placed.hw, strict=True))
            return Placed((side, side), canvas, placed.corners)
        if self.grid == "letterbox":
            return Placed((max(height, width),) * 2, placed.canvas, placed.corners)
        return placed

    def truth(self, labels: Tensor, side: int) -> Tensor:
        """Bring a mask or label to this grid and apply the void rule. labels: H W uint8 at file size, 255 void."""
        height, width = labels.shape
        if self.grid == "square":
            rows, columns = (torch.arange(side, device=labels.device) * length // side for length in (height, width))
            labels = labels[rows][:, columns]
        elif self.grid == "letterbox":
            long = max(height, width)
            labels = F.pad(labels, (0, long - width, 0, long - height), value=IGNORE)
        return labels.masked_fill(labels == IGNORE, 0) if self.void == "background" else labels

    def absent(self, classes: Sequence[int], drawn: Collection[int]) -> int:
        """Return how many classes without an episode count 0 in the mean."""
        return len(set(classes) - set(drawn)) if self.mean == "m0" else 0


DEFAULT = Rule()


def tally(decide: Callable[[str], Tensor], mask: Tensor, side: int, boxed: bool) -> tuple[int, ...]:
    """Count one episode on all grids: whole numbers in the order of `COLUMNS`.

    With void pixels ignored, the letterbox square has the counts of the original grid, since its padding is void; so only the
    padding is counted for it. area: pixels of the image, object: of the truth's foreground, both at file size.

    Args:
        decide: grid -> the prediction on it, {0, 1}, of the size of that grid's truth.
        mask: the truth, H W uint8 {0, 1, 255}; side: of the network's input.
        boxed: whether the network saw the padding; else it predicts nothing there.
    """
    original, square = _cells(decide("original"), mask), _cells(decide("square"), Rule("square").truth(mask, side))
    padding = max(mask.shape) ** 2 - mask.numel()
    foreground = 0
    if padding and boxed:
        height, width = mask.shape
        whole = decide("letterbox")
        foreground = int(whole.sum() - whole[:height, :width].sum())
    sums = [(hit, hit + false + missed, right, right + false + missed, inside, outside)
            for right, false, missed, hit, outside, inside in (original, square)]  # fmt: skip
    return *sums[0], *sums[1], foreground, padding - foreground, mask.numel(), original[2] + original[3]


def _cells(pred: Tensor, truth: Tensor) -> list[int]:
    """Count pixels by (truth, prediction): (0, 0), (0, 1), (1, 0), (1, 1), (void, 0), (void, 1)."""
    if pred.shape != truth.shape:
        raise ValueError(f"prediction {tuple(pred.shape)} and truth {tuple(truth.shape)} differ in size")
    cells = torch.bincount((2 * truth.to(pred.device).long() + pred).flatten(), minlength=2 * 256).tolist()
    found = cells[:4] + cells[2 * IGNORE :]
    if len(found) != 6 or sum(found) != pred.numel():
        raise ValueError("prediction and truth must hold 0 and 1, the truth also 255")
    return found


def under(tallies: np.ndarray, grid: str, void: str) -> np.ndarray:
    """Return the counts of a grid and void rule, N 4 (`Counts`), from rows of `tally`, N by len(COLUMNS)."""
    first = len(PARTS) if grid == "square" else 0
    counts, outside = tallies[:, first : first + 4], tallies[:, first + 4 : first + 6]
    if void == "ignore":
        return counts
    if grid == "letterbox":
        outside = outside + tallies[:, 2 * len(PARTS) : 2 * len(PARTS) + 2]
    foreground, background = outside.T
    return counts + np.column_stack([0 * foreground, foreground, background, foreground + background])
