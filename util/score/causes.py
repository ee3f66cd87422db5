"""Why episodes fail: a rule over whole pixel counts gives every episode of an evaluation a cause.

Pixels of one episode, at file size, without those that do not count: P predicted, T of the object, I of both, O predicted on
objects of other classes of the query's label. The first line that holds is the cause:

    found        2 I >= P + T - I            the IoU is one half or more: no failure
    missed       10 P < T                    hardly any foreground
    confused     2 O >= P                    half of the prediction lies on other classes; named is the one with most of it
    false alarm  2 I < P and 2 I < T         neither is most of the prediction right nor most of the object found
    too much     P > T                       at least half of the object is found, and too much around it
    part         else                        at least half of the prediction is right, but it is a part of the object
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

CAUSES = {  # name -> explanation for people; in the order of the rule
    "found": "IoU of one half or more: no failure",
    "missed": "hardly any foreground: less than a tenth of the object's size",
    "confused": "at least half of the prediction lies on objects of other classes",
    "false alarm": "mostly background: less than half of the prediction is right, less than half of the object found",
    "too much": "at least half of the object is found, and too much around it",
    "part": "at least half of the prediction is right, but it is only a part of the object",
}
NAMES = tuple(CAUSES)


class Spread(NamedTuple):
    """Where the prediction of one episode is: pixels at file size, without those that do not count."""

    predicted: int  # foreground pixels
    on_others: int  # foreground pixels on objects of other classes than the episode's
    other: int  # the other class with most of them (the lowest at a tie), 0: none


def spread(pred: Tensor, label: Tensor, cls: int) -> Spread:
    """Count the pixels. pred: H W {0, 1}; label: H W uint8, class ids, 0 background, 255 ignore; cls: the episode's class."""
    where = torch.where(pred == 1, label.to(pred.device), 255)
    pixels = torch.bincount(where.flatten(), minlength=256).tolist()[:255]
    predicted = sum(pixels)
    pixels[0] = pixels[cls] = 0
    return Spread(predicted, sum(pixels), pixels.index(max(pixels)))


def causes(counts: np.ndarray, spreads: np.ndarray) -> np.ndarray:
    """Return the cause of every episode, N int, a position in `NAMES`.

    Args:
        counts: N 4 (or more columns) int, beginning with intersection and union (`util.score.metrics.Counts`).
        spreads: N 3 int, rows of `Spread`.
    """
    hit, union, (predicted, on_others, _) = counts[:, 0], counts[:, 1], spreads.T
    size = union - predicted + hit
    rule = [2 * hit >= union, 10 * predicted < size, 2 * on_others >= predicted,
            (2 * hit < predicted) & (2 * hit < size), predicted > size]  # fmt: skip
    return np.select(rule, range(len(rule)), len(rule))


def tally(cls: np.ndarray, counts: np.ndarray, spreads: np.ndarray) -> dict[str, Any]:
    """Count the episodes of each cause; the arguments are columns of `util.score.table.EpisodeTable`.

    Returns:
        counts {cause: n}, per_class {class: {cause: n}}, confused {other class: n, most frequent first}.
    """
    cls, counts, spreads = (x[cls > 0] for x in (cls, counts, spreads))  # the background is no object
    found = causes(counts, spreads)
    other, n = np.unique(spreads[found == NAMES.index("confused"), 2], return_counts=True)
    order = np.lexsort((other, -n))
    return {
        "counts": _count(found),
        "per_class": {int(c): _count(found[cls == c]) for c in np.unique(cls)},
        "confused": {int(other[i]): int(n[i]) for i in order},
    }


def examples(counts: Sequence[Sequence[int]], spreads: Sequence[Spread], without: Collection[int] = (), number: int = 2
             ) -> dict[str, list[int]]:  # fmt: skip
    """Return cause -> positions of `number` typical episodes (the quartiles by IoU, for two), none of `without`."""
    counts, spreads = np.array(counts), np.array(spreads)
    found, iou = causes(counts, spreads), counts[:, 0] / np.maximum(counts[:, 1], 1)
    chosen = {}
    for i, name in enumerate(NAMES[1:], start=1):
        at = [int(j) for j in np.argsort(iou, kind="stable") if found[j] == i and j not in without]
        picks = {(2 * k + 1) * len(at) // (2 * number) for k in range(number)} if at else ()
        chosen[name] = [at[k] for k in sorted(picks)]
    return chosen


def _count(found: np.ndarray) -> dict[str, int]:
    return dict(zip(NAMES, np.bincount(found, minlength=len(NAMES)).tolist(), strict=True))
