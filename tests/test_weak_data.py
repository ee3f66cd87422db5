"""Image-level labels, crops that show their border, and the task that learns without masks."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from model import configure
from tests.make import ROOT
from util import protocol
from util.data.crops import PaddedCrop
from util.data.folds import ClassNames
from util.data.image_labels import read_image_labels
from util.data.transforms import IGNORE
from util.errors import UserError
from util.score.weak import WeakTask

NAMES = ClassNames(("dog", "traffic light", "cat"), ("dog", "traffic light", "cat"))
CONFIG = ROOT / "config/demo/demo_weak_vit8.yaml"


@pytest.mark.parametrize("hw", [(40, 60), (20, 90), (200, 30), (3, 3)])
def test_padded_crop(hw: tuple[int, int]) -> None:
    """A window of the scaled image, perhaps mirrored, on black; its labels are 255 exactly where it is black."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    image = np.stack([y, x, np.full(hw, 100)], 2).astype(np.float32)  # pixels that tell their place
    shown = np.zeros(hw, np.uint8)
    crop, sides, corners, flips = PaddedCrop(64, 0.5, 2), [], set(), 0
    for seed in range(60):
        out, clean, (inside,) = crop(np.random.default_rng(seed), image, [shown])
        again = crop(np.random.default_rng(seed), image, [shown])[0]
        assert out.shape == (64, 64, 3) and out.dtype == np.float32 and clean is out and np.array_equal(out, again)
        assert np.array_equal(inside == IGNORE, out[..., 2] == 0)
        rows, columns = (np.flatnonzero((inside != IGNORE).any(axis)) for axis in (1, 0))
        assert np.ptp(rows) + 1 == len(rows) and np.ptp(columns) + 1 == len(columns)  # one rectangle
        sides.append((len(rows), len(columns)))
        corners.add((rows[0], columns[0]))
        across = out[rows[0], columns, 1]
        flips += len(columns) > 1 and across[0] > across[-1]
    for lengths, side in zip(np.array(sides).T, hw, strict=True):  # of what the crop shows, over the scales
        assert min(side // 2, 64) <= lengths.min() <= min(side * 0.7, 64)
        assert min(side * 1.6, 64) <= lengths.max() <= min(2 * side, 64)
    assert len(corners) > 10 and 15 < flips < 45


def test_a_crop_is_pillow_s_resize() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 30, 3)).astype(np.float32)
    out, _, (inside,) = PaddedCrop(80, 1.5, 1.5)(np.random.default_rng(1), image, [np.zeros((50, 30), np.uint8)])
    expected = np.array(Image.fromarray(image.astype(np.uint8)).resize((45, 75), Image.Resampling.BILINEAR))
    found = out[inside != IGNORE].reshape(75, 45, 3)
    assert np.array_equal(found, expected) or np.array_equal(found, cv2.flip(expected, 1))


def test_image_labels(tmp_path: Path) -> None:
    text, other = tmp_path / "labels.txt", tmp_path / "labels.json"
    text.write_text("a cat, traffic light\n\nb 1\nnone\n")
    assert read_image_labels(text, NAMES) == {"a": (2, 3), "b": (1,), "none": ()}
    other.write_text(json.dumps({"JPEGImages/a.jpg": ["cat", 1, 1]}))
    assert read_image_labels(other, NAMES) == {"JPEGImages/a.jpg": (1, 3)}
    wrong = {"a bird": "'bird' is no class; .* 1..3", "a 0": "add 1", "a 4": "no class", "a 1\na 2": "twice"}
    for content, message in wrong.items():
        text.write_text(content)
        with pytest.raises(UserError, match=message):
            read_image_labels(text, NAMES)
    for content in ("{", "[1]", '{"a": 1}'):
        other.write_text(content)
        with pytest.raises(UserError, match="Data.image_labels"):
            read_image_labels(other, NAMES)


@pytest.fixture
def task(scenes: Path, tmp_path: Path):
    """Makes the task on lines of a list, over a data root without a single mask."""

    def make(*lines: str, xml: bool = True, **data: str) -> WeakTask:
        root = tmp_path / f"root{xml}"
        root.mkdir(exist_ok=True)
        for folder in ("JPEGImages", *(["Annotations"] if xml else [])):
            if not (root / folder).exists():
                (root / folder).symlink_to(scenes / folder)
        (tmp_path / "train.txt").write_text("\n".join(lines))
        more = {"data_root": root, "train_list": tmp_path / "train.txt", **data}
        return WeakTask(configure(CONFIG, "WeCLIP", [f"Data.{key}={value}" for key, value in more.items()]), tmp_path / "cache")

    return make


LINES = "JPEGImages/005001.jpg", "JPEGImages/005002.jpg gone/005002.png"


