"""Small folders with the layouts of the data sets of util/prepare/sets.py."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 24


def save(path: Path, top: int, value: int = 255, mask: bool = True) -> None:
    """A grey mask whose rows from `top` to top + 8 have the value, or a photograph of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    label = np.zeros((SIDE, SIDE + 8), np.uint8)
    label[top : top + 8, 4:20] = value
    if not mask:
        label = np.stack([200 * (label > 0), 0 * label, 90 * (label == 0)], -1).astype(np.uint8)
    Image.fromarray(label).save(path)


def pair(image: Path, mask: Path, top: int, value: int = 255) -> None:
    save(image, top, mask=False)
    save(mask, top, value)


def fss(root: Path) -> None:
    for c, name in enumerate(("ab_wheel", "zebra", "cat")):
        for i in range(1, 11):
            pair(root / name / f"{i}.jpg", root / name / f"{i}.png", c + i % 8)
    (root / "fss_test_set.txt").write_text("zebra\nab_wheel\n")  # cat is a training class


def isic(root: Path, flat: bool = False) -> None:
    inputs, truth = root / "ISIC2018_Task1-2_Training_Input", root / "ISIC2018_Task1_Training_GroundTruth"
    lines = ["ID,Class"]
    for n in range(9):
        place = inputs if flat else inputs / f"{1 + n % 3}"
        pair(place / f"ISIC_{n:07d}.jpg", truth / f"ISIC_{n:07d}_segmentation.png", n)
        lines.append(f"ISIC_{n:07d},{('seborrheic_keratosis', 'nevus', 'melanoma')[n % 3]}")
    if flat:
        (root / "class_id.csv").write_text("\n".join(lines) + "\n")


def lung(root: Path) -> None:
    for n in range(5):
        pair(root / f"CXR_png/CHNCXR_{n}.png", root / f"masks/CHNCXR_{n}_mask.png", n)
    for n in range(3):
        pair(root / f"CXR_png/MCUCXR_{n}.png", root / f"masks/MCUCXR_{n}.png", n)


def suim(root: Path) -> None:
    for n in range(8):
        save(root / f"images/d_{n}.jpg", n, mask=False)
        for i, name in enumerate(("FV", "HD", "PF", "RI", "RO", "SR", "WR")):  # masks of two classes overlap
            if n in (i, i + 1):
                save(root / f"masks/{name}/d_{n}.png", n)
            (root / f"masks/{name}").mkdir(parents=True, exist_ok=True)


def deepglobe(root: Path, flat: bool = False) -> None:
    for c in range(1, 7):
        for n in (c, c + 1):
            image = root / (f"image/{n}.jpg" if flat else f"{c}/test/origin/{n}.jpg")
            pair(image, root / (f"filter_mask/{c}/{n}.png" if flat else f"{c}/test/groundtruth/{n}.png"), n)


def isaid(root: Path) -> None:
    for split, folder in (("val", "val"), ("trn", "train")):
        tiles = root / f"iSAID_patches/{folder}"
        for c in range(1, 16):
            for n in range(2):
                name = f"{split}{c:04d}_{n}"
                pair(tiles / f"images/{name}.png", tiles / f"masks/{name}_instance_color_RGB.png", n, c)
        for fold in range(3):
            lines = [f"{split}{c:04d}_{n}_instance_color_RGB__{c}" for c in range(5 * fold + 1, 5 * fold + 6) for n in (1, 0)]
            (root / f"splits/{split}").mkdir(parents=True, exist_ok=True)
            (root / f"splits/{split}/fold{fold}.txt").write_text("\n".join(lines) + "\n")


def box(x0: int, y0: int, x1: int, y1: int) -> list[list[float]]:
    return [[float(v) for v in (x0, y0, x1, y0, x1, y1, x0, y1)]]


def lvis(root: Path) -> None:
    """22 classes, of which 20 have three images; the order of the file is not that of the ids."""
    for n in range(4):
        save(root / f"val2017/{n}.jpg", n, mask=False)
    entry = {"annotations": [{"segmentation": box(2, 2, 8, 8)}, {"segmentation": box(6, 6, 12, 12)}]}
    found = {(7 * i) % 23: {f"val2017/{n}.jpg": entry for n in range(3 if i > 2 else 1)} for i in range(1, 23)}
    (root / "lvis_val.pkl").write_bytes(pickle.dumps(found))


def pascal_part(root: Path) -> None:
    table: dict = {}
    things = (("animals", "cow", ("HEAD", "LEG")), ("indoor", "bottle", ("BODY",)), ("person", "person", ("ARM",)),
              ("vehicles", "aeroplane", ("TAIL", "BODY")))  # fmt: skip
    for kind, thing, parts in things:
        table[kind] = {thing: {part: {"train": ["t0"], "val": [f"{thing}_{n}" for n in range(3)]} for part in parts}}
        for n in range(3):
            save(root / f"JPEGImages/{thing}_{n}.jpg", n, mask=False)
            note = {"object": [
                {"name": "cat", "bndbox": [0, 0, 5, 5], "parts": []},
                {"name": thing, "bndbox": [2, 3, 20, 23], "parts": [{"name": part, "mask": box(4, 4, 9, 9)} for part in parts]},
            ]}  # fmt: skip
            notes = root / "Annotations_Part_json_merged_part_classes"
            notes.mkdir(exist_ok=True)
            (notes / f"{thing}_{n}.json").write_text(json.dumps(note))
    (root / "all_obj_part_to_image.json").write_text(json.dumps(table))


def paco_part(root: Path) -> None:
    ids = [3 * i for i in range(448)]
    for n in range(3):
        save(root / f"val2017/{n}.jpg", n, mask=False)
    used = {cls: [{n: f"val2017/{n}.jpg"} for n in (0, 1, 2, 0)] for cls in ids[:8]} | {ids[9]: [{0: "val2017/0.jpg"}]}
    notes = {n: [{"category_id": cls, "obj_ann_id": 5, "obj_bbox": [2.6, 3.0, 18.0, 19.0], "segmentation": box(4, 4, 9, 9)}
                 for cls in ids[:10]] for n in range(3)}  # fmt: skip
    (root / "paco_part_train.pkl").write_bytes(pickle.dumps({"cid2img": {cls: [] for cls in ids}, "img2anno": {}}))
    (root / "paco_part_val.pkl").write_bytes(pickle.dumps({"cid2img": used, "img2anno": notes}))


DRAW: dict[str, Callable[[Path], None]] = {
    "fss": fss, "isic": isic, "lung": lung, "suim": suim, "deepglobe": deepglobe, "isaid": isaid, "lvis": lvis,
    "pascal_part": pascal_part, "paco_part": paco_part,
}  # fmt: skip
