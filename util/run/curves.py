"""Learning curves as a plain record, `curves.jsonl` beside `train.log`: one line of JSON for the points of one step.

    {"group": "train", "step": 10, "values": {"main": 0.46, "rate": 0.0003}}

TensorBoard shows the same points; reports read this file. Half a line, left by a killed run, is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from util.files import atomic

FILE = "curves.jsonl"
POINTS = 300  # of a curve in a report


def append(file: Path, group: str, step: int, values: Mapping[str, float]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"group": group, "step": step, "values": dict(values)}) + "\n")


def cut(file: Path, steps: Mapping[str, int]) -> None:
    """Cut the record back to the step of each group from which a run continues."""
    if file.is_file():
        kept = [point for point in _points(file) if point["step"] <= steps.get(point["group"], 0)]
        with atomic(file) as temporary:
            temporary.write_text("".join(json.dumps(point) + "\n" for point in kept), encoding="utf-8")


def read(file: Path) -> dict[str, dict[str, list]]:
    """Read group -> {"step": [...], name: [...], ...}; more than POINTS are averaged with their neighbours; {} without a file.

    A value that is missing at a step is None.
    """
    groups: dict[str, list[dict]] = {}
    for point in _points(file) if file.is_file() else ():
        groups.setdefault(point["group"], []).append(point)
    curves = {}
    for group, points in groups.items():
        names = list(dict.fromkeys(name for point in points for name in point["values"]))
        table = np.array([[point["step"], *(point["values"].get(name, np.nan) for name in names)] for point in points], float)
        means = np.stack([_mean(part) for part in np.array_split(table, min(POINTS, len(table)))])
        columns = zip(["step", *names], means.T, strict=True)
        curves[group] = {name: [float(x) if np.isfinite(x) else None for x in column] for name, column in columns}
    return curves


def _mean(rows: np.ndarray) -> np.ndarray:
    """Return the mean of the numbers in each column, nan where there is none: some values have fewer points than others."""
    there = ~np.isnan(rows)
    count = there.sum(0)
    return np.where(count > 0, np.where(there, rows, 0).sum(0) / np.maximum(count, 1), np.nan)


def _points(file: Path) -> list[dict]:
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            point = json.loads(line)
            found.append({"group": str(point["group"]), "step": int(point["step"]),
                          "values": {str(name): float(value) for name, value in point["values"].items()}})
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return found