def test_training_needs_no_mask(task, scenes: Path, tmp_path: Path) -> None:
    trained = task(*LINES)
    records = trained.records("train_list")
    assert [r.label for r in records] == ["", "gone/005002.png"] and all(r.annotated and not r.pixels for r in records)
    sample = trained.training()[0]
    assert sample.image.shape == (1, 3, 96, 96) and (sample.label == IGNORE).all()
    assert sample.present.sum() == len(records[[r.image for r in records].index(sample.name[0])].annotated)
    y0, y1, x0, x1 = sample.valid[0].tolist()
    assert not sample.image[0, :, :y0].any() and not sample.image[0, :, :, x1:].any() and sample.image[0, :, y0:y1, x0:x1].any()

    given = tmp_path / "labels.txt"
    given.write_text("005001 star, fish\nJPEGImages/005002.jpg\n")
    chosen = task(*LINES, image_labels=given)
    assert [r.annotated for r in chosen.records("train_list")] == [(1, 2), ()]  # before those of the XML; none is a label too
    assert not torch.stack([chosen.training()[i].present[0] for i in range(2)]).all(0).any()
    given.write_text("005001 star")
    with pytest.raises(UserError, match=r"no line for JPEGImages/005002\.jpg"):
        task(*LINES, image_labels=given).records("train_list")


def test_images_without_labels_and_wrong_lines(task) -> None:
    with pytest.raises(UserError, match=r"nothing tells which classes it shows.*Annotations/005001\.xml"):
        task(*LINES, xml=False).records("train_list")
    with pytest.raises(UserError, match=r"train\.txt:1: expected `image_path label_path`"):
        task("a b c").records("train_list")


def test_class_names_fewer_than_labels(task, tmp_path: Path) -> None:
    """In an XML, a line of labels, a mask: what names are missing for is said, before anything is trained."""
    shown = task(*LINES).records("train_list")[0].annotated[-1]
    names = (ROOT / "lists/demo/classes.txt").read_text().splitlines()
    missing, short = names[shown - 1], tmp_path / "names.txt"
    short.write_text("\n".join(name for name in names if name != missing))
    with pytest.raises(UserError, match=rf"005001\.xml.*{missing}"):
        task(*LINES, class_names=short).records("train_list")
    labels = tmp_path / "labels.txt"
    labels.write_text(f"005001 {missing}\n005002 1\n")
    with pytest.raises(UserError, match=f"'{missing}' is no class"):
        task(*LINES, class_names=short, image_labels=labels).records("train_list")


def test_masks_of_training_images_are_opened_to_score_pseudo_labels_alone(task, scenes: Path) -> None:
    root, line = scenes, "JPEGImages/005001.jpg SegmentationClassAug/005001.png"
    plain, watched = (task(line, "JPEGImages/005002.jpg gone/005002.png", data_root=root) for _ in range(2))
    plain.config.Train.watch_labels = False
    assert watched.config.Train.watch_labels  # as the demo has it
    for i in range(4):
        a, b = plain.training()[i], watched.training()[i]
        assert (a.label == IGNORE).all() and torch.equal(a.image, b.image) and torch.equal(a.present, b.present)
        assert (b.label != IGNORE).any() == (b.name[0] == "JPEGImages/005001.jpg")


def test_all_classes_and_the_background_count(task, scenes: Path) -> None:
    found = task(*LINES)
    assert found.channels == found.classes == tuple(range(21)) and found.fold.novel == ()
    assert found.headline == "miou" and not found.leaks and found.setting == "image-level labels"


def test_the_start_of_rfm_is_a_rule_of_the_protocol() -> None:
    """The published VOC script counts validation images as steps; on COCO it has no validation."""
    found = {}
    for data_set, net in (("voc", "vitb16"), ("coco", "vitb16"), ("demo", "vit8")):
        for name in ("auto", "strict"):
            file = ROOT / f"config/{data_set}/{data_set}_weak_{net}.yaml"
            config = configure(file, "WeCLIP", [f"Test_Finetune.protocol={name}"])
            used, steps = protocol.of(config), config.Method.static_steps
            assert used.describe(False, WeakTask.says)["steps before attention is filtered (RFM)"] == str(steps)
            found[data_set, used.name] = steps
    assert found == {("voc", "weclip-paper"): 9144, ("voc", "strict"): 15_000, ("coco", "weclip-paper"): 40_000,
                     ("coco", "strict"): 40_000, ("demo", "weclip-paper"): 400, ("demo", "strict"): 400}  # fmt: skip
    hashes = {protocol.of(configure(CONFIG, "WeCLIP", [f"Method.static_steps={n}"])).hash for n in (1, 2)}
    assert len(hashes) == 2
