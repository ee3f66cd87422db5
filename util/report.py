"""The result of an evaluation as files: report.json for programs, report.html for people, gallery.png for READMEs.

Everything arrives as plain data (a dict and arrays); the looks of the page are in `templates/report.html.j2`. The page
is one file without scripts or outside resources.

The result, scores being fractions 0..1 (key: content; * = may be missing):
    system, data_set, split, shot, backbone, checkpoint     what was evaluated
    protocol, environment, time*                            dicts, shown as they are
    warnings*, mark*    texts that disqualify the scores; the words put beside every score then, e.g. "[random CLIP]"
    classes             {class id: name}
    seeds               list of {seed, episodes, miou, fb_iou, fg_iou, per_class: {id: IoU}, episodes_per_class*:
                        {id: n}, and other scores named ...iou, as meta_miou, base_miou}: seed and a meter's result()
    mean, sd            of the scores over the seeds: `summarise(seeds)`
    baselines*          {name: {miou, fb_iou*}}
    protocol_hash*      text; protocol["name"] is the protocol's name
    episodes*           {hash, columns, rows}: whole pixel counts of every episode, a text each, see util/stats.py
    interval*           {score: [low, high]}: 95 %, `util.stats.bootstrap`
    leak_free*          {mean, sd, differences}: the same system evaluated without the leaks of the published protocol, and
                        what was done otherwise, as texts
    date*               text; filled in when missing

    config, place, traces   what `python -m util.report verify RESULT.json` needs to run a few episodes again, see verify.py

`python -m util.report compare A.json B.json` tells whether system B differs from A on the same episodes.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
import numpy as np

from util import cli
from util.files import atomic, save_json
from util.stats import compare, describe, load_result
from util.viz import COLOURS, Panel, contact_sheet, fit, jpeg_data_uri, png_bytes

SCORES = {
    "miou": ("mIoU", "mean over the fold's classes"),
    "fb_iou": ("FB-IoU", "foreground and background, all episodes"),
    "fg_iou": ("Foreground IoU", "all episodes pooled"),
    "meta_miou": ("Meta branch mIoU", "before the ensemble"),
    "base_miou": ("Base-class mIoU", "of the base learner, base classes"),
}
REQUIRED = ("system", "data_set", "split", "shot", "backbone", "checkpoint", "protocol", "environment", "classes",
            "seeds", "mean", "sd")
PAGE_BYTES = 4_500_000


@dataclass
class Card:
    """One episode of the gallery. group: its section, e.g. "best"; panels: (caption, H W 3 uint8 RGB) in order."""

    title: str
    subtitle: str
    group: str
    panels: list[Panel]


def choose(ious: Sequence[float], count: int = 3) -> dict[str, list[int]]:
    """Positions of the `count` best, median and worst of the episodes' IoUs, no episode twice; ties by position."""
    order = sorted(range(len(ious)), key=lambda i: (-ious[i], i))
    count = min(count, len(order) // 3)
    middle = (len(order) - count) // 2
    return {"best": order[:count], "median": order[middle : middle + count], "worst": order[len(order) - count :][::-1]}


def summarise(seeds: Sequence[Mapping]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and sample standard deviation (ddof 1; 0 for one seed) of every score that each of the seeds has."""
    if not seeds:
        raise ValueError("no seed was evaluated: there is nothing to summarise")
    seeds = plain(seeds)
    keys = [k for k in seeds[0] if k.endswith("iou") and all(isinstance(s.get(k), int | float) for s in seeds)]
    pairs = {k: _mean_sd([s[k] for s in seeds]) for k in keys}
    return {k: mean for k, (mean, _) in pairs.items()}, {k: sd for k, (_, sd) in pairs.items()}


def text_table(result: Mapping) -> str:
    """The result for the console: classes, scores, scores without leaks, baselines, in percent; each score line ends with
    the mark."""
    mark = f"  {result['mark']}" if result.get("mark") else ""
    lines = [f"WARNING: {text}" for text in result.get("warnings", [])]
    lines.append(f"{_title(result)}: {_runs(result)}")
    if protocol := _protocol(result):
        lines.append(f"  protocol {protocol}")
    rows: list[tuple[str, float, float | None, str]]
    rows = [(row["name"], row["mean"], row["sd"], f"{row['episodes']} episodes" if row["episodes"] else "")
            for row in _class_rows(result)]
    intervals = result.get("interval") or {}
    rows += [(_label(k), v, result["sd"][k], _range(intervals.get(k))) for k, v in _scores(result)]
    if leak_free := result.get("leak_free"):
        notes = [f"({'; '.join(leak_free['differences'])})"]  # once, beside the first score
        rows += [(f"leak-free {_label(k)}", v, leak_free["sd"][k], notes.pop() if notes else "") for k, v in _scores(leak_free)]
    rows += [(f"baseline: {name}", b["miou"], None, "") for name, b in result.get("baselines", {}).items()]
    width = max(len(name) for name, *_ in rows)
    for name, mean, sd, note in rows:
        spread = f" ± {100 * sd:5.2f}" if sd is not None and len(result["seeds"]) > 1 else ""
        lines.append(f"  {name:<{width}}  {100 * mean:6.2f}{spread}  {note}".rstrip() + mark)
    return "\n".join(lines)


def write_report(folder: str | Path, result: Mapping, cards: Sequence[Card]) -> Path:
    """Writes report.json, report.html and (with cards) gallery.png into the folder, each whole or not at all.

    Returns the path of report.html. Raises ValueError naming missing keys of the result.
    """
    if missing := [key for key in REQUIRED if key not in result]:
        raise ValueError(f"the result lacks {', '.join(missing)} (see util/report.py)")
    result = plain({"date": f"{datetime.now():%Y-%m-%d %H:%M}", **result})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / "report.json", result)
    if cards:
        titles = [f"{card.group} · {card.title}" for card in cards]
        with atomic(folder / "gallery.png") as path:
            path.write_bytes(png_bytes(contact_sheet([card.panels for card in cards], titles)))
    else:
        (folder / "gallery.png").unlink(missing_ok=True)  # an older run's pictures beside this run's scores would lie
    with atomic(folder / "report.html") as path:
        path.write_text(render(result, cards), encoding="utf-8")
    return folder / "report.html"


def render(result: Mapping, cards: Sequence[Card]) -> str:
    """The page as text, of a result as `plain` gives it. Pictures shrink until it is below PAGE_BYTES."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": lambda x, digits=1: f"{100 * x:.{digits}f}", "shown": _shown}
    template = environment.get_template("report.html.j2")
    several = len(result["seeds"]) > 1
    intervals, leak_free = result.get("interval") or {}, result.get("leak_free") or {}
    tiles = [{"label": _label(k), "note": SCORES.get(k, ("", ""))[1], "mean": v, "range": _range(intervals.get(k)),
              "sd": result["sd"][k] if several else None} for k, v in _scores(result)]
    leaks = [{"label": _label(k), "published": result["mean"].get(k), "mean": v, "sd": leak_free["sd"][k] if several else None}
             for k, v in _scores(leak_free)]
    view = {
        "result": result, "title": _title(result), "runs": _runs(result), "several": several, "tiles": tiles,
        "protocol": _protocol(result), "leaks": leaks, "differences": leak_free.get("differences", []),
        "warnings": result.get("warnings", []), "mark": result.get("mark", ""), "classes": _class_rows(result),
        "columns": [(k, _label(k)) for k, _ in _scores(result)], "baselines": _baseline_rows(result),
        "facts": {"Protocol": result["protocol"], "Environment": result["environment"], "Time": result.get("time", {})},
        "legend": {name: f"rgb{rgb}" for name, rgb in COLOURS.items()},
    }
    for side in (320, 240, 180, 120, 80):
        page = template.render(view, groups=_groups(cards, side))
        if len(page.encode()) < PAGE_BYTES:
            break
    return page


def plain(value: object) -> object:
    """The same data in JSON's types: keys as text, numpy and torch scalars as numbers, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy or torch
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _label(key: str) -> str:
    return SCORES[key][0] if key in SCORES else key.replace("_", " ").replace("miou", "mIoU").replace(" iou", " IoU")


def _scores(result: Mapping) -> list[tuple[str, float]]:
    """(key, mean) of the scores there are, in SCORES' order, unknown ones last."""
    mean = {k: v for k, v in result.get("mean", {}).items() if v is not None}
    return [(k, mean[k]) for k in [*SCORES, *(k for k in mean if k not in SCORES)] if k in mean]


def _title(result: Mapping) -> str:
    data = f"{result['data_set']} split {result['split']}"
    return f"{result['system']} · {data} · {result['shot']}-shot · {result['backbone']}"


def _runs(result: Mapping) -> str:
    episodes = sorted({s["episodes"] for s in result["seeds"]})
    count = " to ".join(f"{n:,}" for n in (episodes if len(episodes) < 2 else (episodes[0], episodes[-1])))
    return f"{len(result['seeds'])} seed{'s' if len(result['seeds']) > 1 else ''} × {count} episodes"


def _protocol(result: Mapping) -> str:
    """Name and hash of the protocol, as far as the result tells them."""
    name, digest = result["protocol"].get("name", ""), result.get("protocol_hash")
    return f"{name} ({digest})".strip() if digest else name


def _range(interval: Sequence[float] | None) -> str:
    return f"95 %: {100 * interval[0]:.2f} to {100 * interval[1]:.2f}" if interval else ""


def _class_rows(result: Mapping) -> list[dict]:
    """Per class that was scored: id, name, mean, sd over the seeds, episodes of all seeds (None if not told)."""
    names = {str(k): v for k, v in result["classes"].items()}
    seeds = [{"iou": {str(k): v for k, v in s["per_class"].items()},
              "episodes": {str(k): v for k, v in s.get("episodes_per_class", {}).items()}} for s in result["seeds"]]
    rows = []
    for key in seeds[0]["iou"]:
        if any(s["iou"][key] is None for s in seeds):  # neither in the truth nor predicted: it has no IoU and is in no mean
            continue
        mean, sd = _mean_sd([s["iou"][key] for s in seeds])
        rows.append({"id": key, "name": names.get(key, f"class {key}"), "mean": mean, "sd": sd,
                     "episodes": sum(s["episodes"].get(key, 0) for s in seeds) or None})
    return rows


def _baseline_rows(result: Mapping) -> list[dict]:
    """This system first, then the baselines from the best down; empty when there is none to compare with."""
    others = [{"name": name, "own": False, **scores} for name, scores in result.get("baselines", {}).items()]
    own = {"name": result["system"], "own": True, **result["mean"]}
    return [own, *sorted(others, key=lambda row: -row["miou"])] if others else []


def _groups(cards: Sequence[Card], side: int) -> dict[str, list[dict]]:
    """Cards by group in order of appearance, their pictures embedded at most `side` pixels tall."""
    groups: dict[str, list[dict]] = {}
    for card in cards:
        panels = [{"caption": caption, "uri": jpeg_data_uri(fit(image, min(side, image.shape[0])))}
                  for caption, image in card.panels]
        groups.setdefault(card.group, []).append({"title": card.title, "subtitle": card.subtitle, "panels": panels})
    return groups


def _shown(value: object) -> str:
    """A value of the protocol or the environment as a person writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_shown(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return str(value)


def main() -> None:
    """Exit code 0: compared, whether the difference is significant or not; 1: not comparable; 2: a wrong file."""
    if sys.argv[1:2] == ["verify"]:  # needs the model, which nothing in util/ may import
        verify = Path(__file__).parents[1] / "verify.py"
        os.execv(sys.executable, [sys.executable, str(verify), *sys.argv[2:]])
    parser = argparse.ArgumentParser(description="Reports of evaluations (report.json).")
    command = parser.add_subparsers(required=True).add_parser("compare", help="is B another than A, on the same episodes?")
    command.add_argument("a", metavar="A.json")
    command.add_argument("b", metavar="B.json")
    given = parser.parse_args()
    a, b = load_result(given.a), load_result(given.b)
    comparison = compare(a, b)
    print(describe(comparison, a, b))
    sys.exit(not comparison.comparable)


if __name__ == "__main__":
    cli.run(main)
