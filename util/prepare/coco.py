"""COCO-20i from COCO 2014: label PNGs with classes 1..80 and the lists ("PI-CLIP Sec. 1, Lists").

Class = rank of the category id (1..90 with gaps) among the 80. The one rule for pixels that several annotations claim:
crowd regions are painted first, with their class, then the objects in file order; the later overwrites. The published labels
were overwritten in file order as well. A crowd is of a known class, and BAM's filter must see a crowd of novel objects, so
it is not ignored; it lies beneath because its outline is coarse and runs over the objects among it.
"""

import json
import re
from array import array
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from util.data.folds import NUM_CLASSES, read_class_names
from util.errors import UserError
from util.prepare.common import absent, check_name, each, is_done, link, settle, write_label, write_list

CLASSES = NUM_CLASSES["coco"]
CLASS_FILE = Path(__file__).resolve().parents[3] / "lists/coco/classes.txt"
HIGHEST_ID = 90
KNOWN = {"train2014": 82081, "val2014": 40137}
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


def prepare(images: Path, annotations: Sequence[Path], out: Path, lists: Path, partial: bool) -> None:
    """Make `out` a data root (SPLIT linked to the images, annotations/SPLIT/*.png) and write `lists`/{train,val}.txt.

    `annotations`: JSON files with "train2014", "val2014", ... in their names, which says the split.

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
    """`train2014` of instances_train2014.json."""
    if not (match := re.search(r"(?:train|val)(?:\d{4})?", path.stem)):
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

    make = bind(make_label, path, out / "annotations" / split)
    counts = [c for c in each(make, labelled, f"labels of {split}") if c is not None]
    contested, crowd, empty, pixels = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0, 1)
    print(f"{out / 'annotations' / split}: {len(counts):,} labels written, {len(labelled) - len(counts):,} were there")
    if counts:
        print(f"  the rule decided {contested:,} pixels claimed by several classes ({contested / pixels:.2%}); {crowd:,} pixels "
              f"({crowd / pixels:.2%}) are labelled by a crowd region; {empty} labels have no pixel of any class")
    kind = "train" if split.startswith("train") else "val"
    write_list(lists / f"{kind}.txt", [(f"{split}/{i.name}", f"annotations/{split}/{Path(i.name).stem}.png") for i in labelled])
    print(f"{lists / kind}.txt: {len(labelled):,} images" + (f" of {KNOWN[split]:,}" if split in KNOWN else ""))


def read_annotations(path: Path, split: str, classes: Classes | None = None) -> tuple[list[Labelled], int]:
    """Read an instances JSON: the images with an object by name, and how many have none.

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
    """Category id -> class 1..80: the rank of the id. The names must be those of lists/coco/classes.txt, in that order."""
    ordered = sorted(categories, key=lambda category: category["id"])
    ids, names = [c["id"] for c in ordered], tuple(c["name"] for c in ordered)
    expected = read_class_names(CLASS_FILE).names
    if beyond := [i for i in ids if not 1 <= i <= HIGHEST_ID]:
        raise UserError(f"{path}: category ids {beyond}; those of COCO lie in 1..{HIGHEST_ID}")
    if names != expected or len(set(ids)) != CLASSES:
        differing = sorted(set(names) ^ set(expected)) or "their order or number"
        raise UserError(f"{path}: its {len(names)} categories are not the {CLASSES} of {CLASS_FILE}; they differ in: {differing}")
    return {i: rank for rank, i in enumerate(ids, start=1)}


def paint(path: Path, image: Labelled) -> tuple[np.ndarray, int, int]:
    """The label of an image, H W uint8, pixels whose class the rule decided, and pixels labelled by a crowd region."""
    label = np.zeros((image.height, image.width), np.uint8)
    contested, crowd = np.zeros_like(label, bool), np.zeros_like(label, bool)
    for annotation in sorted(image.annotations, key=lambda a: not a.crowd):  # stable: file order within each
        mask = rasterise(path, annotation, image.height, image.width)
        contested |= mask & (label != 0) & (label != annotation.cls)
        crowd[mask] = annotation.crowd
        label[mask] = annotation.cls
    return label, int(contested.sum()), int(crowd.sum())


