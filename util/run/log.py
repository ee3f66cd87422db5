"""Output of a run: lines to `train.log` and the console, a live progress line, curves (`curves.jsonl` and TensorBoard).

Only the main rank writes. On other ranks every call does nothing, so callers need not know their rank.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX import SummaryWriter

from util.errors import UserError
from util.files import written
from util.run import curves

ADVICE = {
    "wandb": "install it (pip install wandb), log in (wandb login) or set WANDB_MODE=offline, or use Runtime.tracker=tensorboard",
    "trackio": "install it (pip install trackio), or use Runtime.tracker=tensorboard",
}


@contextmanager
def tracking(tracker: str, name: str, folder: Path, config: Mapping) -> Iterator[Any]:
    """Yield a run of Weights & Biases ("wandb") or Trackio ("trackio") for `RunLog`, else None.

    Raises:
        UserError: the package is not there, or cannot start.
    """
    if tracker not in ADVICE:
        yield None
        return
    try:
        package = importlib.import_module(tracker)
    except ImportError as error:
        raise UserError(f"Runtime.tracker={tracker}: the package is not there; {ADVICE[tracker]}") from error
    if not hasattr(package, "init"):
        hiding = next(iter(package.__path__), tracker)
        raise UserError(f"Runtime.tracker={tracker}: {hiding} hides the package of that name; rename it, or start elsewhere")
    folder.mkdir(parents=True, exist_ok=True)
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # a run that goes on stays one run
    own = {"id": identity, "name": name, "dir": folder} if tracker == "wandb" else {"name": f"{name} {identity[:6]}"}
    try:
        run = package.init(project="few-shot", resume="allow", config=dict(config), **own)
    except Exception as error:  # no login, no network, and whatever else a tracker raises
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"Runtime.tracker={tracker} could not start ({reason}); {ADVICE[tracker]}") from error
    try:
        yield run
    finally:
        run.finish()


@dataclass(frozen=True)
class Ahead:
    """What follows a progress line until `name` ends: steps like its own, and seconds of other work.

    more: there is other work, too, of unknown length.
    """

    name: str
    steps: int = 0
    seconds: float = 0.0
    more: bool = False


class _Console(logging.Handler):
    """Write log lines above the live line, which stays last on a terminal."""

    def __init__(self, stream: TextIO, level: int):
        super().__init__(level)
        self.stream, self.live = stream, ""
        self.tty = stream.isatty()

    def emit(self, record: logging.LogRecord) -> None:
        wipe = "\r\x1b[K" if self.live else ""
        self.stream.write(f"{wipe}{self.format(record)}\n{self.live}")
        self.stream.flush()

    def draw(self, line: str) -> None:
        """Replace the live line ('' removes it)."""
        self.live = line
        self.stream.write("\r\x1b[K" + line)
        self.stream.flush()


class RunLog:
    """The log of one run, a context manager.

    folder: made if missing; holds `name` (appended to, so that a resumed run continues it) and, made with the first
    point of a curve, `curves.jsonl` (see util/run/curves.py) and `events/` (TensorBoard). quiet: the console shows
    warnings only. main: False on ranks > 0, which stay silent. tracked: see `tracking`; it gets the curves too.
    """

    def __init__(self, folder: str | Path, name: str = "train.log", quiet: bool = False, main: bool = True,
                 stream: TextIO | None = None, tracked: Any = None):
        self.folder, self.main, self.quiet, self.tracked = Path(folder), main, quiet, tracked
        self.writer: SummaryWriter | None = None
        self.ahead: Ahead | None = None  # of the progress lines to come
        self._logger = logging.Logger(str(self.folder / name))  # not getLogger, so that two runs in one process share nothing
        self._logger.addHandler(logging.NullHandler())  # without any, Python prints warnings to stderr
        if not main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.console = _Console(stream or sys.stdout, logging.WARNING if quiet else logging.INFO)
        self.file = logging.FileHandler(self.folder / name, encoding="utf-8")
        for handler, dates in ((self.console, "%H:%M:%S"), (self.file, "%Y-%m-%d %H:%M:%S")):
            handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", dates))
            self._logger.addHandler(handler)

    def info(self, text: str) -> None:
        """Write one line (or several) to the file and the console."""
        self._logger.info(text)

    def warning(self, text: str) -> None:
        """Write as `info`, marked, and also when quiet."""
        self._logger.warning(f"WARNING: {text}")

    def scalars(self, values: Mapping[str, float], step: int, group: str = "") -> None:
        """Add points to the curves `group/name`; the values may be 0-dim tensors."""
        if writer := self._events():
            values = {name: float(value) for name, value in values.items()}
            with written(self.folder / curves.FILE):
                curves.append(self.folder / curves.FILE, group, step, values)
            named = {f"{group}/{name}" if group else name: value for name, value in values.items()}
            for name, value in named.items():
                writer.add_scalar(name, value, step)
            if self.tracked is not None:
                self.tracked.log(named, step=step)

    def rewind(self, steps: Mapping[str, int]) -> None:
        """Remove the points after the given step of each group from `curves.jsonl`: a run that continues there, or starts again
        at 0, writes them again."""
        if self.main:
            with written(self.folder / curves.FILE):
                curves.cut(self.folder / curves.FILE, steps)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Add a picture to TensorBoard: H W 3 uint8 RGB."""
        if writer := self._events():
            writer.add_image(name, image, step, dataformats="HWC")

    def progress(self, total: int, label: str = "", start: int = 0) -> Progress:
        """Return a progress line for steps start..total. It also says when all ends that is `ahead`."""
        return Progress(self, total, label, start)

    def _events(self) -> SummaryWriter | None:
        if self.main and self.writer is None:
            self.writer = SummaryWriter(str(self.folder / "events"), flush_secs=30)
        return self.writer

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        self.main = False
        if self.writer:
            self.writer.close()
            self.writer = None
        for handler in self._logger.handlers[1:]:
            self._logger.removeHandler(handler)
            handler.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Progress:
    """`epoch 3/200  120/526  loss 0.532 (main 0.41)  lr 9.9e-05  61.2 img/s  epoch ends in 6 min, training in 20 h 10 min`

    On a terminal one live line, drawn at most ten times a second; elsewhere (and in the file) a plain line every 30 s
    and at the end. Tensors are read only when a line is due, so a GPU is not made to wait at every step.
    """

    LIVE_SECONDS, PLAIN_SECONDS, WINDOW = 0.1, 30.0, 200

    def __init__(self, log: RunLog, total: int, label: str, start: int):
        self.log, self.total, self.label, self.done, self.ahead = log, total, label, start, log.ahead
        now = time.monotonic()
        self.history = deque([(now, start, 0)], maxlen=self.WINDOW)  # (time, step, images): speed over the last steps
        self.images, self.drawn, self.written, self.line = 0, 0.0, now, ""
        self.fields: tuple[Mapping[str, float], float | None] = ({}, None)

    def step(self, images: int = 1, losses: Mapping[str, float] | None = None, lr: float | None = None) -> None:
        """Count a finished step of `images` images. losses: entries that sum to the loss (floats or 0-dim tensors)."""
        now = time.monotonic()
        self.done, self.images, self.fields = self.done + 1, self.images + images, (losses or {}, lr)
        self.history.append((now, self.done, self.images))
        if not self.log.main:
            return
        if self.log.console.tty and not self.log.quiet and now - self.drawn >= self.LIVE_SECONDS:
            self.drawn = now
            self.log.console.draw(str(self))
        if now - self.written >= self.PLAIN_SECONDS:
            self._write(now)

    def __str__(self) -> str:
        losses, lr = self.fields
        parts = [self.label] if self.label else []
        parts.append(f"{self.done}/{self.total}")
        if losses:
            values = {name: float(value) for name, value in losses.items()}
            detail = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            parts.append(f"loss {sum(values.values()):.4f}" + (f" ({detail})" if len(values) > 1 else ""))
        if lr is not None:
            parts.append(f"lr {lr:.2e}")
        if pace := self.pace:
            (t0, _, images0), (t1, _, images1) = self.history[0], self.history[-1]
            parts.append(f"{(images1 - images0) / max(t1 - t0, 1e-9):.1f} img/s")
            here = (self.total - self.done) * pace
            end = f"{self.label.rstrip(' /0123456789') or 'this'} ends in {spelled(here)}"
            if ahead := self.ahead:
                end += f", {ahead.name} in {'more than ' * ahead.more}{spelled(here + ahead.steps * pace + ahead.seconds)}"
            parts.append(end)
        return "  ".join(parts)

    @property
    def pace(self) -> float:
        """Seconds a step, over the last steps; 0 before the first."""
        (t0, step0, _), (t1, step1, _) = self.history[0], self.history[-1]
        return max(t1 - t0, 1e-9) / (step1 - step0) if step1 > step0 else 0.0

    def _write(self, now: float) -> None:
        """Write a plain line to the file, and to the console where there is no live line."""
        self.written, self.line = now, str(self)
        if self.log.console.tty:
            self.log.file.handle(logging.LogRecord("", logging.INFO, "", 0, self.line, None, None))
        else:
            self.log.info(self.line)

    def close(self) -> None:
        """Remove the live line and write the last state as a plain line."""
        if not self.log.main:
            return
        if self.log.console.live:
            self.log.console.draw("")
        if str(self) != self.line and self.images:
            self.line = str(self)
            self.log.info(self.line)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def spelled(seconds: float) -> str:
    """Return a time in words, rounded for people: 40 s, 12 min, 5 h 20 min, 3 days 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{round(seconds)} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} days {hours % 24} h"


def duration(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
