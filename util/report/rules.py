"""Words about rules of scoring: the table "the same predictions under each rule", and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from util.report import summary
from util.score.rescore import LABELS, rescore

COLUMNS = ("", "score", "95 %", "difference", "95 %", "FB-IoU")


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `rescore` as texts: group, and the cells of COLUMNS; first rows of a score have no difference."""
    rows, first = [], set()
    for row in found["rows"]:
        low, high = (100 * x for x in row["interval"])
        away = [f"{100 * row['difference']:+.2f}", "{:+.2f} to {:+.2f}".format(*(100 * x for x in row["difference_interval"]))]
        same = row["score"] not in first or row["difference"] == 0 == max(map(abs, row["difference_interval"]))
        first.add(row["score"])
        fb_iou = f"{100 * row['fb_iou']:.2f}" if "fb_iou" in row else ""
        cells = [row["name"], f"{100 * row['value']:.2f}", f"{low:.2f} to {high:.2f}", *(["", ""] if same else away), fb_iou]
        rows.append({"group": row["group"], "cells": cells})
    return rows


def flags(result: Mapping, flag: Mapping[str, Any]) -> list[str]:
    """Return texts: episodes and query images of a fold, classes without an episode or with few."""
    found = [f"{flag['episodes']:,} episodes of {flag['queries']:,} different query images"]
    if flag["never"]:
        names = ", ".join(summary.class_name(result, c) for c in flag["never"])
        found.append(f"never drawn: {names}; M0 counts 0 for each, M1 leaves them out")
    if flag["few"]:
        names = ", ".join(f"{summary.class_name(result, c)} ({n})" for c, n in flag["few"].items())
        found.append(f"classes with under five episodes in a seed: {names}")
    return found


def notes(result: Mapping) -> list[str]:
    """Return what a reader of the score must know of its episodes: `flags`, and M1 where a class was never drawn."""
    found = result.get("rules") or {"rows": [], "flags": []}
    said = [line for flag in found["flags"] for line in flags(result, flag)]
    if any(flag["never"] for flag in found["flags"]):
        said += [f"mIoU {100 * row['value']:.2f} under {row['name']}" for row in found["rows"] if row["name"] == LABELS["m1"]]
    return said


def text(results: Sequence[Mapping]) -> str:
    """Format the table of one result, or of the folds of one, for the console.

    Raises:
        UserError: a report without the counts; reports that are no folds of one result.
    """
    found, first = rescore(results), results[0]
    mark = f"  {first['mark']}" if first.get("mark") else ""
    of = summary.title(first) if len(results) == 1 else (
        f"{first['system']} · {first['data_set']} folds {', '.join(str(r['split']) for r in results)} · {first['backbone']}")
    lines = [f"The same predictions under each rule: {of}: {summary.runs(first)}{' a fold' if len(results) > 1 else ''}, pooled",
             f"  protocol {summary.protocol(first)}, scored on: {found['headline']}"]  # fmt: skip
    for result, flag in zip(results, found["flags"], strict=True):
        fold = f"fold {flag['split']}: " if len(results) > 1 else ""
        lines += [f"  {fold}{line}" for line in flags(result, flag)]
    rows = table(found)
    wide = [max(len(cells[i]) for cells in [COLUMNS, *(row["cells"] for row in rows)]) for i in range(len(COLUMNS))]
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines += ["", _line((group, *COLUMNS[1:5], COLUMNS[5] * bool(row["cells"][5])), wide)]
        lines.append(_line(row["cells"], wide) + mark)
    headline = found["rows"][0]
    cited = (f"In a paper: mIoU {100 * headline['value']:.2f} ({summary.interval_text(headline['interval'])}), {of}, "
             f"{summary.runs(first)}, protocol {summary.protocol(first)}: {found['headline']}")  # fmt: skip
    if len(results) == 1 and first.get("control"):
        cited += f"; support gap {summary.gap_text(first['control'])}"
    lines += ["", "Differences are to the first row of the score, on the same resampled query images.", cited + mark]
    return "\n".join(lines)


def _line(cells: Sequence[str], wide: Sequence[int]) -> str:
    return ("  " + "  ".join(f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
                             for i, (cell, width) in enumerate(zip(cells, wide, strict=True)))).rstrip()  # fmt: skip
