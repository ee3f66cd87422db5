"""Figures, drawn by matplotlib in one style: as SVG with a page's own colours, or as PDF and PNG for papers.

Width 8.5 cm, a column of most proceedings; text 6 to 7 points, embedded as TrueType. Colours are Okabe and Ito's and never the
only difference: lines differ in dashes or stand apart, bars have gaps.
"""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from util.files import atomic
from util.report import summary
from util.score.causes import NAMES
from util.score.priors import THRESHOLDS, title

WIDTH = 8.5 / 2.54  # inches
DPI = 400  # of the PNG: 1,339 pixels wide
INK, SOFT, LINE, WARN = "#16202c", "#5b6675", "#d5dae1", "#8a2c00"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 2)), (0, (8, 2)))
CAUSE_COLOURS = dict(zip(NAMES, ("#d5dae1", "#16202c", "#cc79a7", "#d55e00", "#e69f00", "#0072b2"), strict=True))
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", WARN: "--warn"} | {c: f"--s{i}" for i, c in enumerate(SERIES, 1)}
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 7, "axes.labelsize": 7, "axes.titlesize": 7, "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.5,
    "axes.axisbelow": True, "axes.titlelocation": "left", "axes.titleweight": "bold", "lines.linewidth": 1.2,
    "legend.frameon": False, "legend.handlelength": 2.2, "legend.borderaxespad": 0.2, "figure.facecolor": "white",
    "text.parse_math": False, "pdf.fonttype": 42, "svg.fonttype": "none",
}  # fmt: skip


def styled(make: Callable) -> Callable:
    """Wrap a function that draws or saves, so that it uses STYLE."""

    @functools.wraps(make)
    def wrapped(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return make(*args, **kwargs)

    return wrapped


def of(result: Mapping) -> dict[str, Figure]:
    """Return name -> figure for all that a result holds; an older result gives fewer."""
    mark, found = result.get("mark", ""), {}
    if rows := summary.class_rows(result):
        found["classes"] = class_bars({"": rows}, mark)
    if rows := summary.cause_rows(result):
        found["causes"] = cause_bars(rows, mark, summary.cases(result))
    if quality := summary.prior_quality(result):
        found["priors"] = prior_curves(quality, result["mean"]["miou"], mark)
    for name, curves in (result.get("curves") or {}).items():
        if curves.get("train") or (curves.get("validation") or {}).get("miou"):
            found["curves" if name == result["system"] else f"curves {name}"] = learning_curves(curves, mark)
    return found


@styled
def class_bars(series: Mapping[str, Sequence[Mapping]], mark: str = "") -> Figure:
    """Draw the IoU of every class, with its 95 % interval if known; several results (label -> `class_rows`) side by side."""
    rows = next(iter(series.values()))
    figure, axes = _figure(0.5 + (0.11 + 0.12 * len(series)) * len(rows), mark)
    thick = 0.74 / len(series)
    for i, ((name, values), colour) in enumerate(zip(series.items(), SERIES, strict=False)):
        y = np.arange(len(values)) + (i - (len(series) - 1) / 2) * thick
        mean = 100 * np.array([row["mean"] for row in values])
        axes.barh(y, mean, 0.88 * thick, color=colour, label=name)
        for at, row in zip(y, values, strict=True):
            if row["interval"]:
                axes.plot([100 * x for x in row["interval"]], [at, at], color=INK, linewidth=0.9, solid_capstyle="butt")
    axes.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5),
             xlabel="IoU (%)" + (", lines: 95 % interval" if rows[0]["interval"] else ""))  # fmt: skip
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=1)
    return figure


@styled
def learning_curves(curves: Mapping[str, Mapping[str, Sequence]], mark: str = "") -> Figure:
    """Draw losses, mIoU (of the validation, and what training measured itself) and rate of a training (`util.run.curves.read`),
    as far as they were recorded."""
    train, validation = dict(curves.get("train", {})), curves.get("validation", {})
    rate, steps = train.pop("rate", None), train.pop("step", [])
    scores = {name: (steps, train.pop(name)) for name in [*train] if name.endswith("miou")}
    if validation.get("miou"):
        scores["validation"] = (validation["step"], validation["miou"])
    parts = [("loss", 1.25, train), ("mIoU (%)", 0.95, scores), ("rate", 0.55, rate)]
    parts, alone = [part for part in parts if part[2]], "o" if len(steps) == 1 else ""  # a line needs two points
    figure = Figure((WIDTH, 0.35 + sum(height for _, height, _ in parts)), layout="constrained")
    grid = figure.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=[height for _, height, _ in parts])[:, 0]
    for axes, (name, _, values) in zip(grid, parts, strict=True):
        if name == "loss":
            for (term, points), colour, dashes in zip(values.items(), SERIES, DASHES, strict=False):
                axes.plot(steps, _numbers(points), color=colour, linestyle=dashes, label=term, marker=alone)
            axes.set_ylim(bottom=0)
            axes.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 0.98))
        elif name == "rate":
            axes.plot(steps, _numbers(values), color=SOFT, marker=alone)
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=False)
        else:
            for (score, (x, y)), colour, dashes in zip(reversed(values.items()), SERIES, DASHES, strict=False):
                x, y = np.array(x), 100 * _numbers(y)
                x, y = x[np.isfinite(y)], y[np.isfinite(y)]
                name, best = summary.label(score), int(y.argmax()) if len(y) else 0
                if len(y) and score == "validation":
                    name = f"{name}, " * (len(values) > 1) + f"best {y[best]:.1f} at iteration {x[best]:,.0f}"
                    axes.plot(x[best], y[best], color=colour, marker="o", markersize=4, linestyle="none")
                axes.plot(x, y, color=colour, linestyle=dashes, marker="o", markersize=2.5, label=name)
            axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 0.98))
            axes.margins(y=0.15)
            found = np.concatenate([100 * _numbers(y) for _, y in values.values()])
            if np.isfinite(found).sum() == 1:
                axes.set_ylim(0, max(1.3 * np.nanmax(found), 1))
        axes.set_ylabel(name)
        axes.yaxis.set_major_locator(MaxNLocator(4 if name != "rate" else 2))
    figure.align_ylabels(grid)
    grid[-1].set_xlabel("iteration")
    grid[-1].set_xlim(0, 1.03 * max([*steps, *validation.get("step", []), 1]))
    return _marked(figure, mark)