def rasterise(path: Path, annotation: Annotation, height: int, width: int) -> np.ndarray:
    """The pixels of an annotation as COCO's own tools draw them, H W bool. Polygons of one annotation are united."""
    where, shape = f"{path}: annotation {annotation.id}", annotation.segmentation
    if isinstance(shape, dict):
        counts = shape.get("counts")
        if isinstance(counts, str):  # as COCO's tools write them
            counts = _runs(counts)
        runs = isinstance(counts, list) and all(isinstance(run, int) and run >= 0 for run in counts)
        if not runs or sum(counts) != height * width or shape.get("size") != [height, width]:
            raise UserError(f"{where}: run lengths that do not fill its image, {height} x {width}; fetch the file again")
        return rle.decode(rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)).astype(bool)
    if not isinstance(shape, list) or not all(isinstance(p, array) and _drawable(p) for p in shape):
        raise UserError(f"{where}: its segmentation is neither polygons x0, y0, x1, y1, ... nor runs; fetch the file again")
    drawn = [p for p in shape if len(p) >= 6]  # two points enclose nothing
    if not drawn:
        return np.zeros((height, width), bool)
    return rle.decode(rle.merge(rle.frPyObjects(drawn, height, width))).astype(bool)


def _runs(text: str) -> list[int]:
    """Run lengths from COCO's text: groups of 5 bits, low first; from the fourth run on, what the run two before it lacks."""
    runs: list[int] = []
    value = shift = 0
    for code in (ord(character) - 48 for character in text):
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16 and 1) << shift  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _drawable(polygon: array) -> bool:
    """Pairs of numbers of a size and total length for which pycocotools has memory; it crashes or hangs on others."""
    if len(polygon) % 2 or not (np.abs(polygon) < 2**16).all():  # false for NaN too
        return False
    return np.abs(np.diff(np.reshape(polygon, (-1, 2)), axis=0)).sum() < 2**22


def make_label(path: Path, folder: Path, image: Labelled) -> tuple[int, int, int, int] | None:
    """Write a label; contested, crowd, empty (0 or 1) and all pixels of it, None where it already is."""
    target = folder / f"{Path(image.name).stem}.png"
    if is_done(target, (image.height, image.width), CLASSES):
        return None
    label, contested, crowd = paint(path, image)
    write_label(target, label)
    return contested, crowd, int(not label.any()), label.size


def _checked(path: Path, split: str, content: dict, classes_of: Classes) -> tuple[list[Labelled], int]:
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
        if not all(isinstance(side, int) and 0 < side < 2**15 for side in (entry["height"], entry["width"])):
            raise UserError(f"{where}: height {entry['height']!r}, width {entry['width']!r}; fetch the file again")
        images[number] = Labelled(name, entry["height"], entry["width"], [])
    for entry in content["annotations"]:
        if entry["image_id"] not in images:
            raise UserError(f"{path}: annotation {entry['id']}: no image {entry['image_id']} in the file")
        if entry["category_id"] not in classes:
            raise UserError(f"{path}: annotation {entry['id']}: unknown category {entry['category_id']}")
        found = Annotation(entry["id"], classes[entry["category_id"]], bool(entry.get("iscrowd", 0)), entry["segmentation"])
        images[entry["image_id"]].annotations.append(found)
    labelled = sorted((image for image in images.values() if image.annotations), key=lambda image: image.name)
    return labelled, len(images) - len(labelled)


def _compact(entry: dict) -> dict:
    """Polygons as arrays: the whole of COCO train as lists of Python numbers would need several times the memory."""
    if isinstance(polygons := entry.get("segmentation"), list):
        with suppress(TypeError, OverflowError):  # not numbers: `rasterise` says so
            entry["segmentation"] = [array("d", polygon) for polygon in polygons]
    return entry


def find_images(images: Path, split: str, names: Collection[str]) -> tuple[Path, set[str]]:
    """The folder of a split, `images` or images/SPLIT, whichever holds more of `names`, and those it holds."""
    folders = [folder for folder in (images / split, images) if folder.is_dir()]
    if not folders:
        raise UserError(f"--images {images}: no such folder")
    found = {folder: {path.name for path in folder.iterdir()}.intersection(names) for folder in folders}
    folder = max(folders, key=lambda folder: len(found[folder]))
    return folder, found[folder]
