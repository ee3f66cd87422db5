"""Rows of an evaluation: whole pixel counts of every episode, or of every class of every image; to and from JSON.

Intervals, paired comparisons and causes need nothing else, so a result can be compared years later without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from util.errors import UserError
from util.score import rules
from util.score.causes import Spread
from util.score.metrics import Counts

COLUMNS = ("seed", "number", "class", "intersection", "union", "background_intersection", "background_union")
QUERY = "query"  # an eighth column, optional: which image is segmented, any whole number that tells the images apart
SPREAD = Spread._fields  # three more, optional: where the prediction lies, see util/score/causes.py
OLD = "evaluate again with this version of test.py, older reports do not have it"


class Row(NamedTuple):
    """One evaluated episode, or one class of one image: number, class, query image, pixel counts, where the prediction lies;
    for an episode also the counts of all rules, `util.score.rules.tally`."""

    number: int
    cls: int
    query: int
    counts: Counts
    spread: Spread
    tally: tuple[int, ...] = ()


@dataclass(frozen=True)
class EpisodeTable:
    """Rows ascending by (seed, number, class); every column int64 of length N.

    counts  N 4: foreground intersection and union, background intersection and union, in pixels of the grid that is scored on
    query   which image is segmented; without that column the number (all seeds then share its image)
    spread  N 3: util.score.causes.Spread; None where an older report has no such columns
    dense   an image has a row for each class in its truth or prediction
    absent  classes without a row that count 0 in the mean over classes
    tallies N by len(util.score.rules.COLUMNS): the counts of all rules; None where an older report or a dense one has none
    """

    hash: str
    seed: np.ndarray
    number: np.ndarray
    cls: np.ndarray
    counts: np.ndarray
    query: np.ndarray
    spread: np.ndarray | None = None
    dense: bool = False
    absent: int = 0
    tallies: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.seed)

    @classmethod
    def of(cls, digest: str, rows: Mapping[int, Sequence[Row]], dense: bool = False, absent: int = 0) -> EpisodeTable:
        """Build a table from the rows of each seed."""
        lines = [(seed, row.number, row.cls, *row.counts, row.query, *row.spread, *row.tally)
                 for seed, some in rows.items() for row in some]  # fmt: skip
        table = np.array(lines, np.int64).reshape(len(lines), -1 if lines else 11)
        table = table[np.lexsort((table[:, 2], table[:, 1], table[:, 0]))]
        tallies = table[:, 11:] if table.shape[1] > 11 else None
        return cls(digest, *table[:, :3].T, table[:, 3:7], table[:, 7], table[:, 8:11], dense, absent, tallies)

    def to_json(self) -> dict[str, Any]:
        """Return what `read_episodes` reads, spread included. One text per row keeps the file small."""
        columns, names = [self.seed, self.number, self.cls, self.counts, self.query, self.spread], [*COLUMNS, QUERY, *SPREAD]
        if self.tallies is not None:
            columns, names = [*columns, self.tallies], [*names, *rules.COLUMNS]
        columns = np.column_stack(columns)
        return {"hash": self.hash, "columns": " ".join(names), "dense": self.dense,
                **({"absent": self.absent} if self.absent else {}), "rows": [" ".join(map(str, row)) for row in columns.tolist()]}

    def at(self, keys: np.ndarray) -> EpisodeTable:
        """Return the rows of the given (seed, number, class), N 3 ascending; zeros where a row does not exist."""
        own = {key: i for i, key in enumerate(zip(self.seed.tolist(), self.number.tolist(), self.cls.tolist(), strict=True))}
        place = np.array([own.get(tuple(key), -1) for key in keys.tolist()])
        found = place >= 0
        counts = np.where(found[:, None], self.counts[place], 0)
        return EpisodeTable(self.hash, *keys.T, counts, np.where(found, self.query[place], keys[:, 1]), dense=self.dense)

    def common(self, other: EpisodeTable) -> tuple[EpisodeTable, EpisodeTable]:
        """Return the rows of both tables with a (seed, number, class) that both have."""
        keys = [np.column_stack([t.seed, t.number, t.cls]) for t in (self, other)]
        both = np.array(sorted(set(map(tuple, keys[0].tolist())) & set(map(tuple, keys[1].tolist()))), np.int64).reshape(-1, 3)
        return self.at(both), other.at(both)


def align(a: EpisodeTable, b: EpisodeTable) -> tuple[EpisodeTable, EpisodeTable]:
    """Give dense tables the same rows: a class that one of two predictions finds in an image gets a row in both."""
    if not (a.dense and b.dense) or a.hash != b.hash:
        return a, b
    keys = np.unique(np.vstack([np.column_stack([t.seed, t.number, t.cls]) for t in (a, b)]), axis=0)
    return a.at(keys), b.at(keys)


def read_episodes(result: Mapping) -> EpisodeTable:
    """Read the rows of a result (report.json). Raises UserError when they are missing (older report) or malformed."""
    found = result.get("episodes")
    if found is None:
        raise UserError(f"the report has no counts of single episodes (key \"episodes\"): {OLD}")
    if not isinstance(found, Mapping) or not found.get("hash") or not found.get("rows") or "columns" not in found:
        raise UserError("the report's \"episodes\" are incomplete: expected hash, columns and at least one row")
    names = str(found["columns"]).split()
    known = [*COLUMNS, QUERY, *SPREAD, *rules.COLUMNS]
    if names != known[: len(names)] or len(names) not in (7, 8, 11, len(known)):
        raise UserError(f"the report's \"episodes\" have the columns {' '.join(names)!r}; expected {' '.join(COLUMNS)!r}")
    if not isinstance(found["rows"], list):
        raise UserError("the report's \"episodes\" are malformed: its rows are no list")
    rows = np.empty((len(found["rows"]), len(names)), np.int64)
    for i, row in enumerate(found["rows"]):
        try:
            rows[i] = [int(value) for value in row.split()]
            _, _, _, hit, union, background_hit, background_union = rows[i, :7]
            small = len(names) > 11  # an object may vanish on the network's square
            if not (0 <= hit <= union and 0 <= background_hit <= background_union and union + small > 0):
                raise ValueError("need 0 <= intersection <= union, union > 0")
            if len(names) > 8 and not (hit <= rows[i, 8] <= union and 0 <= rows[i, 9] <= rows[i, 8] - hit and rows[i, 10] >= 0):
                raise ValueError("need intersection <= predicted <= union, 0 <= on_others <= predicted - intersection")
        except (AttributeError, OverflowError, ValueError) as error:
            raise UserError(f"the report's episode row {i + 1}, {row!r}, is malformed: {error}") from error
    dense, absent = bool(found.get("dense")), found.get("absent", 0)
    if not isinstance(absent, int) or absent < 0:
        raise UserError(f"the report's \"episodes\" are malformed: absent = {absent!r}, expected a number of classes")
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    if (twice := (np.diff(rows[:, : 2 + dense], axis=0) == 0).all(1)).any():
        seed, number = rows[int(twice.argmax()), :2]
        raise UserError(f"the report has episode {number} of seed {seed} twice")
    query = rows[:, 7] if len(names) > 7 else rows[:, 1]
    spread = rows[:, 8:11] if len(names) > 8 else None
    tallies = rows[:, 11:] if len(names) > 11 else None
    return EpisodeTable(str(found["hash"]), *rows[:, :3].T, rows[:, 3:7], query, spread, dense, absent, tallies)