@styled
def prior_curves(quality: Mapping[str, Sequence[float]], final: float, mark: str = "") -> Figure:
    """Draw the mIoU of each prior alone, cut at THRESHOLDS, and of the final mask (`final`); fractions."""
    figure, axes = _figure(1.9, mark)
    axes.axhline(100 * final, color=INK, linewidth=1, label=f"final mask {100 * final:.1f}")
    for (name, values), colour, dashes, marker in zip(quality.items(), SERIES, DASHES, "osD^v<", strict=False):
        best = int(np.argmax(values))
        text = f"{title(name)}, best {100 * values[best]:.1f} at {THRESHOLDS[best]:.1f}"
        axes.plot(THRESHOLDS, 100 * np.array(values), color=colour, linestyle=dashes, marker=marker, markersize=3, label=text)
    axes.set(xlabel="threshold of the prior", ylabel="mIoU (%)", xticks=THRESHOLDS, ylim=(0, None))
    axes.margins(y=0.14)
    figure.legend(loc="outside upper left", ncols=2, columnspacing=1)
    return figure


@styled
def cause_bars(rows: Sequence[Mapping], mark: str = "", cases: str = "episodes") -> Figure:
    """Draw the share of cases by cause of failure, a bar for every class and one for all (`cause_rows`)."""
    figure, axes = _figure(0.75 + 0.19 * len(rows), mark)
    left = np.zeros(len(rows))
    for cause, colour in CAUSE_COLOURS.items():
        share = np.array([100 * row["shares"].get(cause, 0) for row in rows])
        axes.barh(range(len(rows)), share, 0.74, left, color=colour, label=cause, edgecolor="none")
        left += share
    axes.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5),
             xlabel=f"share of the {cases} (%)")  # fmt: skip
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.axhline(len(rows) - 1.5, color=SOFT, linewidth=0.6)
    figure.legend(loc="outside upper left", ncols=3, handlelength=1, columnspacing=1.2)
    return figure


@styled
def scatter(a: np.ndarray, b: np.ndarray, names: tuple[str, str], mark: str = "", cases: str = "episodes") -> Figure:
    """Draw the IoU of every case under two systems, fractions; above the diagonal the second is better."""
    figure, axes = _figure(WIDTH, mark)
    axes.plot([0, 100], [0, 100], color=SOFT, linewidth=0.7)
    many = len(a) > 3000  # more are drawn as pixels: as single shapes they would need many megabytes
    axes.scatter(100 * a, 100 * b, s=30 / max(3, len(a) ** 0.35), color=SERIES[0], alpha=0.45, linewidths=0, rasterized=many)
    axes.set(xlim=(-2, 102), ylim=(-2, 102), aspect="equal", xlabel=f"IoU of {names[0]} (%)", ylabel=f"IoU of {names[1]} (%)")
    axes.text(2, 99, f"better in {(b > a).sum():,} {cases}", va="top")
    axes.text(99, 1, f"worse in {(b < a).sum():,} {cases}", ha="right")
    return figure


@styled
def svg(figure: Figure, alt: str) -> str:
    """Return the figure as an <svg> element, for a page that defines the colours of VARIABLES. It needs no other file."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": alt}):  # so that two figures on one page have different ids
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text).group()
    head = f'<svg role="img" aria-label="{html.escape(alt)}" {view}>'
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    text = re.sub(r"(font: [^;\"]*?px)[^;\"]*", r"\1 system-ui, 'DejaVu Sans', sans-serif", text)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var({name})")
    return re.sub(r"\n\s*", "\n", text)


def slug(name: str) -> str:
    """Return a name that is a file name and nothing else: letters, digits, _ and -. (A report may come from anywhere.)"""
    return re.sub(r"[^\w-]+", "-", name, flags=re.ASCII).strip("-")[:80] or "figure"


@styled
def save(folder: Path, name: str, figure: Figure) -> list[Path]:
    """Write NAME.pdf (vectors, fonts embedded) and NAME.png into the folder; return their paths. See `slug` for NAME."""
    paths = [folder / f"{slug(name)}.{kind}" for kind in ("pdf", "png")]
    for path in paths:
        with atomic(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=DPI)
    return paths


def _figure(height: float, mark: str) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height), layout="constrained")
    return _marked(figure, mark), figure.subplots()


def _marked(figure: Figure, mark: str) -> Figure:
    """Add a result's mark, which says that its scores mean nothing, to a figure."""
    if mark:
        figure.suptitle(mark, color=WARN, fontsize=7, fontweight="bold", x=0.99, ha="right")
    return figure


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)
