"""Check every image and mask before anything is written: list the faults, and count each class and fold."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from util.data.episodes import EpisodeList, draw
from util.data.folds import ClassNames
from util.data.index import Index, Record, build_index
from util.data.transforms import IGNORE, open_image, read_image, read_label
from util.errors import UserError
from util.prepare.common import absent, check_classes, each
from util.prepare.custom.sources import Pair, check_stored, refuse

PARTS = "train", "val"
VAL_SHARE = 0.2
NEEDED = 2  # images of a class in either part: a query and a support
TURNED = "images have an EXIF note to turn them, masks of the size as stored: both are used as they are stored"
DARK = 16  # a colour below it counts as black
BRIGHT = "masks have a palette whose entry 0 is not black; by its value, not its colour, it is the background"
SPECK = 64  # pixels; a smaller region is no object but an edge of one


@dataclass(frozen=True)
class Seen:
    """A pair that was read."""

    part: str
    record: Record
    objects: dict[int, int]  # class -> connected regions of at least SPECK pixels
    content: str = ""  # hash of the image's pixels
    remarks: tuple[str, ...] = ()  # warnings for the user


def classes(names: ClassNames) -> None:
    """Raise UserError unless there are 2 to 254 classes, none of them the background."""
    if not 2 <= (count := len(names.names)) < IGNORE:
        raise UserError(f"{count} class{'es' * (count != 1)} named; needed are 2 to {IGNORE - 1}, since a system is "
                        "trained on some and tested on others. To find one kind of thing by a few examples: predict.py --support")
    if zero := [name for name in names.names if name.strip("_ ").lower() in ("background", "ignore", "void")]:
        raise UserError(f"{zero[0]!r} among the classes: background (0) and ignore ({IGNORE}) have no name; line 1 is value 1")


def look(pairs: Sequence[Pair], classes: int) -> list[Seen]:
    """Read all pairs, on all cores. Raises UserError with all faults (the first ten)."""
    results = list(each(partial(_look, classes), pairs, "reading images and masks"))
    refuse([result for result in results if isinstance(result, str)], len(pairs))
    if not any(seen.record.pixels for seen in results):
        raise UserError("no mask shows any class: a pixel's value is the line of its class in classes.txt, 0 is background, "
                        "255 is ignored (a black-and-white mask must have 1 for white)")
    return results


def _look(classes: int, pair: Pair) -> Seen | str:
    """Return the pair, or its fault."""
    remarks = []
    try:
        image, label = read_image(pair.image), read_label(pair.label)  # as a run reads them
        if check_stored(pair.image, pair.label, label.shape):
            remarks.append(TURNED)
        check_classes(pair.label, label, classes)
    except UserError as error:
        return f"{error}{'; colours need a labelmap.txt (docs/custom-data.md)' * ('not RGB' in str(error))}"
    with open_image(pair.label) as opened:
        if opened.mode == "P" and max(opened.getpalette()[:3]) >= DARK:
            remarks.append(BRIGHT)
    counts = np.bincount(label.ravel(), minlength=IGNORE + 1)
    pixels = {int(c): int(counts[c]) for c in np.flatnonzero(counts) if c not in (0, IGNORE)}
    objects = {c: _regions(label == c) for c in pixels}
    content = hashlib.blake2b(repr(image.shape).encode() + image.astype(np.uint8).tobytes(), digest_size=16).hexdigest()
    return Seen(pair.part, Record(*pair.line, *label.shape, pixels, tuple(pixels)), objects, content, tuple(remarks))


def _regions(mask: np.ndarray) -> int:
    """Count the 8-connected regions of an H W bool mask, without specks."""
    sizes = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)[2][1:, cv2.CC_STAT_AREA]
    return int((sizes >= SPECK).sum())


def parted(seen: Sequence[Seen], min_pixels: int, earlier: Mapping[str, str]) -> list[Seen]:
    """Give every image in no list a part: that of `earlier` (image -> part), so that no image changes sides when others are
    added. Of the new images VAL_SHARE, by a hash of the name, are for validation. Some new images are moved where a
    class has fewer than NEEDED in one part and enough in the other."""
    parts = {s.record.image: s.part or earlier.get(s.record.image, "") for s in seen}
    number = {image: draw(2**32, "own data", Path(image).stem) / 2**32 for image in parts}
    free = sorted((image for image, part in parts.items() if not part), key=number.__getitem__)
    parts |= {image: "val" if number[image] < VAL_SHARE else "train" for image in free}
    shown = {s.record.image: {c for c, n in s.record.pixels.items() if n >= min_pixels} for s in seen}
    count = {part: Counter(c for image, own in parts.items() if own == part for c in shown[image]) for part in PARTS}
    for short, other, order in ((*PARTS[::-1], free), (*PARTS, free[::-1])):  # validation first, small numbers first
        for image in order:
            if (parts[image] == other and any(count[short][c] < NEEDED for c in shown[image])
                    and all(count[other][c] > NEEDED for c in shown[image])):  # fmt: skip
                parts[image] = short
                count[short].update(shown[image])
                count[other].subtract(shown[image])
    return [replace(s, part=parts[s.record.image]) for s in seen]


def enough(seen: Sequence[Seen], names: ClassNames, folds: Sequence[Sequence[int]], min_pixels: int) -> None:
    """Raise UserError for classes with too few images to train or to test on."""
    novel = {c for fold in folds for c in fold}
    short = {}  # class -> images in train and val
    for c in range(1, len(names.names) + 1):
        train, val = (_count(seen, part, c, min_pixels) for part in ("train", "val"))
        if train < NEEDED or (c in novel and val < NEEDED):
            short[c] = f"{names.names[c - 1]} ({train} and {val})"
    if short:
        others = ", ".join(name for c, name in enumerate(names.names, start=1) if c not in short)
        raise UserError(f"too few images for training and validation of {', '.join(short.values())}\n"
                        f"A class needs {NEEDED} and {NEEDED}, each with {min_pixels:,} pixels of it. Add images, name the parts "
                        "yourself (train.txt, val.txt), lower --min-pixels, keep the class out of folds.yaml (it is then never "
                        f"tested) or, with COCO, out of --classes. Enough: {others or 'none'}")


def remarks(seen: Sequence[Seen]) -> list[str]:
    """Return warnings about possible mistakes, a line for each kind."""
    lines = [line for remark in (TURNED, BRIGHT)
             for line in absent(remark, [s.record.image for s in seen if remark in s.remarks])]  # fmt: skip
    train = {s.content: s.record.image for s in seen if s.part == "train"}
    copies = [f"{s.record.image} ({train[s.content]})" for s in seen if s.part == "val" and s.content in train]
    lines += absent("images of validation are the same image as one of training: results are too good; remove one", copies)
    return [f"warning: {line}" for line in lines]


def table(seen: Sequence[Seen], names: ClassNames, folds: Sequence[Sequence[int]], min_pixels: int) -> str:
    """Format images and objects of each class, and images of each fold."""
    width = max(len(name) for name in (*names.names, "class"))
    split = {c: f"split{i}" for i, fold in enumerate(folds) for c in fold}
    lines = [f"     {'class':<{width}}   train: images  objects   val: images  objects   novel in"]
    for c, name in enumerate(names.names, start=1):
        cells = {part: (_count(seen, part, c, min_pixels), sum(s.objects.get(c, 0) for s in seen if s.part == part))
                 for part in ("train", "val")}
        lines.append(f"{c:3d}  {name:<{width}}   {cells['train'][0]:13d}  {cells['train'][1]:7d}   {cells['val'][0]:11d}  "
                     f"{cells['val'][1]:7d}   {split.get(c, 'no fold')}")
    totals = {part: sum(s.part == part for s in seen) for part in ("train", "val")}
    lines.append(f"{totals['train']} images for training, {totals['val']} for validation; a class counts from {min_pixels:,} "
                 "pixels on")
    for i, novel in enumerate(folds):
        train, val = _indices(seen, names, novel, min_pixels)
        lines.append(f"split{i}: {len(train.records)} training images (without novel objects), "
                     f"{len(val.records)} validation images of {', '.join(names.names[c - 1] for c in novel)}")
    return "\n".join(lines)


def stuck(seen: Sequence[Seen], names: ClassNames, folds: Sequence[Sequence[int]], min_pixels: int) -> dict[int, str]:
    """Return the folds that cannot run, each with a warning."""
    found = {}
    for i, novel in enumerate(folds):
        for index in _indices(seen, names, novel, min_pixels):
            try:
                EpisodeList(index, shot=NEEDED - 1, seed=0)
            except UserError as error:
                found[i] = (f"warning: split{i} cannot run yet: {error}; or put classes that appear together into one fold "
                            "(folds.yaml), or train with Train.filter_novel=false")
    return found


def _indices(seen: Sequence[Seen], names: ClassNames, novel: Sequence[int], min_pixels: int) -> list[Index]:
    """Return the index of training and that of validation."""
    base = [c for c in range(1, len(names.names) + 1) if c not in novel]
    return [build_index([s.record for s in seen if s.part == part], classes, only, min_pixels, names.names)
            for part, classes, only in (("train", base, True), ("val", novel, False))]


def _count(seen: Sequence[Seen], part: str, cls: int, min_pixels: int) -> int:
    """Count the images of a part in which a class counts."""
    return sum(s.record.pixels.get(cls, 0) >= min_pixels for s in seen if s.part == part)
