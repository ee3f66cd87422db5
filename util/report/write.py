"""Write the result of an evaluation: report.json for programs, report.html for people, gallery.png for READMEs, and
gallery.json, the pictures for a page about two results.

The input is plain data (a dict and arrays); `templates/report.html.j2` has the layout of the page. The page
is one file without scripts or outside resources.

The result, scores being fractions 0..1 (key: content; * = may be missing):
    system, data_set, split, shot, backbone, checkpoint     what was evaluated
    protocol, environment, time*                            dicts, shown as they are
    warnings*, mark*    texts that disqualify the scores; the words beside every score in that case, e.g. "[random CLIP]"
    classes             {class id: name}
    other_classes*      {class id: name}: classes that are not scored
    seeds               list of {seed, episodes, miou, fb_iou, fg_iou, per_class: {id: IoU}, episodes_per_class*:
                        {id: n}, prior_quality*: see util/score/priors.py, and other scores named ...iou, as meta_miou,
                        base_miou; variants*: {name of another prediction: its scores}; confused*: pairs of classes, see
                        `util.score.metrics.worst_pairs`}: seed and a meter's result(); episodes: number of samples
    mean, sd            of the scores over the seeds: `util.report.summary.summarise(seeds)`
    setting*, unit*     what the result is of, beside the data set; what a sample is called ("split 0 · 1-shot" and "episodes")
    baselines*          {name: {miou, fb_iou*}}
    protocol_hash*      text; protocol["name"] is the protocol's name
    protocol_parts*     {part: hash}: `util.protocol.Protocol.parts`
    episodes*           {hash, columns, rows}: whole pixel counts of every episode, a text each, see util/score/statistics.py
    interval*           {score: [low, high], per_class*: {id: [low, high]}}: 95 %, `util.score.statistics.bootstrap`
    rules*              the same predictions under each rule: `util.score.rescore.rescore`
    causes*             why episodes fail: `util.score.causes.tally`
    curves*             {name of a training run: `util.run.curves.read`}; the system's own run has the system's name
    control*            `util.score.statistics.support_gap`, names (reads class names), rows (as episodes)
    leak_free*          {mean, sd, differences}: the same system evaluated without the leaks of the published protocol, and
                        the differences as texts
    date*               text; filled in when missing

    config, place, traces   needed by `python -m model.verify RESULT.json` to run a few episodes again
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from util.errors import UserError
from util.files import atomic, save_json
from util.report import figures, page, rules, summary
from util.report.summary import REQUIRED, interval_text, label, plain, scores
from util.report.viz import Card, contact_sheet, png_bytes
from util.score.causes import CAUSES

SHEET = ("best", "median", "worst")  # sections of gallery.png


def choose(ious: Sequence[float], count: int = 3) -> dict[str, list[int]]:
    """Choose positions of the `count` best, median and worst of the episodes' IoUs, no episode twice; ties by position."""
    order = sorted(range(len(ious)), key=lambda i: (-ious[i], i))
    count = min(count, len(order) // 3)
    middle = (len(order) - count) // 2
    return {"best": order[:count], "median": order[middle : middle + count], "worst": order[len(order) - count :][::-1]}


def text_table(result: Mapping) -> str:
    """Format the result for the console: classes, scores, scores without leaks, baselines, in percent. Each line with a score
    ends with the mark."""
    mark = f"  {result['mark']}" if result.get("mark") else ""
    lines = [f"WARNING: {text}" for text in summary.warnings(result)]
    lines.append(f"{summary.title(result)}: {summary.runs(result)}")
    if protocol := summary.protocol(result):
        lines.append(f"  protocol {protocol}")
    rows: list[tuple[str, float, float | None, str]]
    rows = [(row["name"], row["mean"], row["sd"], f"{row['episodes']} {summary.unit(result)}" if row["episodes"] else "")
            for row in summary.class_rows(result)]
    intervals = result.get("interval") or {}
    rows += [(label(k), v, result["sd"][k], interval_text(intervals.get(k))) for k, v in scores(result)]
    if leak_free := result.get("leak_free"):
        notes = [f"({'; '.join(leak_free['differences'])})"]  # once, beside the first score
        rows += [(f"leak-free {label(k)}", v, leak_free["sd"][k], notes.pop() if notes else "") for k, v in scores(leak_free)]
    rows += [(f"{label(key)}, {row['name']}", row[key], None, "") for row in summary.variant_rows(result)
             for key in ("miou", "hiou") if key in row]  # fmt: skip
    rows += [(f"baseline: {name}", b["miou"], None, "") for name, b in result.get("baselines", {}).items()]
    width = max(len(name) for name, *_ in rows)
    for name, mean, sd, note in rows:
        spread = f" ± {100 * sd:5.2f}" if sd is not None and len(result["seeds"]) > 1 else ""
        lines.append(f"  {name:<{width}}  {100 * mean:6.2f}{spread}  {note}".rstrip() + mark)
    lines += [f"  {line}" + (mark if result.get("control") else "") for line in summary.control_lines(result)]
    lines += [f"  {line}" + (mark if "mIoU" in line else "") for line in rules.notes(result)]
    return "\n".join(lines)


def write_report(folder: str | Path, result: Mapping, cards: Sequence[Card]) -> Path:
    """Write report.json, report.html and (with cards) gallery.png and gallery.json into the folder, each whole or not at all.

    Returns the path of report.html. Raises ValueError naming missing keys of the result.
    """
    if missing := [key for key in REQUIRED if key not in result]:
        raise ValueError(f"the result lacks {', '.join(missing)} (see util/report/write.py)")
    result = plain({"date": f"{datetime.now():%Y-%m-%d %H:%M}", **result})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / "report.json", result)
    for name in ("gallery.png", "gallery.json"):
        if not cards:
            (folder / name).unlink(missing_ok=True)  # pictures of an older run do not belong to these scores
    if cards:
        sheet = [card for card in cards if card.group in SHEET] or cards
        with atomic(folder / "gallery.png") as path:
            titles = [f"{card.group} · {card.title}" for card in sheet]
            path.write_bytes(png_bytes(contact_sheet([card.panels for card in sheet], titles)))
        save_json(folder / "gallery.json", {"of": fingerprint(result), "seed": result["seeds"][0]["seed"],
                                            "cards": page.embedded(cards, 240)})
    with atomic(folder / "report.html") as path:
        path.write_text(render(result, cards), encoding="utf-8")
    return folder / "report.html"


