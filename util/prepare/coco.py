"""COCO-20i from COCO 2014: label PNGs with classes 1..80 and the lists ("PI-CLIP Sec. 1, Lists").

Class = rank of the category id (1..90 with gaps) among the 80. Where annotations overlap: crowd regions are painted
first, with their class, then the objects in file order; a later one overwrites. The published labels were overwritten in file
order too. Crowds are not ignored: their class is known, and BAM's filter must see a crowd of novel objects. They are painted
first because their outline is coarse and covers the objects inside.
"""

import json
import re
from array import array
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from util.data.folds import NUM_CLASSES, read_class_names
from util.data.transforms import check_sizes, image_hw
from util.errors import UserError
from util.prepare.common import absent, check_name, each, is_done, link, settle, write_label, write_list

CLASSES = NUM_CLASSES["coco"]
CLASS_FILE = Path(__file__).resolve().parents[2] / "lists/coco/classes.txt"
HIGHEST_ID = 90
SLACK = 1 / 20  # of a side; an outline that reaches further out is of another image, or another size of it
KNOWN = {"train2014": 82081, "val2014": 40137}
LAST_SHIFT = 30  # bits; a run of COCO's text has at most seven groups of five
NO_OUTLINE = "with a box but no outline (segmentation); it becomes background"
FEW_POINTS = "with a part of fewer than three points, which encloses nothing"
OUTSIDE = "outside their image"
NO_PIXEL = "too small for a pixel"
COVERED = "without a pixel left, covered by later ones"
Classes = Callable[[Path, Sequence[dict]], dict[int, int]]  # file, its categories -> category id -> class


@dataclass(frozen=True)
class Annotation:
    id: int
    cls: int  # 1..80
    crowd: bool
    segmentation: Any  # polygons [x0, y0, x1, y1, ...], or {"counts": [...]} of a crowd (or text, as COCO's tools write runs)


@dataclass(frozen=True)
class Labelled:
    """An image with at least one object."""

    name: str
    height: int
    width: int
    annotations: list[Annotation]  # in file order


class Painted(NamedTuple):
    """The label of an image, and the annotations that are not or only partly in it."""

    label: np.ndarray  # H W uint8
    contested: int  # pixels whose class the rule decided
    crowd: int  # pixels labelled by a crowd region
    lost: list[tuple[str, str]]  # why (NO_OUTLINE, ...), which annotation


def prepare(images: Path, annotations: Sequence[Path], out: Path, lists: Path, partial: bool) -> None:
    """Make `out` a data root (SPLIT linked to the images, annotations/SPLIT/*.png) and write `lists`/{train,val}.txt.

    `annotations`: JSON files with the split in their names, "train2014", "val2014", ...

    Raises:
        UserError: something is wrong in the input, or (without `partial`) missing from it.
    """
    splits = {path: split_of(path) for path in annotations}
    for kind in ("train", "val"):
        if len(same := [path.name for path, split in splits.items() if split.startswith(kind)]) > 1:
            raise UserError(f"{' and '.join(same)} would both be {kind}.txt; give one of them")
    for path, split in splits.items():
        _prepare_split(images, path, split, out, lists, partial)


def split_of(path: Path) -> str:
    """Return the split of a JSON: `train2014` of instances_train2014.json, `train` of Roboflow's train/_annotations.coco.json."""
    kind = r"(?:train|val)(?:\d{4})?"
    if not (match := re.search(kind, path.stem) or re.match(kind, path.parent.name)):
        raise UserError(f"{path}: the name of an annotation file says its split, e.g. instances_train2014.json; rename it")
    return match[0]


