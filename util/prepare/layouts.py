"""The layouts of data sets with one mask file for each pair of image and class (spec "protocols" section 5)."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from util.errors import UserError
from util.files import entries
from util.prepare.common import absent, read_ids

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif"}
LAND = ("agriculture", "urban", "rangeland", "forest", "water", "barren")
LESIONS = ("seborrheic keratosis", "nevus", "melanoma")  # the order of the folders; files of classes have nevus first
SEA = {"FV": "fish", "HD": "diver", "PF": "plants", "RI": "reef", "RO": "robot", "SR": "sea floor", "WR": "wreck"}
TILES = ("ship", "storage tank", "baseball diamond", "tennis court", "basketball court", "ground track field", "bridge",
         "large vehicle", "small vehicle", "helicopter", "swimming pool", "roundabout", "soccer ball field", "plane",
         "harbor")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """An image and a mask of one class; `mask` is a file, or None where `shapes` have it."""

    cls: int  # 1-based
    image: Path
    mask: Path | None = None
    value: int = 0  # of the class in the mask; 0: where it is bright
    shapes: tuple = ()  # COCO polygons and run lengths, their union
    box: tuple[int, int, int, int] | None = None  # x0 y0 x1 y1 in pixels, to which image and mask are cropped


@dataclass(frozen=True)
class Found:
    """Classes of a source, class c at c - 1, and its pairs in the order of the list.

    folds: novel classes of each; (): all classes are novel. missing: what `util.prepare.common.settle` reports.
    """

    classes: Sequence[str]
    pairs: Sequence[Pair]
    folds: Sequence[Sequence[str]] = ()
    missing: Sequence[str] = field(default=())
    train: Sequence[Pair] = ()  # of a training list, where the source has one


def locate(folder: Path, *names: str) -> Path:
    """Return the folder, or the one up to three levels below, that holds all these names. Raises UserError where none does."""
    level = [folder]
    for _ in range(4):
        for place in level:
            if all((place / name).exists() for name in names):
                return place
        level = [child for place in level for child in entries(place) if child.is_dir()][:2000]
    raise UserError(f"{folder}: no folder in it has {' and '.join(names)}; give the folder that the archive unpacks to")


def stems(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by name without suffix."""
    return {path.stem: path for path in entries(folder) if path.suffix.lower() in IMAGES}


def matched(cls: int, images: dict[str, Path], masks: Iterable[Path], cut: str = "") -> tuple[list[Pair], list[str]]:
    """Return a pair for every mask, in order, and the masks without an image. cut: what a mask's name has at its end."""
    pairs, lost = [], []
    for mask in masks:
        image = images.get(mask.stem.removesuffix(cut))
        if image:
            pairs.append(Pair(cls, image, mask))
        else:
            lost.append(mask.name)
    return pairs, lost


def joined(classes: Sequence[str], parts: Iterable[tuple[list[Pair], list[str]]]) -> dict[str, Found]:
    """Return one list of the pairs of all classes."""
    parts = [*parts]
    lost = [name for _, names in parts for name in names]
    return {"": Found(classes, [pair for pairs, _ in parts for pair in pairs], (), absent("masks without an image", lost))}


def fss(root: Path, _: str) -> dict[str, Found]:
    """`CLASS/{1..10}.{jpg,png}` of the classes that the data set's list of test classes names."""
    listed = [path for place in (root, root.parent) for pattern in ("fss_test_set.txt", "test.txt", "*/fss/test.txt")
              for path in sorted(place.glob(pattern))]  # fmt: skip
    if not listed:
        raise UserError(f"{root}: no list of the 240 test classes: put fss_test_set.txt, or test.txt of HSNet's data/splits/fss, "
                        "into it or beside it")
    names = sorted(read_ids(listed[0]))
    place = locate(root, names[0])
    missing = absent("folders of classes", [name for name in names if not (place / name).is_dir()])
    files = {name: [place / name / f"{i}.jpg" for i in range(1, 11)] for name in names}
    pairs = [Pair(c, image, image.with_suffix(".png")) for c, name in enumerate(names, start=1) for image in files[name]
             if image.is_file() and image.with_suffix(".png").is_file()]  # fmt: skip
    return {"": Found(names, pairs, (), missing)}


