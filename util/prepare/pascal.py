"""PASCAL-5i from VOC 2012 and SBD: SegmentationClassAug and the lists ("PI-CLIP Sec. 1, Lists").

Under the data root: JPEGImages, Annotations, ImageSets (unpacked from the archive, or links to the folder given) and
SegmentationClassAug, one label per listed image: VOC's own mask where there is one, else SBD's, else the one that the
VOC folder already has in its SegmentationClassAug.
"""

import hashlib
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from util.data.folds import NUM_CLASSES
from util.data.transforms import check_sizes, image_hw, read_label
from util.errors import UserError
from util.prepare.archives import open_source
from util.prepare.common import absent, check_classes, each, is_done, link, read_ids, settle, write_label, write_list

CLASSES = NUM_CLASSES["pascal"]
KNOWN = {"train": 5953, "val": 1449}
TRAIN_NOVAL_MD5 = "79bff800c5f0b1ec6b21080a3c066722"  # of its 5,623 ids, one a line
LABELS = "SegmentationClassAug"


def prepare(voc: Path, sbd: Path | None, out: Path, lists: Path, partial: bool) -> None:
    """Make `out` a data root and write `lists`/{train,val}.txt.

    `voc`, `sbd`: archive or folder. Folders are read, linked to, and never written to unless `voc` is `out` itself.
    `partial`: with less than the whole data set, list the existing part.

    Raises:
        UserError: something is wrong in the input, or (without `partial`) missing from it.
    """
    # 1. which images
    voc_source = open_source(voc, out, ("VOC2012", "VOCdevkit/VOC2012"), "ImageSets")
    voc_source.fetch(r"ImageSets/(?:Segmentation/train|Segmentation/val|Main/train)\.txt")
    sets = voc_source.folder / "ImageSets"
    missing, train_noval, sbd_source = [], [], None
    if sbd:
        sbd_source = open_source(sbd, out / "sbd", ("dataset", "benchmark_RELEASE/dataset"), "cls")
        sbd_source.fetch(r"(?:train|val)\.txt")
        train_noval = read_train_noval(sbd_source.folder, sbd, sets / "Main/train.txt")
    if _md5(train_noval) != TRAIN_NOVAL_MD5:
        found = f"found {len(train_noval):,} others" if sbd else "no --sbd"
        missing.append(f"the 5,623 ids of SBD's train_noval: {found}; put the published train_noval.txt into the folder of "
                       "--sbd, or beside the archive")
    ids = make_sets(train_noval, read_ids(sets / "Segmentation/train.txt"), read_ids(sets / "Segmentation/val.txt"))
    missing += [f"{name}: the image sets name {len(ids[name]):,} of {known:,} images"
                for name, known in KNOWN.items() if len(ids[name]) != known]

    # 2. their files
    every = ids["train"] + ids["val"]
    voc_source.fetch(r"(?:JPEGImages/[\w-]+\.jpg|Annotations/[\w-]+\.xml|SegmentationClass/[\w-]+\.png)", set(every))
    if sbd_source:
        sbd_source.fetch(r"cls/[\w-]+\.mat", set(every))
    folder, cls = voc_source.folder, sbd_source and sbd_source.folder / "cls"
    labels = {name: _label_source(name, folder, cls) for name in every}
    no_image = [name for name in every if not (folder / f"JPEGImages/{name}.jpg").is_file()]
    no_label = [name for name in every if labels[name] is None]
    missing += absent(f"images in {folder / 'JPEGImages'}", no_image)
    missing += absent(f"labels, neither in {folder / 'SegmentationClass'} nor in {cls or 'SBD (no --sbd)'}", no_label)
    missing += absent(f"XML files in {folder / 'Annotations'} (the classes of an image are then those of its label)",
                      [name for name in every if not (folder / f"Annotations/{name}.xml").is_file()])
    settle(missing, partial)
    gone = {*no_image, *no_label}
    ids = {name: [i for i in members if i not in gone] for name, members in ids.items()}
    for name, members in ids.items():
        if not members:
            raise UserError(f"{name}: no image has both its JPEG and its label; nothing to prepare")

    # 3. labels, then lists
    if folder.resolve() != out.resolve():
        for name in ("JPEGImages", "Annotations", "ImageSets"):
            if (folder / name).is_dir():
                link(folder / name, out / name)
    jobs = [(labels[i], folder / f"JPEGImages/{i}.jpg", out / LABELS / f"{i}.png") for i in ids["train"] + ids["val"]]
    written = sum(each(make_label, jobs, "labels"))
    print(f"{out / LABELS}: {written:,} labels written, {len(jobs) - written:,} were there")
    for name, members in ids.items():
        write_list(lists / f"{name}.txt", pairs(members))
        print(f"{lists / name}.txt: {len(members):,} of {KNOWN[name]:,} images")


