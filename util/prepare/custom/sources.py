"""Read a user's folder: images, their masks, class names, and the split."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from util.data.folds import ClassNames, clean_name, read_class_names
from util.data.transforms import IGNORE, SUFFIXES, check_sizes, image_hw, open_image, read_label
from util.errors import UserError
from util.files import entries
from util.prepare import common
from util.prepare.common import absent, check_name, each, read_ids, write_label

CONVERTED = "converted"  # folder of data/NAME
VOC_BORDER = (224, 224, 192)
SHOWN = 10  # messages about single files
ORIENTATION, TURNED = 0x0112, range(2, 9)  # EXIF tag, and those of its values that turn or mirror


@dataclass(frozen=True)
class Pair:
    """An image and its label PNG."""

    part: str  # train | val | "" where no list says it (util.prepare.custom.check.parted)
    image: Path
    label: Path
    line: tuple[str, str]  # how the list names them, relative to data/NAME


@dataclass
class Found:
    """The content of a source. Only files that had to be converted were opened."""

    names: ClassNames
    pairs: list[Pair]
    links: dict[str, Path]  # name in data/NAME -> the folder it shows
    folds: Path | None = None  # the folds.yaml beside the images
    notes: list[str] = field(default_factory=list)  # messages about files left out


def folder(root: Path, classes: Path | None, out: Path) -> Found:
    """Read images/, masks/, classes.txt; train.txt and val.txt where they exist. Masks of colours need `labelmap`."""
    return _pngs(root, root / "images", root / "masks", root, classes, out)


def voc(root: Path, classes: Path | None, out: Path) -> Found:
    """Read JPEGImages/, SegmentationClass/ (or SegmentationClassAug/), ImageSets/Segmentation/{train,val}.txt, classes.txt."""
    masks = next((root / name for name in ("SegmentationClassAug", "SegmentationClass") if (root / name).is_dir()), None)
    return _pngs(root, root / "JPEGImages", masks or root / "SegmentationClass", root / "ImageSets/Segmentation", classes, out)


def _pngs(root: Path, images: Path, masks: Path, sets: Path, classes: Path | None, out: Path) -> Found:
    """Pair a folder of images and a folder of masks by their stems."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    named = classes or root / "classes.txt"
    needed = {f"{images.name}/": images.is_dir(), f"{masks.name}/": masks.is_dir(),
              named.name: named.is_file() or (root / "labelmap.txt").is_file()}  # fmt: skip
    if lacking := [name for name, there in needed.items() if not there]:
        raise UserError(f"{root} has no {' and no '.join(lacking)}. Needed are {images.name}/ (a.jpg), {masks.name}/ (a.png: a "
                        "pixel's value is the line of its class in classes.txt, 0 is background) and classes.txt (a name a "
                        "line); docs/custom-data.md shows one")
    colours = read_labelmap(root / "labelmap.txt") if (root / "labelmap.txt").is_file() else None
    names = _names(named, colours)
    pictures, others = stems(images, SUFFIXES)
    labels, strange = stems(masks, (".png",))
    if strange and not labels:
        raise UserError(f"{masks}: masks are PNGs (JPEG changes the values), found {', '.join(strange[:5])}")
    parts, unlisted = split(sets, pictures)
    used = [stem for stem in parts if stem in labels]
    if not used:
        raise UserError(f"no image of {images} has a mask of the same name in {masks}: a.jpg goes with a.png")
    notes = [*absent(f"images without a mask in {masks}, left out", [pictures[s].name for s in parts if s not in labels]),
             *absent(f"images in neither train.txt nor val.txt of {sets}, left out", unlisted),
             *absent(f"masks without an image in {images}", [labels[s].name for s in labels if s not in pictures]),
             *absent(f"entries of {images} and {masks} that are no images and no PNGs", others + strange)]
    where = CONVERTED if colours else masks.name
    files = {s: out / where / f"{s}.png" if colours else labels[s] for s in used}
    pairs = [Pair(parts[s], pictures[s], files[s], (f"{images.name}/{pictures[s].name}", f"{where}/{files[s].name}"))
             for s in used]
    links = {images.name: images}
    if colours:
        values = {colour: names.names.index(name) + 1 for name, colour in colours.items()}
        convert([(labels[s], files[s]) for s in used], values)
        notes.append(f"{len(used)} masks converted from colours: {out / where}")
    else:
        links[masks.name] = masks
    return Found(names, pairs, links, root / "folds.yaml", notes)


