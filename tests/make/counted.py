"""Rows of episodes with the counts of every rule."""

import numpy as np

from util.score.causes import Spread
from util.score.metrics import Counts
from util.score.rules import COLUMNS
from util.score.table import EpisodeTable, Row


def row(number: int, cls: int, query: int, hit: int, union: int, **more: int) -> Row:
    """An image of 100 pixels without void; `more`: values of COLUMNS."""
    counts = Counts(hit, union, 100 - union, 100 - hit)
    values = dict(zip(COLUMNS, [*counts, 0, 0, *counts, 0, 0, 0, 0, 100, union], strict=True)) | more
    return Row(number, cls, query, counts, Spread(hit, 0, 0), tuple(values.values()))


def table(seeds: int = 2, episodes: int = 30, classes: int = 3) -> EpisodeTable:
    """Random episodes of classes 1..classes; every query twice; 5 void pixels, 3 of them predicted foreground."""
    rng = np.random.default_rng(0)
    rows = {seed: [row(i, 1 + i % classes, i // 2, int(rng.integers(5, 40)), 50, original_void_foreground=3,
                       original_void_background=2) for i in range(episodes)] for seed in range(seeds)}  # fmt: skip
    return EpisodeTable.of("hash", rows)
