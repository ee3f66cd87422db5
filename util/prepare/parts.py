"""Data sets whose masks are outlines: LVIS-92i, PASCAL-Part and PACO-Part (spec "protocols" sections 2.1 and 5).

Where a data set is of parts, image and mask are cropped to the box of the object, as its published tests do. They draw one of
the objects of an image; here it is always the first that has the part, so that an image is one line of the list.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import UserError
from util.files import load_plain
from util.prepare.common import absent
from util.prepare.layouts import Found, Pair, locate

LVIS_FOLDS, PACO_FOLDS, PACO_CLASSES = 10, 4, 448
SUPER = ("animals", "indoor", "person", "vehicles")  # folds of PASCAL-Part
LEFT_OUT = "aeroplane+TAIL"


def rasterise(shapes: Iterable[Any], hw: tuple[int, int]) -> np.ndarray:
    """Return the union of COCO polygons and run lengths, H W uint8 {0, 1}."""
    from pycocotools import mask as coco_mask  # needed here alone

    union = np.zeros(hw, np.uint8)
    for shape in shapes:
        if isinstance(shape, list):
            runs = coco_mask.merge(coco_mask.frPyObjects(shape, *hw))
        else:
            runs = coco_mask.frPyObjects(shape, *hw) if isinstance(shape.get("counts"), list) else shape
        union |= coco_mask.decode(runs)
    return union


def lvis(root: Path, variant: str) -> dict[str, Found]:
    """`lvis_val.pkl`: {class id: {image: {annotations: [{segmentation}]}}}; its order decides the folds.

    Classes with more than K images are V; n = |V| // 10; fold f has V[f + 10 v] for v < n.
    """
    shots = int(variant.removesuffix("shot"))
    place = locate(root, "lvis_val.pkl")
    images = locate(root, "val2017")
    found = load_plain(place / "lvis_val.pkl")
    with _shape(place / "lvis_val.pkl", "{class id: {image: {annotations: [{segmentation}]}}}"):
        enough = [cls for cls, files in found.items() if len(files) > shots]
        count, parts, lost = len(enough) // LVIS_FOLDS, {}, []
        for fold in range(LVIS_FOLDS):
            ids = [enough[fold + LVIS_FOLDS * v] for v in range(count)]
            pairs = []
            for c, cls in enumerate(ids, start=1):
                for name, entry in found[cls].items():
                    if (images / name).is_file():
                        pairs.append(Pair(c, images / name, shapes=tuple(a["segmentation"] for a in entry["annotations"])))
                    else:
                        lost.append(name)
            parts[f"{variant}/split{fold}"] = Found([f"class_{cls}" for cls in ids], pairs)
    first = next(iter(parts))
    parts[first] = Found(parts[first].classes, parts[first].pairs, (), absent("images", lost))
    return parts


def pascal_part(root: Path, _: str) -> dict[str, Found]:
    """`all_obj_part_to_image.json`: super-category -> object -> part -> {train, val} ids; and an annotation for each image."""
    index = "all_obj_part_to_image.json"
    place, notes = locate(root, index), "Annotations_Part_json_merged_part_classes"
    images, table = locate(root, "JPEGImages") / "JPEGImages", _json(locate(root, index) / index)
    notes = locate(root, notes) / notes
    classes, folds, pairs, lost = [], [], [], []
    with _shape(place / index, "{super-category: {object: {part: {train: [id], val: [id]}}}}"):
        for kind in SUPER:
            folds.append([])
            for thing, parts in table[kind].items():
                for part, ids in parts.items():
                    if f"{thing}+{part}" == LEFT_OUT or not (ids["train"] and ids["val"]):
                        continue
                    classes.append(f"{thing}+{part}")
                    folds[-1].append(classes[-1])
                    for name in ids["val"]:
                        pair = _object(notes / f"{name}.json", thing, part, len(classes), images / f"{name}.jpg")
                        if pair and pair.image.is_file():
                            pairs.append(pair)
                        else:
                            lost.append(name)
    return {"": Found(classes, pairs, folds, absent("images, or their object with the part", lost))}


def paco_part(root: Path, _: str) -> dict[str, Found]:
    """Pickles of train and val with `cid2img` (class -> [{image id: path}]) and `img2anno` (image id -> annotations).

    T: class ids of train in the order of the file; fold f of 4 takes T[f + 4 v] and keeps those with more than one image in val.
    """
    files = [next(iter(sorted(root.rglob(f"*paco*{split}*.pkl"))), None) for split in ("train", "val")]
    if None in files:
        raise UserError(f"{root}: no paco_part_{('train', 'val')[files.index(None)]}.pkl in it (paco.zip of Matcher)")
    train, val = map(load_plain, files)
    images, parts, lost = locate(root, "val2017"), {}, []
    with _shape(files[1], "{cid2img: {class id: [{image id: path}]}, img2anno: {image id: [annotation]}}"):
        ids = [*train["cid2img"]]
        if len(ids) != PACO_CLASSES:
            lost.append(f"{files[0].name}: {len(ids)} classes, not {PACO_CLASSES}")
        for fold in range(PACO_FOLDS):
            kept, pairs = [], []
            for cls in ids[fold::PACO_FOLDS]:
                named = {key: path for entry in val["cid2img"].get(cls, []) for key, path in entry.items()}
                if len(named) < 2:
                    continue
                kept.append(f"class_{cls}")
                drawn = [_paco(val["img2anno"][key], cls, len(kept), images / path) for key, path in named.items()]
                pairs += [pair for pair in drawn if pair and pair.image.is_file()]
            parts[f"split{fold}"] = Found(kept, pairs, (), lost if fold == 0 else ())
    return parts


def _paco(notes: Iterable[Mapping], cls: int, number: int, image: Path) -> Pair | None:
    """Return the first object of an image that has the part; boxes are cut to whole pixels, an empty one is none."""
    for note in notes:
        if note["category_id"] == cls:
            x, y, w, h = (int(value) for value in note["obj_bbox"])
            if w > 0 and h > 0:
                same = tuple(n["segmentation"] for n in notes if (n["category_id"], n["obj_ann_id"]) == (cls, note["obj_ann_id"]))
                return Pair(number, image, shapes=same, box=(x, y, x + w, y + h))
    return None


def _object(path: Path, thing: str, part: str, cls: int, image: Path) -> Pair | None:
    """Return the first object of an annotation that has the part; None where none has."""
    if not path.is_file():
        return None
    with _shape(path, "{object: [{name, bndbox: [x0, y0, x1, y1], parts: [{name, mask}]}]}"):
        for found in _json(path)["object"]:
            shapes = tuple(p["mask"] for p in found.get("parts") or () if found["name"] == thing and p["name"] == part)
            box = found["bndbox"]
            x0, y0, x1, y1 = (int(v) for v in (box.values() if isinstance(box, dict) else box))
            if shapes and x1 > x0 and y1 > y0:
                return Pair(cls, image, shapes=shapes, box=(x0, y0, x1, y1))
    return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); fetch it again") from error


@contextlib.contextmanager
def _shape(path: Path, expected: str) -> Iterator[None]:
    """Turn what a file of another shape raises into one UserError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected {expected} ({type(error).__name__}: {error})") from error
