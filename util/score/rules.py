"""Rules of scoring: on which grid, what void pixels are, over which classes the mean is.

The published rule sets differ in all three (docs/protocols.md). `Rule` places one episode's truth on a grid of pixels, and says
how a prediction gets there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from util.config import Config
from util.data.transforms import IGNORE, Placed


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
