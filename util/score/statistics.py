"""Confidence of scores: intervals by bootstrap over queries, and a paired test of two results on the same episodes.

The pixel counts of every episode are in report.json, key "episodes" (see util/report/write.py), so a result can be compared
years later without a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import UserError
from util.score.table import OLD, EpisodeTable, align, read_episodes

CHUNK = 2**20  # rows drawn at a time: bounds the memory at about 100 MB
LEVEL = 0.05  # of the p value; the intervals are its complement


@dataclass(frozen=True)
class Comparison:
    """Result b against result a on the same episodes; fractions. All numbers are None when the two are not comparable.

    reasons     differences that forbid the comparison
    mious       mIoU of a and of b, all episodes pooled;  difference: b - a
    interval    95 %, of the difference;  p_value: two-sided, of no difference;  significant: p_value < 0.05
    """

    comparable: bool
    reasons: list[str]
    mious: tuple[float, float] | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    significant: bool | None = None


def load_result(path: str | Path) -> dict:
    """Read a report.json for a comparison. Raises UserError, naming the file, when it is missing, malformed or too old."""
    return read_result(path, _check)


def read_result(path: str | Path, check: Callable[[Mapping], object]) -> dict:
    """Read a report.json and `check` it. Raises UserError, naming the file; `check` raises one without the name."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise UserError(f"expected the report.json of an evaluation, found a {type(result).__name__}")
        check(result)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected the report.json of an evaluation") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid JSON ({error}); expected the report.json of an evaluation") from error
    return result


def pooled(table: EpisodeTable) -> dict[str, float]:
    """Return mIoU and FB-IoU over the episodes of all seeds together: {"miou", "fb_iou"}, fractions.

    Intersections and unions are summed over all seeds before the division; a report's mean divides per seed and then
    averages. With the same number of episodes per seed the two differ by far less than their spread.
    """
    miou, fb_iou = _scores(np.stack([table.counts[table.cls == c].sum(0) for c in np.unique(table.cls)]), table.absent)
    return {"miou": float(miou), "fb_iou": float(fb_iou)}


