"""Words and rows for tables, pages and figures, from a result (the dict that util/report/write.py describes)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

SCORES = {
    "miou": ("mIoU", "mean over the fold's classes"),
    "fb_iou": ("FB-IoU", "foreground and background, all episodes"),
    "fg_iou": ("Foreground IoU", "all episodes pooled"),
    "meta_miou": ("Meta branch mIoU", "before the ensemble"),
    "base_miou": ("Base-class mIoU", "of the base learner, base classes"),
    "foreground_miou": ("mIoU without background", "mean over the classes of objects"),
    "pixel_accuracy": ("pixel accuracy", "share of the counted pixels that are right"),
    "background_miou": ("mIoU with background", "the background counts as a class"),
    "seen_miou": ("seen mIoU", "mean over the seen classes"),
    "unseen_miou": ("unseen mIoU", "mean over the unseen classes"),
    "hiou": ("hIoU", "harmonic mean of seen and unseen mIoU"),
}
REQUIRED = ("system", "data_set", "split", "shot", "backbone", "checkpoint", "protocol", "environment", "classes",
            "seeds", "mean", "sd")  # fmt: skip


def plain(value: object) -> object:
    """Convert data to JSON's types: keys to text, numpy and torch scalars to numbers, NaN and infinities to null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy or torch
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (ddof 1; 0 for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def summarise(seeds: Sequence[Mapping]) -> tuple[dict[str, float], dict[str, float]]:
    """Return mean and sample standard deviation (ddof 1; 0 for one seed) of every score that all seeds have."""
    if not seeds:
        raise ValueError("no seed was evaluated: there is nothing to summarise")
    seeds = plain(seeds)
    keys = [k for k in seeds[0] if (k.endswith("iou") or k in SCORES) and all(isinstance(s.get(k), int | float) for s in seeds)]
    pairs = {k: mean_sd([s[k] for s in seeds]) for k in keys}
    return {k: mean for k, (mean, _) in pairs.items()}, {k: sd for k, (_, sd) in pairs.items()}


def label(key: str) -> str:
    """Return the name of a score for people."""
    return SCORES[key][0] if key in SCORES else key.replace("_", " ").replace("miou", "mIoU").replace(" iou", " IoU")


def scores(result: Mapping) -> list[tuple[str, float]]:
    """Return (key, mean) of the scores, in the order of SCORES, unknown ones last."""
    mean = {k: v for k, v in result.get("mean", {}).items() if v is not None}
    return [(k, mean[k]) for k in [*SCORES, *(k for k in mean if k not in SCORES)] if k in mean]


def title(result: Mapping) -> str:
    return f"{result['system']} · {result['data_set']} {setting(result)} · {result['backbone']}"


def setting(result: Mapping) -> str:
    """What a result is of, beside the data set."""
    return result.get("setting") or f"split {result['split']} · {result['shot']}-shot"


def unit(result: Mapping) -> str:
    """What a sample is called: episodes or images."""
    return result.get("unit", "episodes")


def dense(result: Mapping) -> bool:
    """Whether its rows are of one class of one image each, not of episodes."""
    return bool((result.get("episodes") or {}).get("dense"))


def cases(result: Mapping) -> str:
    """What a row with counts and a cause is called: episodes, or objects (all things of one class in one image)."""
    return "objects" if dense(result) else "episodes"


def note(result: Mapping, key: str) -> str:
    """Explain a score."""
    if key == "miou" and dense(result):
        background = any(str(c) == "0" for c in result["classes"])
        return "mean over the classes" + (", the background is one of them" if background else "")
    return SCORES.get(key, ("", ""))[1]


def confused_rows(result: Mapping) -> list[dict]:
    """Return the worst pairs of a dense result (`util.score.metrics.worst_pairs`), of the first seed: names and share."""
    return [{"truth": class_name(result, a), "predicted": class_name(result, b), "pixels": pixels, "share": share}
            for a, b, pixels, share in result["seeds"][0].get("confused") or []]  # fmt: skip


def runs(result: Mapping) -> str:
    """Describe the number of seeds and episodes."""
    episodes = sorted({s["episodes"] for s in result["seeds"]})
    count = " to ".join(f"{n:,}" for n in (episodes if len(episodes) < 2 else (episodes[0], episodes[-1])))
    return f"{len(result['seeds'])} seed{'s' if len(result['seeds']) > 1 else ''} × {count} {unit(result)}"


def protocol(result: Mapping) -> str:
    """Return name and hash of the protocol, as far as the result has them."""
    name, digest = result["protocol"].get("name", ""), result.get("protocol_hash")
    return f"{name} ({digest})".strip() if digest else name


def interval_text(interval: Sequence[float] | None, digits: int = 2) -> str:
    return f"95 %: {100 * interval[0]:.{digits}f} to {100 * interval[1]:.{digits}f}" if interval else ""


def class_name(result: Mapping, cls: int | str) -> str:
    """Return the name of a class of the data set."""
    for key in ("classes", "other_classes"):
        for k, name in (result.get(key) or {}).items():
            if str(k) == str(cls):
                return name
    return f"class {cls}"


def class_rows(result: Mapping) -> list[dict]:
    """Return for each scored class: id, name, mean, sd over the seeds, interval (95 %, or None), episodes of all seeds (None
    where not recorded)."""
    intervals = {str(k): v for k, v in ((result.get("interval") or {}).get("per_class") or {}).items()}
    seeds = [{"iou": {str(k): v for k, v in s["per_class"].items()},
              "episodes": {str(k): v for k, v in s.get("episodes_per_class", {}).items()}} for s in result["seeds"]]  # fmt: skip
    rows = []
    for key in seeds[0]["iou"]:
        if any(s["iou"][key] is None for s in seeds):  # in no truth and no prediction: it has no IoU and is in no mean
            continue
        mean, sd = mean_sd([s["iou"][key] for s in seeds])
        rows.append({"id": key, "name": class_name(result, key), "mean": mean, "sd": sd, "interval": intervals.get(key),
                     "episodes": sum(s["episodes"].get(key, 0) for s in seeds) or None})  # fmt: skip
    return rows


def baseline_rows(result: Mapping) -> list[dict]:
    """Return this system first, then the baselines from the best down; empty without baselines."""
    others = [{"name": name, "own": False, **values} for name, values in result.get("baselines", {}).items()]
    own = {"name": result["system"], "own": True, **result["mean"]}
    return [own, *sorted(others, key=lambda row: -row["miou"])] if others else []


def warnings(result: Mapping) -> list[str]:
    """Return the result's warnings; with them, classes never drawn, and that it is below one of its own baselines."""
    found, own = [*result.get("warnings", []), *undrawn(result)], result["mean"].get("miou")
    better = [row for row in baseline_rows(result) if not row["own"] and own is not None and row["miou"] > own]
    if better:
        names = ", ".join(f"{row['name']} ({100 * row['miou']:.1f})" for row in better)
        found.append(f"with mIoU {100 * own:.1f} this system is below its own baselines, so it has learnt nothing: {names}")
    control = result.get("control")
    if control and control["interval"][0] <= 0:
        found.append("this system hardly uses its supports: with those of another class its mIoU is "
                     f"{100 * control['control']:.1f}, the support gap {gap_text(control)}")
    return found


def gap_text(control: Mapping) -> str:
    """Format a support gap (`util.score.statistics.support_gap`) with its interval."""
    return "{:+.2f} (95 %: {:+.2f} to {:+.2f})".format(*(100 * x for x in (control["gap"], *control["interval"])))


def control_lines(result: Mapping) -> list[str]:
    """Say what was compared for the support gap, or how to measure it; [] where a result is of no few-shot episodes."""
    control = result.get("control")
    if not control:
        ask = "no support gap: Test_Finetune.control=true runs every episode once more, with supports of another class"
        return [ask] if result.get("rules") else []
    left_out = sum(s["episodes"] for s in result["seeds"]) - control["episodes"]
    return [f"support gap {gap_text(control)}: mIoU {100 * control['miou']:.2f}, with supports of another class "
            f"{100 * control['control']:.2f}, paired over query images"
            + (f"; {left_out:,} episodes have no such supports and are in neither" if left_out else "")
            + ("; the query's class name stays right, only the supports are wrong" if control["names"] else "")]  # fmt: skip


def undrawn(result: Mapping) -> list[str]:
    """Return a warning about classes of the fold without an episode, seed by seed; [] where every class has one."""
    found = [f"of seed {seed['seed']}: {', '.join(class_name(result, c) for c in seed['undrawn'])}"
             for seed in result["seeds"] if seed.get("undrawn")]  # fmt: skip
    if not found:
        return []
    left_out = ((result.get("config") or {}).get("Test_Finetune") or {}).get("mean") == "m1"
    return [f"classes never drawn, {'; '.join(found)}. " + ("They are left out of mIoU (M1)" if left_out else
            "Each counts 0 in mIoU (M0, as published; Test_Finetune.mean=m1 leaves them out)")]  # fmt: skip


def variant_rows(result: Mapping) -> list[dict]:
    """Return other predictions of the same run (seeds' `variants`): name and mean of each score; [] where there are none."""
    found = [seed.get("variants") or {} for seed in result["seeds"]]
    return [{"name": name} | summarise([variants[name] for variants in found])[0]
            for name in found[0] if all(name in variants for variants in found)]  # fmt: skip


def cause_rows(result: Mapping) -> list[dict]:
    """Return for each class, and last for "all": name, share of episodes by cause (util/score/causes.py); [] in old reports."""
    found = result.get("causes")
    if not found:
        return []
    rows = [(class_name(result, cls), counts) for cls, counts in found["per_class"].items()] + [("all", found["counts"])]
    return [{"name": name, "counts": n, "shares": {k: v / sum(n.values()) for k, v in n.items()}} for name, n in rows]


def prior_quality(result: Mapping) -> dict[str, list[float]]:
    """Return prior -> mIoU at each threshold (util/score/priors.py), mean over seeds; {} in older reports and without priors."""
    seeds = [s.get("prior_quality") or {} for s in result["seeds"]]
    return {name: [mean_sd(values)[0] for values in zip(*(s[name] for s in seeds), strict=True)]
            for name in seeds[0] if all(name in s for s in seeds)}  # fmt: skip
