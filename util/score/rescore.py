"""The same predictions under each rule: what a number would be had another paper's rules scored it. No model is run.

From the counts that every episode has of each grid and void rule (`util.score.rules`). Definitions: docs/protocols.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from util.errors import UserError
from util.score.rules import COLUMNS, DEFAULT, GRIDS, VOIDS, Rule, under
from util.score.statistics import interval, resample
from util.score.table import OLD, EpisodeTable, read_episodes

FEW = 5  # episodes of a class, below which its IoU is hardly a measurement
GRID = {"original": "file's pixels", "square": "network's square", "letterbox": "letterbox square"}
VOID = {"ignore": "void ignored", "background": "void is background"}
MEAN = {"m0": "M0", "m1": "M1"}
LABELS = {
    "m0": "M0: all classes of the fold, one never drawn counts 0",
    "m1": "M1: the classes that were drawn",
    "share": "sums in shares of the image: each image has the same weight",
    "episode": "mean over a class's episodes of their IoU, then over classes",
    "area": "the same, episodes weighted by the area of their image",
    "fb": "FB-IoU: foreground and background, summed over all episodes",
    "fb_mean": "FB-IoU as (mIoU + background IoU) / 2",
    "folds": "mean of the folds' mIoU",
    "classes": "mean over the classes of all folds",
}


def counted(result: Mapping) -> EpisodeTable:
    """Read the episodes of a result. Raises UserError where they have no counts of other rules."""
    table = read_episodes(result)
    if table.dense:
        raise UserError("this report is of whole images; only few-shot episodes have several rules of scoring")
    if table.tallies is None:
        raise UserError(f"the report's episodes have the counts of one rule alone: {OLD}")
    return table


@dataclass(frozen=True)
class Fold:
    """One result and its resamples.

    sums    (1 + resamples) C K: totals of `_values` over the episodes, first of all, then of resampled queries
    absent  classes of the fold without an episode
    """

    table: EpisodeTable
    sums: np.ndarray
    absent: int
    rule: Rule

    @classmethod
    def of(cls, result: Mapping, resamples: int = 2000, seed: int = 0) -> Fold:
        """Read a result (report.json). Raises UserError where it has no counts of other rules."""
        table, rule = counted(result), rule_of(result)
        values = _values(table.tallies, rule)
        total = np.stack([values[table.cls == c].sum(0) for c in np.unique(table.cls)])
        absent = len({int(c) for c in result["classes"]} - set(table.cls.tolist()))
        return cls(table, np.concatenate([total[None], resample(table, values, resamples, seed)]), absent, rule)

    def per_class(self, key: str) -> np.ndarray:
        """IoU of each class, (1 + resamples) C. key: GRID-VOID, share, episode or area."""
        at = 2 * KEYS.index(key)
        return self.sums[..., at] / np.maximum(self.sums[..., at + 1], np.finfo(float).tiny)

    def mean(self, key: str, mean: str) -> np.ndarray:
        """mIoU under M0 or M1, (1 + resamples)."""
        ious = self.per_class(key)
        return ious.sum(1) / (ious.shape[1] + (self.absent if mean == "m0" else 0))

    def pooled(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Foreground and background IoU of sums over all episodes. key: GRID-VOID."""
        found = []
        for name in (key, f"{key} background"):
            at = 2 * KEYS.index(name)
            hit, union = self.sums[..., at].sum(1), self.sums[..., at + 1].sum(1)
            found.append(np.where(union > 0, hit / np.maximum(union, 1), 1.0))
        return found[0], found[1]


PAIRS = [(grid, void) for grid in GRIDS for void in VOIDS]
KEYS = [*(f"{grid}-{void}{part}" for grid, void in PAIRS for part in ("", " background")), "share", "episode", "area"]


def _values(tallies: np.ndarray, rule: Rule) -> np.ndarray:
    """Numerators and denominators of each of KEYS, episode by episode: N by 2 len(KEYS)."""
    counts = np.hstack([under(tallies, grid, void) for grid, void in PAIRS]).astype(float)
    hit, union = under(tallies, rule.grid, rule.void)[:, :2].T.astype(float)
    area = tallies[:, COLUMNS.index("area")].astype(float)
    iou = np.where(union > 0, hit / np.maximum(union, 1), 1.0)
    return np.column_stack([counts, hit / area, union / area, iou, np.ones_like(iou), iou * area, area])