def bootstrap(table: EpisodeTable, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Return 95 % percentile intervals of the `pooled` scores, {"miou": [low, high], "fb_iou": [low, high]}, and of the IoU of
    every class, "per_class": {class: [low, high]}; fractions.

    The queries of each class are resampled with replacement, class by class. Over all classes together, a rare class would be
    missing from some resamples: its IoU would be 0 / 0, and the mean one over other classes. A query is drawn with all of its
    episodes: seeds and further passes use the same images again, which is no new evidence about other images. (With single
    episodes, 5 x 1,000 over 364 images, `compare` found half of the pairs of equal systems different.) The same arguments give
    the same bits. A class with a single query adds no width.
    """
    sums = resample(table, table.counts, resamples, seed)
    miou, fb_iou = _scores(sums, table.absent)
    per_class = {int(c): interval(sums[:, i, 0] / np.maximum(sums[:, i, 1], 1)) for i, c in enumerate(np.unique(table.cls))}
    return {"miou": interval(miou), "fb_iou": interval(fb_iou), "per_class": per_class}


def compare(a: Mapping, b: Mapping, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Test whether the mIoU of result b differs from that of a. Paired bootstrap: both are scored on the same resamples.

    Only results of one protocol on the same episodes are compared. Raises UserError for a report without rows or protocol.
    """
    first, second = align(_check(a), _check(b))
    if reasons := _differences(a, b, first, second):
        return Comparison(False, reasons)
    differences = paired(first, second, resamples, seed)
    mious = pooled(first)["miou"], pooled(second)["miou"]
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    p_value = float(min(1, 2 * (1 + tail) / (1 + resamples)))
    low, high = interval(differences)
    return Comparison(True, [], mious, mious[1] - mious[0], (low, high), p_value, p_value < LEVEL)


def paired(first: EpisodeTable, second: EpisodeTable, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Return differences of mIoU, second minus first, on the same resampled queries. The tables have the same rows."""
    sums = resample(first, np.hstack([first.counts, second.counts]), resamples, seed)
    return _scores(sums[..., 4:], second.absent)[0] - _scores(sums[..., :4], first.absent)[0]


def support_gap(table: EpisodeTable, control: EpisodeTable, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Compare a result with its control, the same queries with supports of another class.

    Returns:
        episodes: how many are in both; miou of these, control, its mIoU, gap, miou - control, and its 95 % interval (paired
        over query images); fractions.
    """
    own, control = (replace(some, absent=table.absent) for some in table.common(control))
    mious = pooled(own)["miou"], pooled(control)["miou"]
    return {"episodes": len(own), "miou": mious[0], "control": mious[1], "gap": mious[0] - mious[1],
            "interval": interval(paired(control, own, resamples, seed))}  # fmt: skip


def describe(comparison: Comparison, a: Mapping, b: Mapping) -> str:
    """Describe the comparison in lines for people, in percent; marks (e.g. "[random CLIP]") stay beside the scores."""
    lines = []
    for name, result, miou in zip("AB", (a, b), comparison.mious or (None, None), strict=True):
        score = "" if miou is None else f": mIoU {100 * miou:.2f}"
        of = result.get("setting") or f"split {result.get('split')}, {result.get('shot')}-shot"
        lines.append(f"{name}  {result.get('system')}, {result.get('data_set')} {of}, {result.get('checkpoint')}{score}  "
                     f"{result.get('mark') or ''}".rstrip())
    if not comparison.comparable:
        return "\n".join([*lines, "not comparable:", *(f"  {reason}" for reason in comparison.reasons)])
    low, high = comparison.interval
    cases = "objects" if a["episodes"].get("dense") else "episodes"
    verdict = "significant" if comparison.significant else f"not significant: the {cases} cannot tell the two apart"
    return "\n".join([
        *lines,
        f"B - A  {100 * comparison.difference:+.2f} points of mIoU, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}, "
        f"p = {comparison.p_value:.2g} (paired bootstrap, {len(a['episodes']['rows']):,} {cases}): {verdict}",
    ])  # fmt: skip


def _check(result: Mapping) -> EpisodeTable:
    """Return the episodes of a result; its protocol must be named."""
    if not result.get("protocol_hash") or not isinstance(result.get("protocol"), Mapping):
        raise UserError(f"the report has no protocol hash: {OLD}")
    return read_episodes(result)


def _differences(a: Mapping, b: Mapping, first: EpisodeTable, second: EpisodeTable) -> list[str]:
    """Return the differences that forbid the comparison, as texts."""
    names = [f"{r['protocol'].get('name', 'unnamed')} ({r['protocol_hash']})" for r in (a, b)]
    reasons = []
    if a["protocol_hash"] != b["protocol_hash"]:
        reasons.append(f"protocol: {names[0]} and {names[1]}" + _parts(a, b) + _keys(a["protocol"], b["protocol"]))
    for key in ("data_set", "split", "shot"):
        if a.get(key) != b.get(key):
            reasons.append(f"{key}: {a.get(key)} and {b.get(key)}")
    if first.hash != second.hash:
        runs = [f"{len(e):,} of seeds {', '.join(map(str, np.unique(e.seed)))} ({e.hash})" for e in (first, second)]
        reasons.append(f"episodes: {runs[0]} and {runs[1]}")
    elif not all(np.array_equal(getattr(first, k), getattr(second, k)) for k in ("seed", "number", "cls")):
        reasons.append("episodes: the hash is the same but the rows tell of other episodes: one left broken images out "
                       "(Data.on_error=skip), or a file was changed")
    return reasons


def _parts(a: Mapping, b: Mapping) -> str:
    """Return which of the six parts of a protocol differ (`util.protocol.PARTS`), or "" where a report is older than they are."""
    parts = a.get("protocol_parts"), b.get("protocol_parts")
    if not all(isinstance(found, Mapping) for found in parts):
        return ""
    other = [part for part in dict.fromkeys([*parts[0], *parts[1]]) if parts[0].get(part) != parts[1].get(part)]
    return f"; other parts: {', '.join(other)}" if other else "; the six parts are equal, training or texts are not"


def _keys(a: Mapping, b: Mapping) -> str:
    """Return "; differing in ..." with the protocol's keys that differ, or ""."""
    keys = [str(k) for k in dict.fromkeys([*a, *b]) if k not in ("name", "hash") and a.get(k) != b.get(k)]
    return f"; differing in {', '.join(keys)}" if keys else ""


def resample(table: EpisodeTable, values: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Sum `values` (N K) over resampled queries: resamples C K float64, classes ascending; exact for whole numbers."""
    rng = np.random.Generator(np.random.PCG64(seed))
    classes = np.unique(table.cls)
    sums = np.empty((resamples, len(classes), values.shape[1]))
    for column, cls in enumerate(classes):
        at = table.cls == cls
        _, unit = np.unique(table.query[at], return_inverse=True)
        units = np.zeros((unit.max() + 1, values.shape[1]))
        np.add.at(units, unit, values[at])
        step = max(1, CHUNK // len(units))
        for start in range(0, resamples, step):
            size = min(step, resamples - start), len(units)
            drawn = rng.integers(len(units), size=size) + len(units) * np.arange(size[0])[:, None]
            times = np.bincount(drawn.ravel(), minlength=size[0] * size[1]).reshape(size)  # how often each query is drawn
            sums[start : start + size[0], column] = times.astype(float) @ units
    return sums


def _scores(sums: np.ndarray, absent: int) -> tuple[np.ndarray, np.ndarray]:
    """mIoU and FB-IoU of summed counts, ... C 4 (spec "PI-CLIP" section 1, Evaluation), as util.score.metrics.FewShotMeter."""
    miou = (sums[..., 0] / np.maximum(sums[..., 1], 1)).sum(-1) / (sums.shape[-2] + absent)
    hit, union, background_hit, background_union = np.moveaxis(sums.sum(-2), -1, 0)
    background = np.where(background_union > 0, background_hit / np.maximum(background_union, 1), 1.0)
    return miou, (hit / union + background) / 2


def interval(samples: Sequence[float] | np.ndarray) -> list[float]:
    """Return the 95 % percentile interval of resampled values."""
    return [float(x) for x in np.quantile(samples, [LEVEL / 2, 1 - LEVEL / 2])]
