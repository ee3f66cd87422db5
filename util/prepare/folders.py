"""Lists of data sets whose folders lie as mmsegmentation has them; nothing is converted ("CLIP-RC Sec. 10").

    voc         ImageSets/Segmentation/{train,aug,val}.txt, JPEGImages, SegmentationClass, SegmentationClassAug
    coco_stuff  images/{train,val}2017, annotations/{train,val}2017 with *_labelTrainIds.png, or the PNGs of stuffthingmaps
    context     ImageSets/SegmentationContext/{train,val}.txt, JPEGImages, SegmentationClassContext
"""

from pathlib import Path

from util.errors import UserError
from util.prepare.common import absent, read_ids, settle, write_list

COUNTS = {"voc": (10_582, 1_449), "coco_stuff": (118_287, 5_000), "context": (4_998, 5_105)}  # train, val
TRAIN_IDS = "_labelTrainIds.png"

Pairs = list[tuple[str, str]]


def prepare(data_set: str, root: Path, lists: Path, partial: bool) -> None:
    """Writes LISTS/train.txt and val.txt. Raises UserError where a file is missing or a count is another (unless `partial`)."""
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder; expected is the data set as mmsegmentation lays it out")
    found = {"voc": voc, "coco_stuff": coco_stuff, "context": context}[data_set](root)
    kept, missing = {}, []
    for (split, pairs), count in zip(found.items(), COUNTS[data_set], strict=True):
        lost = [name for pair in pairs for name in pair if not (root / name).is_file()]
        missing += absent(f"files of {split}", lost)
        missing += [f"{split} has {len(pairs):,} images, not {count:,}"] if len(pairs) != count else []
        kept[split] = [pair for pair in pairs if not set(pair) & set(lost)]
    settle(missing, partial)
    for split, pairs in kept.items():
        lists.mkdir(parents=True, exist_ok=True)
        write_list(lists / f"{split}.txt", pairs)
        print(f"{lists / f'{split}.txt'}: {len(pairs):,} images")
    if data_set == "coco_stuff" and not all(label.endswith(TRAIN_IDS) for pairs in kept.values() for _, label in pairs):
        print("labels of stuffthingmaps: add Data.label_table=lists/coco_stuff/stuffthingmaps.yaml to every command")


def voc(root: Path) -> dict[str, Pairs]:
    """VOC's own masks where it has them, SBD's for the rest."""
    sets = root / "ImageSets/Segmentation"
    train, val = read_ids(sets / "train.txt"), read_ids(sets / "val.txt")
    more = sets / ("aug.txt" if (sets / "aug.txt").is_file() or not (sets / "trainaug.txt").is_file() else "trainaug.txt")
    aug = [name for name in read_ids(more) if name not in set(train)]
    if both := sorted({*train, *aug} & {*val}):
        raise UserError(f"{sets}: {len(both)} images are in train and in val, the first {both[0]}; fetch the lists again")
    return {"train": [pair(name, "SegmentationClass") for name in train] + [pair(name, "SegmentationClassAug") for name in aug],
            "val": [pair(name, "SegmentationClass") for name in val]}  # fmt: skip


def context(root: Path) -> dict[str, Pairs]:
    sets = root / "ImageSets/SegmentationContext"
    return {split: [pair(name, "SegmentationClassContext") for name in read_ids(sets / f"{split}.txt")]
            for split in ("train", "val")}  # fmt: skip


def pair(name: str, labels: str) -> tuple[str, str]:
    return f"JPEGImages/{name}.jpg", f"{labels}/{name}.png"


def coco_stuff(root: Path) -> dict[str, Pairs]:
    """Every image of a folder; labels of 171 ids where there are any, else those of stuffthingmaps."""
    found = {}
    for split in ("train", "val"):
        images, labels = f"images/{split}2017", f"annotations/{split}2017"
        ids = sorted(path.stem for path in (root / images).glob("*.jpg"))
        suffix = TRAIN_IDS if ids and (root / labels / f"{ids[0]}{TRAIN_IDS}").is_file() else ".png"
        found[split] = [(f"{images}/{name}.jpg", f"{labels}/{name}{suffix}") for name in ids]
    return found