def rule_of(result: Mapping) -> Rule:
    """Return the rule that a result's headline follows."""
    asked = (result.get("config") or {}).get("Test_Finetune") or {}
    return Rule(**{key: asked.get(key, getattr(DEFAULT, key)) for key in ("grid", "void", "mean")})


def rescore(results: Sequence[Mapping]) -> dict[str, Any]:
    """Score results under each rule, all seeds pooled: one result, or the folds of one system.

    Returns:
        headline: the rule of the first row; rows: [{group, name, score, value, interval, difference, difference_interval,
        fb_iou*}], fractions: score is "mIoU" or "FB-IoU", difference to that score's first row, intervals 95 %; flags: see
        `flags`, one a fold.
    Raises:
        UserError: a report without the counts; reports that are no folds of one result.
    """
    _check_folds(results)
    folds = [Fold.of(result, seed=number) for number, result in enumerate(results)]
    rule = folds[0].rule
    own = f"{rule.grid}-{rule.void}"

    def over(key: str, mean: str = rule.mean) -> np.ndarray:
        return np.mean([fold.mean(key, mean) for fold in folds], 0)

    headline, rows = over(own), []

    def row(group: str, name: str, values: np.ndarray, against: np.ndarray, **more: float) -> None:
        score = "FB-IoU" if group == "FB-IoU" else "mIoU"
        rows.append({"group": group, "name": name, "score": score, "value": float(values[0]), "interval": interval(values[1:]),
                     "difference": float((values - against)[0]), "difference_interval": interval((values - against)[1:])} | more)

    pooled = {f"{grid}-{void}": [fold.pooled(f"{grid}-{void}") for fold in folds] for grid, void in PAIRS}
    fb = {key: np.mean([(front + back) / 2 for front, back in pairs], 0) for key, pairs in pooled.items()}
    for grid, void in sorted(PAIRS, key=lambda pair: pair != (rule.grid, rule.void)):
        key = f"{grid}-{void}"
        row("grid and void pixels", f"{GRID[grid]}, {VOID[void]}", over(key), headline, fb_iou=float(fb[key][0]))
    for mean in MEAN:
        row("mean", LABELS[mean], over(own, mean), headline)
    for key in ("share", "episode", "area"):
        row("mean", LABELS[key], over(key), headline)
    if len(folds) > 1:
        n = sum(fold.sums.shape[1] + (fold.absent if rule.mean == "m0" else 0) for fold in folds)
        row("folds", LABELS["folds"], headline, headline)
        row("folds", LABELS["classes"], sum(fold.per_class(own).sum(1) for fold in folds) / n, headline)
    row("FB-IoU", LABELS["fb"], fb[own], fb[own])
    other = np.mean([(fold.mean(own, rule.mean) + back) / 2 for fold, (_, back) in zip(folds, pooled[own], strict=True)], 0)
    row("FB-IoU", LABELS["fb_mean"], other, fb[own])
    return {"headline": f"{GRID[rule.grid]}, {VOID[rule.void]}, {MEAN[rule.mean]}", "rows": rows,
            "flags": [flags(fold.table, result) for fold, result in zip(folds, results, strict=True)]}


def flags(table: EpisodeTable, result: Mapping) -> dict[str, Any]:
    """Say what the episodes are worth.

    Returns:
        episodes, queries: how many, and of how many images; never: classes of the fold without an episode; few: {class: the
        fewest episodes that a seed has}, of classes with under FEW in some seed.
    """
    known = sorted(int(c) for c in result["classes"])
    seeds = np.unique(table.seed)
    fewest = {c: min(int(((table.cls == c) & (table.seed == s)).sum()) for s in seeds) for c in known}
    never = [c for c in known if not (table.cls == c).any()]
    return {"split": result.get("split"), "episodes": len(table), "queries": len(np.unique(table.query)), "never": never,
            "few": {c: n for c, n in fewest.items() if n < FEW and c not in never}}  # fmt: skip


def _check_folds(results: Sequence[Mapping]) -> None:
    """Raise UserError unless the results are different folds of one system under one protocol."""
    for key in ("system", "data_set", "shot", "protocol_hash"):
        if len(found := {str(result.get(key)) for result in results}) > 1:
            raise UserError(f"several reports must be folds of one result; their {key} differs: {', '.join(sorted(found))}")
    if len({result.get("split") for result in results}) < len(results):
        raise UserError("several reports must be of different folds; two have the same split")
