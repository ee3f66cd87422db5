"""Shared by all data sets: labels, lists, links, and reports of missing files. Every file appears whole or not at all."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from util.data.transforms import IGNORE, read_label
from util.errors import UserError
from util.files import atomic
from util.pool import cores, parallel

NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)  # an image id or file name: no folder, blank or backslash
SERIAL_BELOW = 200  # fewer files are faster without worker processes


def check_name(where: str, name: str) -> str:
    """Return the name of an image. Raises UserError, beginning with `where`, unless a list and every file system can hold it."""
    if not NAME.fullmatch(name):
        raise UserError(f"{where}: {name!r} is no image name: letters, digits, '_', '-' and '.' only, without folder (no '/' or "
                        "'\\') or blank; correct it")
    return name


def read_ids(path: Path) -> list[str]:
    """Read an image set, one id a line (UTF-8; LF or CRLF), no id twice. Raises UserError naming file and line."""
    if not path.is_file():
        raise UserError(f"{path}: not there; it names the images, fetch the data set again or put the file there")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); save it as UTF-8, or fetch it again") from error
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not (name := line.strip()):
            continue
        check_name(f"{path}:{number}", name)
        if name in lines:
            raise UserError(f"{path}:{number}: {name} is already on line {lines[name]}; remove one")
        lines[name] = number
    return list(lines)


def write_list(path: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write (image, label) pairs as `util.data.index.read_list` reads them."""
    with atomic(path) as temporary:
        temporary.write_bytes("".join(f"{image} {label}\n" for image, label in pairs).encode())


def check_classes(path: str | Path, label: np.ndarray, classes: int) -> None:
    """Raise UserError, naming `path`, where an H W uint8 label holds other values than 0..classes and 255."""
    strange = [int(v) for v in np.flatnonzero(np.bincount(label.ravel())) if classes < v < IGNORE]
    if strange:
        raise UserError(f"{path}: label values {strange} are no class; expected 0..{classes} and {IGNORE} (ignore). "
                        "Replace the file, or delete it where this command made it, and run again")


def write_label(path: Path, label: np.ndarray) -> None:
    """Write an H W uint8 label as a grey PNG: PIL and OpenCV read the same values from it, unlike from a palette PNG."""
    with atomic(path) as temporary:
        Image.fromarray(label).save(temporary, format="PNG")


def is_done(path: Path, hw: tuple[int, int], classes: int) -> bool:
    """Return whether an earlier run made this label. Raises UserError if something else is there."""
    if not path.is_file():
        return False
    try:
        label = read_label(path)
    except UserError as error:
        raise UserError(f"{error}; where this command made it, delete it and run again") from error
    check_classes(path, label, classes)
    if label.shape != tuple(hw):
        raise UserError(f"{path} is {label.shape} (height, width), the image {tuple(hw)}: not its label; delete it and run again")
    return True


def each(function: Callable[[Any], Any], jobs: Collection[Any], what: str) -> Iterator[Any]:
    """Run `function` over every job, in order, on all cores, with a progress bar."""
    progress = partial(tqdm, total=len(jobs), desc=what, disable=None)
    workers = cores()
    if workers < 2 or len(jobs) < SERIAL_BELOW:
        yield from progress(map(function, jobs))
        return
    yield from progress(parallel(function, jobs, workers, chunk=8))


def link(source: Path, target: Path) -> None:
    """Link `target` to the folder `source`, so that the data root has it without a copy."""
    if target.is_symlink() and not target.exists():
        raise UserError(f"{target} points to {os.readlink(target)}, which is gone; delete the link and run again")
    if target.exists():
        if not target.samefile(source):
            raise UserError(f"{target} is there and is not {source}; delete it, or choose another --out")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve(), target_is_directory=True)


def absent(what: str, names: Sequence[str]) -> list[str]:
    """Return a line for `settle` with the number of missing files and the first of them; no line where none is missing."""
    return [f"{len(names):,} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"] if names else []


def settle(missing: Sequence[str], partly: bool) -> None:
    """Report missing files. Raises UserError with them unless a part of the data set is wanted (`--partial`)."""
    if not missing:
        return
    text = "\n".join(f"  {line}" for line in missing)
    if not partly:
        raise UserError(f"missing:\n{text}\nadd it and run the same command again, or prepare what there is with --partial")
    print(f"--partial, going on without:\n{text}")
