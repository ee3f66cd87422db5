"""Quality of each prior alone: its mIoU, cut at thresholds 0.1 to 0.9, on the episodes of an evaluation.

A prior is a map in 0..1 on the feature grid. It is resized to file size as a prediction is; a pixel is foreground where
the map exceeds the threshold. One histogram per map serves all thresholds. Whole counts make the result independent of
sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from util.data.transforms import Placed
from util.run.distributed import Context

SHORT = {"vtp": "VTP", "vvp": "VVP", "cam": "CAM", "cosine": "cosine prior", "similarity": "similarity prior"}
THRESHOLDS = tuple(k / 10 for k in range(1, 10))
LEVELS = len(THRESHOLDS) + 1


def title(name: str) -> str:
    """Return the name of a prior or another map for people."""
    return SHORT.get(name, name)


class PriorMeter:
    """Count pixels. `states`: prior -> C LEVELS 2 int64, by class, number of thresholds that the prior exceeds, and truth.

    absent: how many further classes count 0 in the mean.
    """

    def __init__(self, classes: Sequence[int], device: torch.device | str = "cpu", absent: int = 0):
        self.classes, self.device, self.absent = tuple(classes), device, absent
        self.states: dict[str, Tensor] = {}

    def update(self, maps: Mapping[str, Tensor], truth: Tensor, cls: int, placed: Placed) -> None:
        """Add one episode. maps: its priors, h w; truth: H W uint8 {0, 1, 255}."""
        for name, values in maps.items():
            prior = placed.restore(values[None])[0]
            above = (LEVELS * prior).ceil().clamp(1, LEVELS).byte() - 1  # how many thresholds
            cell = 16 * truth.to(above.device) + above  # in bytes, so that 255 becomes row 15: does not count
            pixels = torch.bincount(cell.flatten(), minlength=256).view(16, 16)[:2, :LEVELS]
            self._state(name)[self.classes.index(cls)] += pixels.T.to(self.device)

    def result(self, context: Context) -> dict[str, list[float]]:
        """Return prior -> mIoU, a fraction, at each of THRESHOLDS, over the episodes of all ranks."""
        names = sorted({name for part in context.gather([sorted(self.states)]) for name in part})
        found = {}
        for name in names:
            pixels = context.all_reduce(self._state(name)).cpu()
            above = pixels.flip(1).cumsum(1).flip(1)[:, 1:]  # C thresholds 2: pixels that exceed it, by truth
            union = pixels.sum(1)[:, None, 1] + above[..., 0]
            found[name] = ((above[..., 1] / union.clamp(min=1)).sum(0) / (len(self.classes) + self.absent)).tolist()
        return found

    def _state(self, name: str) -> Tensor:
        shape = len(self.classes), LEVELS, 2
        return self.states.setdefault(name, torch.zeros(shape, dtype=torch.int64, device=self.device))
