"""The demo world: the same scenes everywhere, a complete VOC layout, enough of every class, and a CLIP that knows it."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from demo import world
from demo.shapes import NAMES
from demo.train_clip import evaluate
from model import configure
from util.data.folds import fold_of, read_class_names
from util.data.index import build_index, scan

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "lists/demo"
SCENE_1 = ((123, 154), {0: 12205, 1: 607, 10: 1363, 11: 541, 12: 3686, 255: 540})  # size of its label, pixels of each value


@pytest.fixture(scope="module")
def data_root() -> Path:
    """The world in full where the demo's config looks for it; drawing it takes a quarter of a minute on two cores, once."""
    return world.ensure(ROOT / "data/demo")


def test_a_scene_is_a_function_of_its_number() -> None:
    first, again, other = world.scene(7), world.scene(7), world.scene(8)
    assert (first.image == again.image).all() and (first.label == again.label).all() and first.boxes == again.boxes
    assert first.label.shape != other.label.shape or (first.label != other.label).any()


def test_scenes_stay_what_they_were() -> None:
    """Shapes, poses and depth order of a known scene; a change needs another world.VERSION (pixels may vary by rounding)."""
    label = world.scene(1).label
    assert label.shape == SCENE_1[0]
    counts = np.bincount(label.ravel(), minlength=256)
    assert {c: int(n) for c, n in enumerate(counts) if n} == pytest.approx(SCENE_1[1], rel=0.03, abs=8)


def test_the_lists_are_the_generators() -> None:
    for name, numbers in (("train", world.TRAIN), ("val", world.VAL)):
        assert (LISTS / f"{name}.txt").read_text() == world.list_lines(numbers)
    assert tuple((LISTS / "classes.txt").read_text().split()) == NAMES
    assert not set(world.TRAIN) & set(world.VAL) and max(*world.TRAIN, *world.VAL) < world.FRESH


def test_voc_layout(data_root: Path) -> None:
    lines = [line.split() for name in ("train", "val") for line in (LISTS / f"{name}.txt").read_text().splitlines()]
    assert len(list((data_root / "JPEGImages").iterdir())) == len(lines)
    for image, label in lines[::40]:
        pixels = Image.open(data_root / label)
        values = np.asarray(pixels)
        assert values.ndim == 2 and values.dtype == np.uint8 and Image.open(data_root / image).size == pixels.size
        root = ElementTree.parse(data_root / "Annotations" / f"{Path(label).stem}.xml").getroot()
        assert (int(root.findtext("size/width")), int(root.findtext("size/height"))) == pixels.size
        names = [thing.findtext("name") for thing in root.iter("object")]
        assert {NAMES.index(name) + 1 for name in names} == set(np.unique(values)) - {0, 255} and 1 <= len(names) <= 4
        for thing in root.iter("object"):
            xmin, ymin, xmax, ymax = (int(thing.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
            y, x = np.nonzero(values == NAMES.index(thing.findtext("name")) + 1)
            assert (xmin, ymin, xmax, ymax) == (x.min() + 1, y.min() + 1, x.max() + 1, y.max() + 1)


def test_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "TRAIN", range(1, 4))
    monkeypatch.setattr(world, "VAL", range(5001, 5003))
    world.ensure(tmp_path, workers=1)
    label = tmp_path / "SegmentationClassAug" / f"{world.stem(2)}.png"
    label.unlink()
    world.ensure(tmp_path)
    assert not label.exists()  # the marker says that all is there
    (tmp_path / "done").write_text("demo world 0\n")  # an older version
    world.ensure(tmp_path, workers=1)
    assert (np.asarray(Image.open(label)) == world.scene(2).label).all()
    assert not [f for f in tmp_path.rglob("*") if f.name.startswith(".")]  # nothing temporary is left


def test_every_fold_has_enough_of_every_class(data_root: Path, tmp_path: Path) -> None:
    names = read_class_names(LISTS / "classes.txt")
    train, val = (scan(data_root, LISTS / f"{name}.txt", names, tmp_path) for name in ("train", "val"))
    for split in range(4):
        classes = fold_of(configure(ROOT / f"config/demo/demo_split{split}_resnet50.yaml", "PSPNet"))
        base = build_index(train, classes.base, only=True, min_pixels=256).by_class
        novel = build_index(val, classes.novel, only=False, min_pixels=256).by_class
        assert min(len(base[c]) for c in classes.base) >= 30
        assert min(len(novel[c]) for c in classes.novel) >= 15


def test_the_tiny_clip_names_unseen_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    right = evaluate(range(world.VAL.start, world.VAL.start + 60))
    assert right["class token, one thing"] >= 0.9 and right["mean patch, one thing"] >= 0.9