def _prepare_split(images: Path, path: Path, split: str, out: Path, lists: Path, partial: bool) -> None:
    labelled, unlabelled = read_annotations(path, split)
    print(f"{path}: {len(labelled):,} images with an object, {unlabelled:,} without (left out)")
    missing = []
    if len(labelled) != KNOWN.get(split, len(labelled)):
        missing.append(f"{path}: {len(labelled):,} images with an object, {split} has {KNOWN[split]:,}")
    folder, found = find_images(images, split, {image.name for image in labelled})
    missing += absent(f"images of {path.name} in {folder}", [image.name for image in labelled if image.name not in found])
    settle(missing, partial)
    labelled = [image for image in labelled if image.name in found]
    if not labelled:
        raise UserError(f"{path}: none of its images with an object is in {images} or {images / split}")
    link(folder, out / split)

    make = bind(make_label, path, folder, out / "annotations" / split)
    made = [c for c in each(make, labelled, f"labels of {split}") if c is not None]
    counts = [numbers for numbers, _ in made]
    contested, crowd, empty, pixels = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0, 1)
    print(f"{out / 'annotations' / split}: {len(counts):,} labels written, {len(labelled) - len(counts):,} were there")
    if counts:
        print(f"  the rule decided {contested:,} pixels claimed by several classes ({contested / pixels:.2%}); {crowd:,} pixels "
              f"({crowd / pixels:.2%}) are labelled by a crowd region; {empty} labels have no pixel of any class")
    for line in lost_lines(path, [loss for _, lost in made for loss in lost]):
        print(f"  {line}")
    kind = "train" if split.startswith("train") else "val"
    write_list(lists / f"{kind}.txt", [(f"{split}/{i.name}", f"annotations/{split}/{Path(i.name).stem}.png") for i in labelled])
    print(f"{lists / kind}.txt: {len(labelled):,} images" + (f" of {KNOWN[split]:,}" if split in KNOWN else ""))


def read_annotations(path: Path, split: str, classes: Classes | None = None) -> tuple[list[Labelled], int]:
    """Read an instances JSON: the images with an object, by name, and the number of images without.

    classes: category id -> class from the file's categories; None: those of COCO.

    Raises:
        UserError: naming the file and the entry that is wrong.
    """
    try:
        content = json.loads(path.read_bytes(), object_hook=_compact)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); a truncated download? fetch it again") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, numbers too long, brackets too deep
        raise UserError(f"{path}: not JSON ({error})") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise UserError(f"{path}: no COCO annotation file: expected the lists {', '.join(keys)}; give instances_{split}.json")
    try:
        return _checked(path, split, content, classes or classes_of)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no COCO instances: an entry lacks or mistypes a field "
                        f"({type(error).__name__}: {error}); give instances_{split}.json") from error


def classes_of(path: Path, categories: Sequence[dict]) -> dict[int, int]:
    """Map each category id to its class 1..80, its rank. The names must be those of lists/coco/classes.txt, in that order."""
    ordered = sorted(categories, key=lambda category: category["id"])
    ids, names = [c["id"] for c in ordered], tuple(c["name"] for c in ordered)
    expected = read_class_names(CLASS_FILE).names
    if beyond := [i for i in ids if not 1 <= i <= HIGHEST_ID]:
        raise UserError(f"{path}: category ids {beyond}; those of COCO lie in 1..{HIGHEST_ID}")
    if names != expected or len(set(ids)) != CLASSES:
        differing = sorted(set(names) ^ set(expected)) or "their order or number"
        raise UserError(f"{path}: its {len(names)} categories are not the {CLASSES} of {CLASS_FILE}; they differ in: {differing}")
    return {i: rank for rank, i in enumerate(ids, start=1)}


def paint(path: Path, image: Labelled) -> Painted:
    """Draw the annotations of an image. Raises UserError, naming the annotation, where it cannot belong to this image."""
    shape = image.height, image.width
    label, owner = np.zeros(shape, np.uint8), np.full(shape, -1, np.int32)
    contested, crowd = np.zeros(shape, bool), np.zeros(shape, bool)
    drawn, lost = {}, []
    for number, annotation in enumerate(sorted(image.annotations, key=lambda a: not a.crowd)):  # stable: file order within each
        mask, reason = rasterise(path, annotation, *shape)
        contested |= mask & (label != 0) & (label != annotation.cls)
        crowd[mask] = annotation.crowd
        label[mask], owner[mask] = annotation.cls, number
        if reason:
            lost.append((reason, annotation))
        if mask.any():
            drawn[number] = annotation
    for number in sorted(drawn.keys() - set(np.unique(owner).tolist())):  # later ones of its own class do it no harm
        if not (label[rasterise(path, drawn[number], *shape)[0]] == drawn[number].cls).any():
            lost.append((COVERED, drawn[number]))
    return Painted(label, int(contested.sum()), int(crowd.sum()), [(why, f"{a.id} ({image.name})") for why, a in lost])


