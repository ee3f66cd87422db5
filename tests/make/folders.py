"""A data set of one's own, as `python -m util.prepare.custom` takes it."""

from pathlib import Path

import numpy as np
from PIL import Image

from util.prepare.custom.__main__ import main

NAMES = "star", "fish", "tree", "house"  # which the demo's CLIP knows
REPO = Path(__file__).resolve().parents[2]
SIDE = 64
COLOURS = {"background": (0, 0, 0), "house": (9, 8, 7), "tree": (200, 0, 0), "fish": (0, 0, 1), "star": (1, 0, 0)}


def label_of(i: int) -> np.ndarray:
    """Image i shows class i % 4 + 1, every fifth also the next one; one ignored pixel."""
    label = np.zeros((SIDE, SIDE), np.uint8)
    label[8 : 24 + i, 4:40] = i % 4 + 1
    if i % 5 == 0:
        label[:40, 44:62] = (i + 1) % 4 + 1
    label[-1, -1] = 255
    return label


def picture(label: np.ndarray) -> Image.Image:
    """The label, with colours and some noise."""
    noise = np.random.default_rng(0).integers(0, 60, (*label.shape, 3))
    return Image.fromarray((noise + 40 * np.stack([label % 5, label * 2 % 5, label * 3 % 5], -1)).astype(np.uint8))


def write_own(root: Path) -> None:
    """32 images with grey masks."""
    for i in range(32):
        add(root, f"im{i:02}", label_of(i))
    (root / "classes.txt").write_text("star\nfish\ntree | tall tree\nhouse\n")


def add(root: Path, stem: str, label: np.ndarray) -> None:
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    picture(label).save(root / f"images/{stem}.jpg")
    Image.fromarray(label).save(root / f"masks/{stem}.png")


def prepare(root: Path, *more: str) -> None:
    main(["mine", "--from", str(root), "--min-pixels", "200", *more])