def stems(place: Path, suffixes: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """Return stem -> file, sorted, and the names of all other files that are not hidden."""
    files: dict[str, Path] = {}
    others = []
    for path in entries(place):
        if not path.is_file() or path.suffix.lower() not in suffixes:
            others.append(path.name)
            continue
        check_name(str(path), path.name)
        if (first := files.setdefault(path.stem, path)) != path:
            raise UserError(f"{place}: {first.name} and {path.name} have the same stem, so which has the mask {path.stem}.png? "
                            "Rename or remove one")
    return files, others


def split(sets: Path, pictures: dict[str, Path]) -> tuple[dict[str, str], list[str]]:
    """Return stem -> train or val ("" without lists), and the stems in neither list."""
    files = {part: sets / f"{part}.txt" for part in ("train", "val")}
    if not any(file.is_file() for file in files.values()):
        return dict.fromkeys(pictures, ""), []
    parts: dict[str, str] = {}
    for part, file in files.items():  # read_ids says which of the two is missing
        for name in read_ids(file):
            stem = name if name in pictures else Path(name).stem  # a.jpg stands for a
            if stem not in pictures:
                raise UserError(f"{file}: {name} is no image of {next(iter(pictures.values())).parent}; correct the list")
            if parts.setdefault(stem, part) != part:
                raise UserError(f"{file}: {name} is in train.txt too; no result would be worth anything. Remove one")
    return parts, [stem for stem in pictures if stem not in parts]


def _names(path: Path, colours: dict[str, tuple[int, int, int]] | None) -> ClassNames:
    """Read class names from classes.txt, or from labelmap.txt where only that exists."""
    if not colours or path.is_file():
        names = read_class_names(path)
        if colours and set(names.names) != set(colours):
            raise UserError(f"{path} and labelmap.txt differ in {', '.join(sorted(set(names.names) ^ set(colours)))}; they must "
                            "name the same classes (labelmap.txt also `background`)")
        return names
    return ClassNames(tuple(colours), tuple(colours))


def read_labelmap(path: Path) -> dict[str, tuple[int, int, int]]:
    """Read class -> colour from CVAT's labelmap.txt, lines `name:r,g,b:...`; without the background."""
    colours: dict[str, tuple[int, int, int]] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *rest = (part.strip() for part in line.split(":"))
        values = rest[0].split(",") if rest else []
        if not name or len(values) != 3 or not all(v.strip().isdecimal() and int(v) < 256 for v in values):
            raise UserError(f"{path}:{number}: expected `name:r,g,b`, got {line!r}")
        name = clean_name(f"{path}:{number}", name)
        colour = (int(values[0]), int(values[1]), int(values[2]))
        if name in colours or colour in colours.values():
            raise UserError(f"{path}:{number}: the name {name!r} or its colour is there already")
        colours[name] = colour
    if colours.pop("background", (0, 0, 0)) != (0, 0, 0):
        raise UserError(f"{path}: background must be 0,0,0")
    return colours


def check_stored(image: Path, label: Path, hw: tuple[int, int]) -> bool:
    """Compare the size of an image, from its header, with its label's, and check whether EXIF turns the image for display.

    Raises:
        UserError: the sizes differ, or the label may belong to the turned image.
    """
    stored = image_hw(image)
    with open_image(image) as opened:
        orientation = opened.getexif().get(ORIENTATION, 1)
    turned = orientation in TURNED
    upright = stored[::-1] if orientation > 4 else stored
    if turned and (upright == hw or stored != hw):
        raise UserError(f"{image}: its EXIF note says to turn it for display, which nothing here does; save it as its mask was "
                        "drawn, without the note (ImageMagick: mogrify -auto-orient)")
    check_sizes(image, stored, label, hw)
    return turned


def refuse(wrong: Sequence[str], total: int) -> None:
    """Raise UserError with all faults (the first ten)."""
    if wrong:
        more = f"\n... and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(f"{len(wrong)} of {total} images or masks cannot be used; no list and no config was written\n"
                        + "\n".join(wrong[:SHOWN]) + more)


def convert(jobs: Sequence[tuple[Path, Path]], colours: dict[tuple[int, int, int], int]) -> None:
    """Write a label PNG of class ids for each (mask of colours, target); black is background, VOC's border colour ignored."""
    values = {(0, 0, 0): 0, VOC_BORDER: IGNORE} | colours
    list(each(partial(_recolour, {(r << 16) + (g << 8) + b: value for (r, g, b), value in values.items()}), jobs, "masks"))


def _recolour(values: dict[int, int], job: tuple[Path, Path]) -> None:
    source, target = job
    try:
        with open_image(source) as mask:
            red, green, blue = np.moveaxis(np.array(mask.convert("RGB")).astype(np.int32), 2, 0)
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"{source}: not a readable mask ({error})") from error
    found, inverse = np.unique((red << 16) + (green << 8) + blue, return_inverse=True)
    if strange := [f"{c >> 16},{c >> 8 & 255},{c & 255}" for c in found.tolist() if c not in values]:
        raise UserError(f"{source}: {len(strange)} colours are not in labelmap.txt, {' '.join(strange[:5])}; add them, or save "
                        "the mask without smoothing")
    put_label(target, np.array([values[c] for c in found.tolist()], np.uint8)[inverse].reshape(red.shape))


def put_label(path: Path, label: np.ndarray) -> None:
    """Write a label unless it exists unchanged: its time is part of the key of the cached scan."""
    try:
        if path.is_file() and np.array_equal(read_label(path), label):
            return
    except UserError:  # damaged
        pass
    write_label(path, label)


def link(source: Path, target: Path) -> None:
    """Link data/NAME to a folder."""
    if os.path.lexists(target) and not (target.exists() and target.samefile(source)):
        raise UserError(f"{target} is there and is not {source}; delete it, or choose another NAME")
    common.link(source, target)