def isic(root: Path, _: str) -> dict[str, Found]:
    """Images in the folders 1, 2, 3 (PATNet), or flat beside a CSV of classes (GF-SAM), which orders the classes otherwise."""
    inputs, truth = "ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"
    place = locate(root, inputs, truth)
    masks, cut = stems(place / truth), "_segmentation"
    if all((place / inputs / folder).is_dir() for folder in "123"):
        images = [stems(place / inputs / folder) for folder in "123"]
        return joined(LESIONS, [matched(c, found, [masks[f"{s}{cut}"] for s in found if f"{s}{cut}" in masks], cut)
                                for c, found in enumerate(images, start=1)])  # fmt: skip
    tables = sorted(place.rglob("*.csv"))
    if not tables:
        raise UserError(f"{place}: neither folders {inputs}/1, 2, 3 nor a CSV with the class of each image, as in PATNet's "
                        "data/isic")
    classes = ("nevus", "melanoma", "seborrheic keratosis")
    images, of = stems(place / inputs), {}
    with tables[0].open(newline="", encoding="utf-8-sig") as file:
        for row in csv.reader(file):
            text = " ".join(row).lower().replace("_", " ")
            stem = next((value for value in row if value in images), "")
            if stem:
                of[stem] = next((c for c, name in enumerate(classes, start=1) if name.split()[0] in text), 0)
    if lost := [stem for stem in images if not of.get(stem)]:
        raise UserError(f"{tables[0]}: {len(lost):,} images have no class in it, {lost[0]} for one")
    return joined(classes, [matched(c, images, [masks[f"{s}{cut}"] for s in images if of[s] == c and f"{s}{cut}" in masks], cut)
                            for c in (1, 2, 3)])  # fmt: skip


def lung(root: Path, variant: str) -> dict[str, Found]:
    """`CXR_png` and `masks`. The variant 566 has the masks CHNCXR_*_mask.png alone, whose names PATNet's loader can read."""
    place = locate(root, "CXR_png", "masks")
    masks = [mask for mask in stems(place / "masks").values() if variant != "566" or mask.stem.endswith("_mask")]
    return joined(("lung",), [matched(1, stems(place / "CXR_png"), masks, "_mask")])


def suim(root: Path, _: str) -> dict[str, Found]:
    """`images` and `masks/{FV,...}`: every mask; empty ones are in no episode."""
    place = locate(root, "images", "masks")
    images = stems(place / "images")
    folders = [place / "masks" / name for name in SEA]
    if lost := [str(folder) for folder in folders if not folder.is_dir()]:
        raise UserError(f"{place}: no folder {', '.join(lost)}")
    return joined([*SEA.values()], [matched(c, images, stems(folder).values()) for c, folder in enumerate(folders, start=1)])


def deepglobe(root: Path, _: str) -> dict[str, Found]:
    """`{1..6}/test/{origin,groundtruth}` (PATNet, GF-SAM), or `image` and `filter_mask/{1..6}` (SANSA)."""
    try:
        place = locate(root, "image", "filter_mask")
        folders = [(place / "image", place / "filter_mask" / f"{c}") for c in range(1, 7)]
    except UserError:
        place = locate(root, *(f"{c}/test/groundtruth" for c in range(1, 7)))
        folders = [(place / f"{c}/test/origin", place / f"{c}/test/groundtruth") for c in range(1, 7)]
    if lost := [str(folder) for pair in folders for folder in pair if not folder.is_dir()]:
        raise UserError(f"{place}: no folder {', '.join(lost)}")
    return joined(LAND, [matched(c, stems(images), stems(masks).values())
                         for c, (images, masks) in enumerate(folders, start=1)])  # fmt: skip


def isaid(root: Path, _: str) -> dict[str, Found]:
    """Tiles, masks TILE_instance_color_RGB.png with 0, 1..15 and 255, and lists {trn,val}/fold{0,1,2}.txt of lines TILE__CLASS.

    The list trn of a fold has pairs of its own classes; training on fold f reads those of the others.
    """
    pairs, lost = _tiles(root, "val")
    learnt, lost_too = _tiles(root, "trn") if [*root.rglob("trn/fold0.txt")] else ([], [])
    folds = [TILES[5 * fold : 5 * fold + 5] for fold in range(3)]
    return {"": Found(TILES, pairs, folds, absent("tiles, image or mask", lost + lost_too), learnt)}


def _tiles(root: Path, split: str) -> tuple[list[Pair], list[str]]:
    """Return the pairs of a split's three lists, and the tiles that are not there."""
    suffix, other = "_instance_color_RGB", "train" if split == "val" else "val"
    files = {path.stem: path for path in sorted(root.rglob("*.png")) if other not in path.relative_to(root).parts}
    pairs, lost = [], []
    for fold in range(3):
        path = next(iter(sorted(root.rglob(f"{split}/fold{fold}.txt"))), None)
        if path is None:
            raise UserError(f"{root}: no {split}/fold{fold}.txt in it: the lists of iSAID-5i, splits/{split}")
        for number, line in enumerate(path.read_text(encoding="utf-8").split(), start=1):
            tile, _, cls = line.rpartition("__")
            if not (tile and cls.isdigit() and 5 * fold < int(cls) <= 5 * fold + 5):
                raise UserError(f"{path}:{number}: expected TILE__CLASS with a class {5 * fold + 1}..{5 * fold + 5}, "
                                f"got {line[:60]!r}")
            tile = tile.removesuffix(suffix)
            if tile in files and f"{tile}{suffix}" in files:
                pairs.append(Pair(int(cls), files[tile], files[f"{tile}{suffix}"], int(cls)))
            else:
                lost.append(tile)
    return pairs, lost
