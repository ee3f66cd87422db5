"""Masks for annotation tools and other trainings: COCO JSON (polygons or runs), LabelMe, YOLO, Label Studio.

A polygon follows the edges of pixels (pixel x, y covers x..x+1, y..y+1). It has no hole: a part with a hole is cut in two through
the hole. Filled polygons therefore give exactly the mask.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

Polygon = list[tuple[int, int]]  # corners x, y
Object = tuple[str, np.ndarray, float | None]  # name, mask H W bool, mean score (None without a pixel)


def polygons(mask: np.ndarray) -> list[Polygon]:
    """Return the polygons of a mask, H W bool; each has at least four corners, none is inside another."""
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    found = []
    for i, (left, top, width, height, _) in enumerate(boxes[1:], start=1):
        part = labels[top : top + height, left : left + width] == i
        found += [[(x + int(left), y + int(top)) for x, y in outline] for outline in _solid(part)]
    return found


def _solid(part: np.ndarray) -> Iterator[Polygon]:
    """Return the outline of a 4-connected part; with holes, the outlines of the pieces after a cut through one."""
    beyond = np.pad(~part, 1, constant_values=True).astype(np.uint8)
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(beyond, connectivity=8)
    if count == 2:  # its own background, and what is around
        yield _outline(part)
        return
    around = labels[0, 0]
    columns = sorted(int(left) - 1 + int(width) // 2 for i, (left, _, width, _, _) in enumerate(boxes) if i not in (0, around))
    cut = columns[len(columns) // 2]  # through the hole in the middle, so that not many cuts follow each other
    for begin, half in ((0, part[:, :cut]), (cut, part[:, cut:])):
        yield from ([(x + begin, y) for x, y in outline] for outline in polygons(half))


def _outline(part: np.ndarray) -> Polygon:
    """Walk along the edges of a 4-connected part without holes; the part is on the right."""
    padded = np.pad(part, 1)
    steps: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # corner -> ways on: (dx, dy)
    for (dy, dx), (x0, y0), way in (((-1, 0), (0, 0), (1, 0)), ((0, 1), (1, 0), (0, 1)), ((1, 0), (1, 1), (-1, 0)),
                                    ((0, -1), (0, 1), (0, -1))):  # fmt: skip
        beyond = padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        for y, x in np.argwhere(part & ~beyond).tolist():
            steps[x + x0, y + y0].append(way)
    at = start = min(steps)
    way, corners = None, []
    while way is None or at != start or steps[at]:
        ways = steps[at]
        # Where two pixels touch at a corner there are two ways: the right turn stays with the pixel.
        turn = next((w for w in ways if way and w == (-way[1], way[0])), ways[0])
        ways.remove(turn)
        if turn != way:
            corners.append(at)
        way, at = turn, (at[0] + turn[0], at[1] + turn[1])
    return corners


@dataclass
class Coco:
    """Build a COCO data set, with one annotation for each class that an image shows."""

    names: Sequence[str]
    runs: bool = False  # compressed runs (RLE) in place of polygons
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def add(self, file: str, hw: tuple[int, int], objects: Iterable[Object]) -> None:
        """Add an image; of its objects those with a pixel."""
        self.images.append({"id": len(self.images) + 1, "file_name": file, "height": hw[0], "width": hw[1]})
        for name, mask, score in objects:
            if not mask.any():
                continue
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y = int(columns[0]), int(rows[0])
            self.annotations.append({
                "id": len(self.annotations) + 1, "image_id": len(self.images), "category_id": 1 + self.names.index(name),
                "iscrowd": 0, "score": score, "area": int(mask.sum()),
                "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                "segmentation": rle(mask) if self.runs else [
                    [value for corner in polygon for value in corner] for polygon in polygons(mask)],
            })  # fmt: skip

    def content(self) -> dict[str, Any]:
        """Return the content of the JSON file."""
        categories = [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(self.names, start=1)]
        return {"images": self.images, "categories": categories, "annotations": self.annotations}


def rle(mask: np.ndarray) -> dict[str, Any]:
    """Return COCO's compressed runs of a mask, H W bool: column by column, beginning with background."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [1 - int(mask[-1, -1])]])  # the last run ends, too
    return {"size": [*mask.shape], "counts": _letters(np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist())}


def _letters(counts: list[int]) -> str:
    """Write each run, less the run two before, in groups of five bits, low ones first, as letters from "0" on."""
    text = []
    for i, count in enumerate(counts):
        value, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return "".join(text)


def yolo(hw: tuple[int, int], objects: Iterable[Object], names: Sequence[str]) -> str:
    """Return YOLO's text of an image: a line a polygon, its class (0 the first of `names`) and its corners as fractions."""
    height, width = hw
    lines = [f"{names.index(name)} " + " ".join(f"{x / width:.6f} {y / height:.6f}" for x, y in polygon)
             for name, mask, _ in objects for polygon in polygons(mask)]  # fmt: skip
    return "".join(f"{line}\n" for line in lines)


def label_studio(file: str, hw: tuple[int, int], objects: Sequence[Object]) -> dict[str, Any]:
    """Return a task of Label Studio with a prediction; file: name of the image in its local storage."""
    height, width = hw
    common = {"from_name": "label", "to_name": "image", "type": "polygonlabels",
              "original_width": width, "original_height": height}  # fmt: skip
    outlines = [(name, polygon) for name, mask, _ in objects for polygon in polygons(mask)]
    shapes = [common | {"id": str(i), "value": {"polygonlabels": [name], "closed": True, "points": [
        [100 * x / width, 100 * y / height] for x, y in polygon]}} for i, (name, polygon) in enumerate(outlines)]
    scores = [score for _, _, score in objects if score is not None]
    prediction = {"score": sum(scores) / max(len(scores), 1), "result": shapes}
    return {"data": {"image": f"/data/local-files/?d={file}"}, "predictions": [prediction]}


def labelme(file: str, hw: tuple[int, int], objects: Iterable[Object]) -> dict[str, Any]:
    """Return LabelMe's JSON of an image; file: path of the image relative to the JSON."""
    shapes = [{"label": name, "group_id": i, "shape_type": "polygon", "flags": {}, "points": polygon}
              for i, (name, mask, _) in enumerate(objects, start=1) for polygon in polygons(mask)]  # fmt: skip
    return {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": file, "imageData": None,
            "imageHeight": hw[0], "imageWidth": hw[1]}