def lost_lines(path: Path, lost: Sequence[tuple[str, str]]) -> list[str]:
    """Describe which annotations of a file are not or only partly in the labels, a line for each reason."""
    return [line for reason in dict.fromkeys(why for why, _ in lost)
            for line in absent(f"annotations of {path.name} {reason}", [name for why, name in lost if why == reason])]


def rasterise(path: Path, annotation: Annotation, height: int, width: int) -> tuple[np.ndarray, str]:
    """Draw an annotation as COCO's own tools do, H W bool; also return why some or all pixels are missing, or "".

    Polygons of one annotation are united.
    """
    where, shape = f"{path}: annotation {annotation.id}", annotation.segmentation
    if isinstance(shape, dict) and shape:
        counts, size = shape.get("counts"), shape.get("size")
        sized = size == [height, width] and bool not in map(type, size)  # True equals 1
        if sized and isinstance(counts, str):  # as COCO's tools write them
            counts = _runs(counts, height * width + 2)
        runs = sized and isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts)
        if not runs or sum(counts) != height * width:
            raise UserError(f"{where}: run lengths that do not fill its image, {height} x {width}; fetch the file again")
        mask = rle.decode(rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)).astype(bool)
        return mask, "" if mask.any() else NO_PIXEL
    nothing = np.zeros((height, width), bool)
    if not shape or (isinstance(shape, list) and not any(map(_length, shape))):
        return nothing, NO_OUTLINE
    if not isinstance(shape, list) or not all(isinstance(p, array) and _drawable(p) for p in shape):
        raise UserError(f"{where}: its segmentation is neither polygons x0, y0, x1, y1, ... nor runs; fetch the file again")
    points = np.concatenate([np.reshape(p, (-1, 2)) for p in shape])
    low, high, sides = points.min(0), points.max(0), np.array([width, height])
    if ((low < -sides * SLACK - 1) | (high > sides * (1 + SLACK) + 1)).any():
        raise UserError(f"{where}: its outline, from x, y = {low[0]:g}, {low[1]:g} to {high[0]:g}, {high[1]:g}, reaches beyond "
                        f"the {width} x {height} pixels of its image. Was it drawn on another size, or on the photo as its EXIF "
                        "note turns it, the size taken as stored? Export it again from upright images without the note")
    whole = [p for p in shape if len(p) >= 6]  # two points enclose nothing
    mask = rle.decode(rle.merge(rle.frPyObjects(whole, height, width))).astype(bool) if whole else nothing
    if len(whole) < len(shape):
        return mask, FEW_POINTS
    beside = (low >= sides).any() or (high <= 0).any()
    return mask, "" if mask.any() else OUTSIDE if beside else NO_PIXEL


def _length(polygon: Any) -> int:
    return len(polygon) if isinstance(polygon, array) else 1


def _runs(text: str, most: int) -> list[int] | None:
    """Decode run lengths from COCO's text: groups of 5 bits, low first; from the fourth run on, differences to the run two
    before.

    Returns None for other characters, a run with more bits than COCO's tools have, or more runs than `most`.
    """
    runs: list[int] = []
    value = shift = 0
    for code in (ord(character) - 48 for character in text):
        if not 0 <= code < 64 or shift > LAST_SHIFT or len(runs) > most:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16 and 1) << shift  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def _drawable(polygon: array) -> bool:
    """Check that an outline has pairs of numbers, and a size that pycocotools can draw; it crashes or hangs on others."""
    if len(polygon) % 2 or not (np.abs(polygon) < 2**16).all():  # false for NaN too
        return False
    return np.abs(np.diff(np.reshape(polygon, (-1, 2)), axis=0)).sum() < 2**22


