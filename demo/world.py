"""The demo world: about 1,600 small scenes in the layout of PASCAL VOC, made in seconds, the same on every machine.

Scene `number` is a pure function of that number: one to four things of different classes (`demo.shapes`) with random
colours, textures, sizes and poses, partly hiding one another, before a cluttered background.

    python -m demo.world [DIR]          # default data/demo; the lists are lists/demo/{train,val}.txt
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
from PIL import Image

from demo.shapes import BODY, DETAIL, NAMES, SHAPES, TRIM, Part

VERSION = 1  # of what is drawn: another number makes `ensure` draw everything anew
TRAIN = range(1, 1201)
VAL = range(5001, 5401)
NOVEL = (1, 2, 3, 4, 5)  # classes of split0 in lists/demo/folds.yaml
FRESH = 10_000  # from here on: scenes for the training of the demo's CLIP, in neither list

FINE = 3  # scenes are drawn this much larger, then averaged down
AREA = (450.0, 4500.0)  # pixels of a thing, unhidden: the same for all classes, so that size tells nothing
COUNTS = (0.35, 0.35, 0.2, 0.1)  # how often a scene has 1, 2, 3, 4 things
MIXED = 0.8  # a pixel of which no thing (nor the background) owns this share is 255, as on VOC's object borders

Rng = np.random.Generator


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # H W 3 uint8 RGB
    label: np.ndarray  # H W uint8: 0 background, 1..20 class, 255 border
    boxes: list[tuple[int, int, int, int, int]]  # class, xmin, ymin, xmax, ymax (0-based, inclusive), as visible


# --- paint ------------------------------------------------------------------------------------------------------------


def colour(rng: Rng, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    hsv = np.array([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255


def texture(rng: Rng, h: int, w: int, a: np.ndarray, b: np.ndarray, plain: float = 0.25) -> np.ndarray:
    """h w 3 float32: colours a and b mixed by a random pattern; plain a with probability `plain`."""
    if rng.random() < plain:
        return np.broadcast_to(a, (h, w, 3)).astype(np.float32)
    angle, period, phase = rng.uniform(0, np.pi), FINE * rng.uniform(4, 12), rng.uniform(0, 40)
    y, x = np.mgrid[:h, :w].astype(np.float32)
    u = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) + np.float32(phase)
    v = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle)) + np.float32(phase)
    match rng.integers(5):
        case 0:  # stripes
            mix = np.sin(u * np.float32(2 * np.pi / period)) > rng.uniform(-0.4, 0.4)
        case 1:  # dots
            mix = np.hypot(u % period - period / 2, v % period - period / 2) < period * rng.uniform(0.22, 0.38)
        case 2:  # checks
            mix = (np.floor(u / period) + np.floor(v / period)) % 2
        case 3:  # gradient
            mix = (u - u.min()) / (np.ptp(u) + 1)
        case _:  # clouds
            cells = rng.random((max(2, int(h // period) + 2), max(2, int(w // period) + 2)), np.float32)
            mix = cv2.resize(cells, (w, h), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    mix = mix.astype(np.float32)[..., None]
    return (a + (b - a) * mix).astype(np.float32)


def fill(shape: tuple[int, int], polygons: list[np.ndarray]) -> np.ndarray:
    """H W bool: the union of the polygons (x, y in pixels)."""
    mask = np.zeros(shape, np.uint8)
    for points in polygons:
        cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], 1, shift=4)
    return mask > 0


def paint(canvas: np.ndarray, mask: np.ndarray, rng: Rng, a: np.ndarray, b: np.ndarray, edge: float = 0) -> None:
    """Paints the mask with a texture of a and b, its rim darker by `edge` (0..1)."""
    if not mask.any():
        return
    x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
    inside, target = mask[y : y + h, x : x + w], canvas[y : y + h, x : x + w]
    colours = texture(rng, h, w, a, b)
    if edge:
        core = cv2.erode(np.pad(inside.view(np.uint8), 2), np.ones((5, 5), np.uint8))[2:-2, 2:-2]
        colours = colours * (1 - edge * (1 - core[..., None].astype(np.float32)))
    target[inside] = colours[inside]


# --- scenes -----------------------------------------------------------------------------------------------------------


def background(rng: Rng, h: int, w: int) -> np.ndarray:
    """h w 3 float32: a textured ground with clutter of no class: blobs, bars, triangles, rings, lines."""
    ground = colour(rng, (0.05, 0.5), (0.35, 0.95))
    canvas = texture(rng, h, w, ground, ground + rng.uniform(-60, 60, 3), plain=0.1).copy()
    for _ in range(rng.integers(3, 10)):
        centre, size = rng.uniform((0, 0), (w, h)), FINE * rng.uniform(5, 26)
        n = int(rng.choice([2, 3, 4, 12]))
        angle = np.sort(rng.uniform(0, 2 * np.pi, n))
        radius = size * rng.uniform(0.5, 1.2, (n, 1)) * rng.uniform(0.5, 1.2, 2)
        points = centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        mask = np.zeros((h, w), np.uint8)
        if n == 2 or rng.random() < 0.25:
            cv2.polylines(mask, [points.astype(np.int32)], n > 2, 1, int(FINE * rng.uniform(1, 5)))
        else:
            cv2.fillPoly(mask, [points.astype(np.int32)], 1)
        tone = colour(rng, (0.05, 0.9), (0.2, 1))
        paint(canvas, mask > 0, rng, tone, tone + rng.uniform(-90, 90, 3), edge=rng.choice([0, 0.4]))
    return canvas


def pose(rng: Rng, parts: list[Part], h: int, w: int) -> list[Part]:
    """The parts in canvas pixels: mirrored, stretched, turned, seen slightly askew, of an area drawn from AREA."""
    points = [p for part in parts for p in part.polygons]
    unit = fill((140, 140), [60 * p + 70 for p in points]).sum() / 60**2
    area = np.exp(rng.uniform(*np.log(AREA)))
    size = FINE * min(np.sqrt(area / unit), 0.5 * min(h, w) / FINE)
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    angle = np.radians(rng.uniform(-35, 35))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = size * turn @ np.diag([stretch * rng.choice([-1, 1]), 1 / stretch])
    tilt = rng.uniform(-0.18, 0.18, 2)
    margin = 0.7 * size
    centre = rng.uniform((margin, margin), np.maximum((w - margin, h - margin), margin + 1))
    return [Part(p.role, [(q @ linear.T) / (1 + q @ tilt)[:, None] + centre for q in p.polygons]) for p in parts]


def place(rng: Rng, shape: int, owner: np.ndarray) -> tuple[list[Part], np.ndarray] | None:
    """Parts and mask of a new thing in front of the others, hiding at most 40 % of each; None if no pose was found."""
    parts = SHAPES[shape](rng)
    sizes = np.bincount(owner.ravel(), minlength=5)
    for _ in range(12):
        posed = pose(rng, parts, *owner.shape)
        mask = fill(owner.shape, [q for p in posed for q in p.polygons])
        hidden = np.bincount(owner[mask], minlength=len(sizes))
        if mask.sum() > 200 * FINE**2 and (hidden[1:] <= 0.4 * sizes[1:]).all():
            return posed, mask
    return None


def draw_thing(canvas: np.ndarray, posed: list[Part], mask: np.ndarray, rng: Rng) -> None:
    around = canvas[mask].mean(axis=0)
    tones = []
    while len(tones) < 3:  # body, trim and detail differ from what lies behind and from one another
        tone = colour(rng, (0.15, 0.95), (0.25, 1))
        if all(np.abs(tone - other).sum() > 170 for other in [around, *tones]) or rng.random() < 0.05:
            tones.append(tone)
    if rng.random() < 0.4:  # a shadow
        move = np.float32([[1, 0, FINE * rng.uniform(-4, 4)], [0, 1, FINE * rng.uniform(1, 4)]])
        canvas[cv2.warpAffine(mask.view(np.uint8), move, mask.shape[::-1], flags=cv2.INTER_NEAREST) > 0] *= 0.65
    edge = rng.choice([0, 0.35, 0.7])
    for part in posed:
        tone = tones[{BODY: 0, TRIM: 1, DETAIL: 2}[part.role]]
        paint(canvas, fill(mask.shape, part.polygons), rng, tone, tone + rng.uniform(-80, 80, 3), edge)


def scene(number: int) -> Scene:
    """Scene `number` (any integer >= 0)."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(112, 137), rng.integers(140, 169)
    if rng.random() < 0.4:
        height, width = width, height
    h, w = FINE * height, FINE * width
    canvas, owner = background(rng, h, w), np.zeros((h, w), np.uint8)
    classes = [0]
    for shape in rng.permutation(len(SHAPES))[: 1 + rng.choice(len(COUNTS), p=COUNTS)]:
        if placed := place(rng, shape, owner):
            draw_thing(canvas, *placed, rng)
            owner[placed[1]] = len(classes)
            classes.append(int(shape) + 1)
    shares = np.stack(
        [
            cv2.resize((owner == i).astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
            for i in range(len(classes))
        ]
    )
    label = np.array(classes, np.uint8)[shares.argmax(axis=0)]
    label[shares.max(axis=0) < MIXED] = 255
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    image = (image - 128) * rng.uniform(0.8, 1.1) + 128 + rng.uniform(-20, 20)
    image += rng.normal(0, rng.uniform(0, 7), image.shape)
    boxes = []
    for c in classes[1:]:
        if (y := np.flatnonzero((label == c).any(axis=1))).size:
            x = np.flatnonzero((label == c).any(axis=0))
            boxes.append((c, int(x[0]), int(y[0]), int(x[-1]), int(y[-1])))
    return Scene(image.clip(0, 255).astype(np.uint8), label, boxes)


# --- files ------------------------------------------------------------------------------------------------------------


def stem(number: int) -> str:
    return f"{number:06d}"


def annotation(name: str, made: Scene) -> bytes:
    """The VOC XML of a scene: its size, and a name and box (1-based) for every thing."""
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{name}.jpg"
    size = ElementTree.SubElement(root, "size")
    for key, value in zip(("height", "width", "depth"), made.image.shape, strict=True):
        ElementTree.SubElement(size, key).text = str(value)
    for c, *corners in made.boxes:
        thing = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(thing, "name").text = NAMES[c - 1]
        box = ElementTree.SubElement(thing, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            ElementTree.SubElement(box, key).text = str(value + 1)
    ElementTree.indent(root)
    return ElementTree.tostring(root)


def palette() -> list[int]:
    """VOC's colours: bit j of channel k (from the top) is bit 3j + k of the index."""
    return [sum((i >> (3 * j + k) & 1) << (7 - j) for j in range(3)) for i in range(256) for k in range(3)]


def write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def write(root: Path, number: int) -> None:
    """Draws scene `number` into the three folders of `root`."""
    cv2.setNumThreads(1)
    made, name = scene(number), stem(number)
    jpeg = cv2.imencode(".jpg", made.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    label = Image.fromarray(made.label, mode="P")
    label.putpalette(palette())
    target = root / "SegmentationClassAug" / f"{name}.png"
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    label.save(temporary, format="PNG")
    temporary.replace(target)
    write_atomically(root / "JPEGImages" / f"{name}.jpg", jpeg)
    write_atomically(root / "Annotations" / f"{name}.xml", annotation(name, made))


def ensure(data_root: str | Path, workers: int | None = None) -> Path:
    """Draws the world into `data_root` unless this version of it, or somebody's own data, is there already."""
    root = Path(data_root)
    done = root / "done"
    if done.is_file() and done.read_text().strip() == f"demo world {VERSION}":
        return root
    drawing = root / ".drawing"  # a folder with anything else in it is somebody's own
    if root.is_dir() and any(root.iterdir()) and not (done.is_file() or drawing.is_file()):
        return root
    for folder in ("JPEGImages", "SegmentationClassAug", "Annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    drawing.touch()
    numbers = [*TRAIN, *VAL]
    print(f"drawing the demo's {len(numbers):,} scenes into {root}, 32 MB: once, about a minute on two free cores",
          file=sys.stderr, flush=True)  # fmt: skip
    # spawn: a fork of a process whose OpenCV or torch threads are running can hang
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(write, [root] * len(numbers), numbers, chunksize=25))
    write_atomically(done, f"demo world {VERSION}\n".encode())
    drawing.unlink(missing_ok=True)
    return root


def list_lines(numbers: range) -> str:
    return "".join(f"JPEGImages/{stem(n)}.jpg SegmentationClassAug/{stem(n)}.png\n" for n in numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the demo world.")
    parser.add_argument("data_root", nargs="?", default="data/demo", help="folder to write (default data/demo)")
    print(f"demo world in {ensure(parser.parse_args().data_root)}: {len(TRAIN)} train and {len(VAL)} val scenes")