def make_sets(train_noval: list[str], voc_train: list[str], voc_val: list[str]) -> dict[str, list[str]]:
    """Return the ids of train and val: SBD's first, in file order, then the VOC images not yet listed (PFENet's order)."""
    train = list(dict.fromkeys([*train_noval, *voc_train]))
    if both := sorted(set(train) & set(voc_val)):
        raise UserError(f"{len(both)} images are in training and in VOC 2012 val ({', '.join(both[:5])}): no result would be "
                        "worth anything; use the published image sets and train_noval.txt")
    return {"train": train, "val": voc_val}


def pairs(ids: list[str]) -> list[tuple[str, str]]:
    """Return the lines of a list, relative to the data root."""
    return [(f"JPEGImages/{i}.jpg", f"{LABELS}/{i}.png") for i in ids]


def read_train_noval(folder: Path, given: Path, voc_main_train: Path) -> list[str]:
    """Read SBD's images outside VOC 2012 val, in file order.

    They are in train_noval.txt, which is not in the archive: it is read from the SBD folder, or from beside `given`. Without it
    the ids are derived: SBD's images in VOC 2012's Main/train.txt, the classification half without the val images.
    """
    for path in (folder / "train_noval.txt", given / "train_noval.txt", given.parent / "train_noval.txt"):
        if path.is_file():
            return read_ids(path)
    train = set(read_ids(voc_main_train))
    return sorted(train.intersection(read_ids(folder / "train.txt") + read_ids(folder / "val.txt")))


def read_mat(path: Path) -> np.ndarray:
    """Read the class mask of an SBD .mat file, H W uint8."""
    try:
        mask = np.asarray(loadmat(path, simplify_cells=True)["GTcls"]["Segmentation"])
    except Exception as error:  # scipy raises many kinds on a damaged file
        raise UserError(f"{path}: not a readable SBD mask (GTcls.Segmentation): {type(error).__name__}: {error}; "
                        "fetch it again") from error
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise UserError(f"{path}: GTcls.Segmentation is {mask.dtype} {mask.shape}, expected H x W uint8; fetch it again")
    return mask


def make_label(job: tuple[Path, Path, Path]) -> bool:
    """Write the label `target` of `image` from `source` (.mat or palette PNG); return False where it exists already."""
    source, image, target = job
    hw = image_hw(image)
    if is_done(target, hw, CLASSES):
        return False
    label = read_mat(source) if source.suffix == ".mat" else read_label(source)
    check_classes(source, label, CLASSES)
    check_sizes(image, hw, source, label.shape)
    write_label(target, label)
    return True


def _label_source(name: str, voc: Path, cls: Path | None) -> Path | None:
    candidates = [voc / f"SegmentationClass/{name}.png", *([cls / f"{name}.mat"] if cls else []), voc / f"{LABELS}/{name}.png"]
    return next((path for path in candidates if path.is_file()), None)


def _md5(ids: list[str]) -> str:
    return hashlib.md5("".join(f"{i}\n" for i in ids).encode()).hexdigest()