def fingerprint(result: Mapping) -> str:
    """Hash the episodes' counts, to know whether pictures belong to a result."""
    rows = (result.get("episodes") or {}).get("rows", [])
    return hashlib.sha256("\n".join(map(str, rows)).encode()).hexdigest()[:16]


def render(result: Mapping, cards: Sequence[Card]) -> str:
    """Render the page as text, from a result after `plain`."""
    several = len(result["seeds"]) > 1
    intervals, leak_free = result.get("interval") or {}, result.get("leak_free") or {}
    tiles = [{"label": label(k), "note": summary.note(result, k), "mean": v, "range": interval_text(intervals.get(k)),
              "sd": result["sd"][k] if several else None} for k, v in scores(result)]
    leaks = [{"label": label(k), "published": result["mean"].get(k), "mean": v, "sd": leak_free["sd"][k] if several else None}
             for k, v in scores(leak_free)]
    drawn = {name: figures.svg(figure, name) for name, figure in figures.of(result).items() if name != "classes"}
    captions = {"causes": f"Share of the {summary.cases(result)} by cause.",
                "priors": "mIoU of each prior map alone, cut at a threshold, on the same episodes as the final mask."}
    runs = {name: name.removeprefix("curves") or f" {result['system']}" for name in drawn if name.startswith("curves")}
    captions |= {name: f"Training:{run}. Terms of the loss, scores, learning rate." for name, run in runs.items()}
    causes = summary.cause_rows(result)
    view = {
        "result": result, "title": summary.title(result), "runs": summary.runs(result), "several": several, "tiles": tiles,
        "protocol": summary.protocol(result), "leaks": leaks, "differences": leak_free.get("differences", []),
        "warnings": summary.warnings(result), "mark": result.get("mark", ""), "classes": summary.class_rows(result),
        "dense": summary.dense(result), "cases": summary.cases(result), "pairs": summary.confused_rows(result),
        "variants": summary.variant_rows(result), "setting": summary.setting(result), "unit": summary.unit(result),
        "columns": [(k, label(k)) for k, _ in scores(result)], "baselines": summary.baseline_rows(result),
        "control": summary.control_lines(result),
        "facts": {"Protocol": result["protocol"], "Environment": result["environment"], "Time": result.get("time", {})},
        "rules": rules.table(result["rules"]) if result.get("rules") else [],
        "flags": rules.notes(result),
        "intervals": bool((result.get("interval") or {}).get("per_class")), "captions": captions,
        "figures": drawn, "causes": causes[-1] if causes else None, "rule": CAUSES,
        "confused": [(summary.class_name(result, c), n) for c, n in result.get("causes", {}).get("confused", {}).items()],
    }  # fmt: skip

    def pictures(side: int) -> dict[str, list[dict]]:
        groups: dict[str, list[dict]] = {}
        for card in page.embedded(cards, side):
            groups.setdefault(card["group"], []).append(card)
        return groups

    return page.render("report.html.j2", view, pictures)


def check_keys(result: Mapping) -> None:
    """Raise UserError for a result that gives no page or figure."""
    missing = [key for key in REQUIRED if key not in result] or [key for key in ("classes", "seeds", "mean") if not result[key]]
    if missing:
        raise UserError(f"no report of an evaluation: it lacks {', '.join(missing)}")