def make_label(path: Path, images: Path, folder: Path, image: Labelled) -> tuple[tuple[int, int, int, int], list] | None:
    """Write a label; return its contested, crowd, empty (0 or 1) and all pixels, and the lost annotations; None if it exists.

    images: the folder of the image. The image's size is checked before the size in the JSON takes memory.
    """
    target, hw = folder / f"{Path(image.name).stem}.png", (image.height, image.width)
    check_sizes(images / image.name, image_hw(images / image.name), path, hw)
    if is_done(target, hw, CLASSES):
        return None
    painted = paint(path, image)
    write_label(target, painted.label)
    return (painted.contested, painted.crowd, int(not painted.label.any()), painted.label.size), painted.lost


def _checked(path: Path, split: str, content: dict, classes_of: Classes) -> tuple[list[Labelled], int]:
    for kind, keys in (("images", ("id",)), ("annotations", ("id", "image_id", "category_id")), ("categories", ("id",))):
        for key in keys:
            if wrong := [entry for entry in content[kind] if isinstance(entry.get(key), bool)]:  # true equals 1
                raise UserError(f"{path}: {len(wrong)} {kind} whose {key} is {str(wrong[0][key]).lower()}, which is no number")
    classes = classes_of(path, content["categories"])
    images: dict[int, Labelled] = {}
    stems: dict[str, int] = {}
    for entry in content["images"]:
        number, where = entry["id"], f"{path}: image {entry['id']}"
        name = check_name(where, entry["file_name"])
        if (other := re.match(r"COCO_(train|val)\d{4}_", name)) and split and not split.startswith(other[1]):
            raise UserError(f"{where}: {name} is a {other[1]} image, but the file name says {split}; rename the JSON")
        if (first := stems.setdefault(Path(name).stem, number)) != number or number in images:
            raise UserError(f"{where}: {name} is there twice (image {first}); remove one")
        if not all(type(side) is int and 0 < side < 2**15 for side in (entry["height"], entry["width"])):
            raise UserError(f"{where}: height {entry['height']!r}, width {entry['width']!r}; fetch the file again")
        images[number] = Labelled(name, entry["height"], entry["width"], [])
    for entry in content["annotations"]:
        if entry["image_id"] not in images:
            raise UserError(f"{path}: annotation {entry['id']}: no image {entry['image_id']} in the file")
        if entry["category_id"] not in classes:
            raise UserError(f"{path}: annotation {entry['id']}: unknown category {entry['category_id']}")
        found = Annotation(entry["id"], classes[entry["category_id"]], bool(entry.get("iscrowd", 0)), entry.get("segmentation"))
        images[entry["image_id"]].annotations.append(found)
    labelled = sorted((image for image in images.values() if image.annotations), key=lambda image: image.name)
    return labelled, len(images) - len(labelled)


def _compact(entry: dict) -> dict:
    """Store polygons as arrays: all of COCO train as lists of Python numbers would need several times the memory."""
    if isinstance(polygons := entry.get("segmentation"), list):
        with suppress(TypeError, OverflowError):  # not numbers: `rasterise` says so
            if all(set(map(type, polygon)) <= {int, float} for polygon in polygons):  # True would be 1.0
                entry["segmentation"] = [array("d", polygon) for polygon in polygons]
    return entry


def find_images(images: Path, split: str, names: Collection[str]) -> tuple[Path, set[str]]:
    """Find the folder of a split and which of `names` it has: images/SPLIT, `images`, or another images/train... (val...).

    The folder with most of them is taken; Roboflow writes `valid`, others `train2017`.
    """
    kind = (re.match("train|val", split) or [None])[0]
    others = sorted(images.iterdir()) if kind and images.is_dir() else []
    folders = [folder for folder in (images / split, images, *(f for f in others if f.name.lower().startswith(kind)))
               if folder.is_dir()]  # fmt: skip
    if not folders:
        raise UserError(f"--images {images}: no such folder")
    found = {folder: {path.name for path in folder.iterdir()}.intersection(names) for folder in folders}
    folder = max(folders, key=lambda folder: len(found[folder]))
    return folder, found[folder]
