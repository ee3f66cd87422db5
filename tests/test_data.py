"""util/data, from files on disk to the index of a fold, and the transforms. Episodes: test_episodes.py."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from util.config import Config
from util.data import index as index_module
from util.data.__main__ import main
from util.data.episodes import EpisodeList, check_novel, episodes_per_class
from util.data.fold_counts import COUNTS, verdict
from util.data.folds import fold, fold_of, read_class_names
from util.data.index import Record, build_index, read_list, scan, table
from util.data.transforms import IMAGENET_MEAN, TrainTransform, ValTransform, bbox_mask, clip_input, read_image, read_label
from util.errors import UserError

LISTS = Path(__file__).resolve().parents[1] / "lists"
VOC = read_class_names(LISTS / "pascal/classes.txt")


# ---- folds and class names


def test_folds_are_the_published_ones():
    pascal = fold("pascal", 1)
    assert pascal.novel == (6, 7, 8, 9, 10) and len(pascal.base) == 15 and pascal.num_classes == 20
    assert [pascal.base_rank(c) for c in (1, 5, 11, 20, 6)] == [0, 4, 5, 14, -1]
    assert fold("coco", 1).novel == tuple(range(2, 81, 4))
    assert fold("coco", 1, use_split_coco=False).novel == tuple(range(21, 41))
    demo = Config()
    demo.Train.data_set, demo.Train.split = "demo", 3
    demo.Data.class_names = str(Path(__file__).parents[1] / "lists/demo/classes.txt")
    assert fold_of(demo).novel == (16, 17, 18, 19, 20)  # from folds.yaml beside the class names


@pytest.mark.parametrize(("data_set", "split", "says"), [("pascl", 0, "mean 'pascal'"), ("coco", 4, "0, 1, 2 or 3")])
def test_unknown_fold(data_set, split, says):
    with pytest.raises(UserError, match=says):
        fold(data_set, split)


def test_class_lists():
    assert len(VOC.names) == 20 and VOC.names[14] == "person" and VOC.texts[14] == "person with clothes,people,human"
    assert VOC.texts[0] == "aeroplane" and VOC.texts[19] == "tvmonitor screen"
    coco = read_class_names(LISTS / "coco/classes.txt")
    assert len(coco.names) == 80 and (coco.names[31], coco.texts[31]) == ("snowboard", "sknowboard")
    assert (coco.names[57], coco.texts[57]) == ("couch", "sofa") and coco.names[79] == "toothbrush"


@pytest.mark.parametrize("text", ["cat\n\ndog\n", "cat\n| dog\n", "cat |\n", "cat\ncat | kitty\n", "cat | a | b\n"])
def test_bad_class_list(tmp_path, text):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"classes\.txt:[12]: "):
        read_class_names(path)
    with pytest.raises(UserError, match="Data.class_names"):
        read_class_names(tmp_path / "none.txt")


# ---- reading a list


def test_published_lists():
    train, val = read_list(LISTS / "pascal/train.txt"), read_list(LISTS / "pascal/val.txt")
    assert (len(train), len(val)) == (5953, 1449) and not set(train) & set(val)
    assert train[0] == ("JPEGImages/2008_000008.jpg", "SegmentationClassAug/2008_000008.png")


def test_scan_reads_palette_indices_and_xml(block, write_voc):
    root, list_file = write_voc(
        {"a": block((50, 60), (3, 700), (15, 20)), "b": block((40, 30), (8, 5))}, xml={"a": ["chair", "bird", "chair"]}
    )
    a, b = scan(root, list_file, VOC, root / "cache")
    assert a == Record("JPEGImages/a.jpg", "SegmentationClassAug/a.png", 50, 60, {3: 700, 15: 20}, (3, 9))
    assert b.annotated == (8,)  # no XML: the classes of the label
    assert read_label(root / a.label)[0, 0] == 3 and cv2.imread(str(root / a.label), 0)[0, 0] != 3


def test_scan_is_cached_and_parallel(block, write_voc, monkeypatch):
    labels = {f"im{n}": block((20, 20), (n + 1, 30 + n)) for n in range(9)}
    root, list_file = write_voc(labels, xml={"im1": ["cat"]})
    cache = root / "cache"
    first = scan(root, list_file, VOC, cache)
    monkeypatch.setattr(index_module, "SERIAL_BELOW", 0)
    assert scan(root, list_file, VOC, root / "other", workers=2) == first
    monkeypatch.setattr(index_module, "_try_record", lambda *_: pytest.fail("the cache was not used"))
    assert scan(root, list_file, VOC, cache) == first
    monkeypatch.undo()
    (root / "Annotations/im0.xml").write_text("<annotation><object><name>dog</name></object></annotation>")
    assert scan(root, list_file, VOC, cache)[0].annotated == (12,)  # a new file is seen
    xml = root / "Annotations/im1.xml"
    xml.write_text(xml.read_text().replace("cat", "cow"))
    os.utime(xml, (1, 1))
    assert scan(root, list_file, VOC, cache)[1].annotated == (10,)  # a changed one of the same size too
    assert len(list(cache.iterdir())) == 3  # three caches, nothing half-written


def bad_label(root):
    label = read_label(root / "SegmentationClassAug/b.png")
    label[3, :2] = 21, 77
    Image.fromarray(label).save(root / "SegmentationClassAug/b.png")


def rewrite(path, change):
    return lambda root: change(root / path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (bad_label, r"b\.png: label values \[21, 77\].*0\.\.20"),
        (rewrite("../list.txt", lambda p: p.write_text("a b\nc\n")), r"list\.txt:2: expected `image_path label_path`"),
        (rewrite("../list.txt", lambda p: p.write_text(p.read_text() * 2)), r"list\.txt:3: .*already on line 1"),
        (rewrite("../list.txt", lambda p: p.write_text("\n")), "list is empty"),
        (rewrite("../list.txt", Path.unlink), r"Data\.train_list.*list\.txt"),
        (rewrite("JPEGImages/b.jpg", Path.unlink), r"image not found.*b\.jpg.*Data\.data_root"),
        (rewrite("SegmentationClassAug/b.png", Path.unlink), r"label not found.*b\.png.*Data\.data_root"),
        (rewrite("SegmentationClassAug/b.png", lambda p: p.write_bytes(b"PNG?")), r"b\.png: not a readable label"),
        (rewrite("SegmentationClassAug/b.png", lambda p: p.write_bytes(p.read_bytes()[:-40])), r"b\.png: not a"),
        (rewrite("SegmentationClassAug/b.png", lambda p: Image.new("RGB", (30, 40)).save(p)), r"b\.png.*RGB"),
        (rewrite("JPEGImages/b.jpg", lambda p: Image.new("RGB", (40, 30)).save(p)), r"b\.jpg is \(30, 40\).*b\.png"),
        (rewrite("Annotations/b.xml", lambda p: p.write_text("<annotation>")), r"b\.xml: not a readable"),
        (
            rewrite("Annotations/b.xml", lambda p: p.write_text("<a><object><name>unicorn</name></object></a>")),
            r"b\.xml: object names \['unicorn'\]",
        ),
    ],
)
def test_bad_files(block, write_voc, spoil, says):
    root, list_file = write_voc({"a": block((40, 30), (1, 9)), "b": block((40, 30), (2, 9))})
    spoil(root)
    with pytest.raises(UserError, match=says):
        scan(root, list_file, VOC, root / "cache")


@pytest.mark.parametrize("root", ["", "/no/such/folder"])
def test_missing_data_root(root):
    with pytest.raises(UserError, match=r"Data\.data_root"):
        scan(root, LISTS / "pascal/val.txt", VOC, "cache")


def test_missing_image(tmp_path):
    with pytest.raises(UserError, match=r"x\.jpg.*Data\.data_root"):
        read_image(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"x\.jpg: not a readable image"):
        read_image(tmp_path / "x.jpg")


# ---- the index of a fold


def test_index_rules():
    def record(name, **pixels):
        return Record(name, name, 100, 100, {int(c[1:]): n for c, n in pixels.items()}, ())

    records = [
        record("counts", c6=2048),
        record("too small", c6=2047),
        record("small novel", c6=5000, c1=1),
        record("two, one small", c20=9000, c6=3),
        record("novel", c1=2048, c7=9999),
        record("two", c6=3000, c20=3000),
        record("background"),
    ]
    f = fold("pascal", 0)
    train = build_index(records, f.base, only=True)
    assert [r.image for r in train.records] == ["counts", "two, one small", "two"]
    assert train.present == [(6,), (6, 20), (6, 20)]
    assert {c: p for c, p in train.by_class.items() if p} == {6: [0, 2], 20: [1, 2]}
    unfiltered = build_index(records, f.base, only=False)  # PFENet
    assert [r.image for r in unfiltered.records] == ["counts", "small novel", "two, one small", "novel", "two"]
    val = build_index(records, f.novel, only=False)
    assert [r.image for r in val.records] == ["novel"] and val.by_class[1] == [0] and val.present == [(1,)]
    text = table(train, VOC)
    assert "3 images, 4 (image, class) pairs" in text and "15  person" in text


def test_index_of_voc_mini(voc_mini, tmp_path):
    """Counted once with another program (PIL histograms)."""
    counts = {}
    for subset in ("train", "val"):
        records = scan(voc_mini, LISTS / f"pascal_mini/{subset}.txt", VOC, tmp_path)
        for split in range(4):
            f = fold("pascal", split)
            index = build_index(records, f.base if subset == "train" else f.novel, only=subset == "train")
            counts[subset, split] = len(index.records), sum(map(len, index.by_class.values()))
    assert counts == {
        ("train", 0): (211, 323), ("train", 1): (193, 260), ("train", 2): (136, 167), ("train", 3): (214, 311),
        ("val", 0): (66, 66), ("val", 1): (96, 105), ("val", 2): (156, 204), ("val", 3): (98, 101),
    }  # fmt: skip


def test_index_of_coco128(tmp_path):
    """Real COCO, both styles of folds, against a plain loop over the label PNGs."""
    source = Path(__file__).resolve().parents[2] / "shared/data/coco128"
    if not source.is_dir():
        pytest.skip(f"no coco128 at {source}")
    prepare = pytest.importorskip("util.prepare.coco").prepare
    prepare(source, [source / "instances_train2017.json"], tmp_path / "out", tmp_path / "lists", partial=True)
    names = read_class_names(LISTS / "coco/classes.txt")
    records = scan(tmp_path / "out", tmp_path / "lists/train.txt", names, tmp_path)
    labels = [np.array(Image.open(tmp_path / "out" / r.label)) for r in records]
    for split, interleaved in ((0, True), (3, True), (1, False)):
        f = fold("coco", split, interleaved)
        for classes, only in ((f.base, True), (f.novel, False)):
            index = build_index(records, classes, only)
            expected = {c: [] for c in classes}
            for record, label in zip(records, labels, strict=True):
                present = set(np.unique(label).tolist()) - {0}
                counting = [c for c in classes if (label == c).sum() >= 2048]
                if counting and not (only and present - set(classes)):
                    for c in counting:
                        expected[c].append(record.image)
            found = {c: [index.records[i].image for i in filed] for c, filed in index.by_class.items()}
            assert found == expected and sum(map(len, found.values())) > 15


# ---- transforms


@pytest.mark.parametrize("crop", [False, True])
def test_train_transform_keeps_image_and_label_together(crop):
    """A red object on blue: after any augmentation the mask is where the red is; borders are the mean, ignored."""
    label = np.zeros((90, 130), np.uint8)
    cv2.ellipse(label, (40, 35), (30, 18), 25, 0, 360, 4, -1)
    image = np.where(label[..., None] == 4, np.float32([255, 0, 0]), np.float32([0, 0, 255]))
    transform = TrainTransform(100, 0.8, 1.25, crop=crop)
    flips, borders, blurs, sizes = set(), 0, 0, []
    for seed in range(40):
        out, clean, (mask, base) = transform(np.random.default_rng(seed), image, [label, label // 2])
        assert out.shape == clean.shape == (100, 100, 3) and mask.shape == base.shape == (100, 100)
        assert out.dtype == clean.dtype == np.float32 and set(np.unique(mask)) <= {0, 4, 255}
        np.testing.assert_array_equal(base[mask == 4], 2)
        seen = mask != 255
        for picture in (out, clean):
            wrong = ((picture[..., 0] > picture[..., 2]) != (mask == 4)) & seen
            assert wrong.sum() < 0.12 * (mask == 4).sum(), seed  # the rim, where colours mix
        inner = cv2.erode((~seen).astype(np.uint8), np.ones((7, 7))) > 0
        if inner.any():
            np.testing.assert_allclose(clean[inner], np.broadcast_to(IMAGENET_MEAN, clean[inner].shape), atol=1e-3)
        flips.add(bool(np.nonzero(mask == 4)[1].mean() > 50))
        borders += bool((~seen).any())
        blurs += not np.array_equal(out, clean)
        sizes.append(int((mask == 4).sum()))
    assert flips == {True, False} and 5 < borders and 10 < blurs < 30
    if crop:
        assert max(sizes) > 1.8 * min(sizes)  # scaled: .8**2 to 1.25**2


def test_crop_reaches_every_window():
    down, right = np.mgrid[0:22, 0:23].astype(np.float32)
    image = np.stack([down, right, right], -1)
    transform = TrainTransform(20, 1, 1, crop=True, rotate=(0, 0))
    corners = {tuple(transform(np.random.default_rng(s), image, [])[1][..., :2].min((0, 1))) for s in range(200)}
    assert corners == {(y, x) for y in range(3) for x in range(4)}


def test_bad_ranges():
    with pytest.raises(UserError, match="scale_min"):
        TrainTransform(10, 1.1, 0.9)


def test_letterbox_and_squash():
    image, label = np.full((375, 500, 3), 200, np.float32), np.full((375, 500), 7, np.uint8)
    out, clean, (mask,) = ValTransform(473, squash=False)(None, image, [label])
    assert out.shape == (473, 473, 3) and out is clean
    assert (out[:352, :472] == 200).all() and (mask[:352, :472] == 7).all()  # 473 x 354 -> 472 x 352
    assert not out[352:].any() and not out[:, 472:].any()
    assert (mask[352:] == 255).all() and (mask[:, 472:] == 255).all()
    back = ValTransform(473, squash=False).placed((375, 500)).restore(torch.from_numpy(out[..., 0])[None])
    assert back.shape == (1, 375, 500) and (back[:, :370, :497] > 199).all()  # 352 of 473 rows are 371 of 500
    out, _, (mask,) = ValTransform(473, squash=True)(None, image, [label])
    assert out.shape == (473, 473, 3) and (out == 200).all() and (mask == 7).all()


def test_bbox_mask():
    mask = np.zeros((12, 14), np.uint8)
    mask[1:6, 1] = mask[5, 1:5] = 1  # an L: its box is filled
    mask[8, 9] = mask[9, 10] = 1  # touching by a corner: one component
    mask[2, 3], mask[11, 13] = 255, 255
    expected = np.zeros_like(mask)
    expected[1:6, 1:5] = expected[8:10, 9:11] = 1
    expected[2, 3] = expected[11, 13] = 255
    np.testing.assert_array_equal(bbox_mask(mask), expected)


def test_clip_input():
    clean = np.full((40, 40, 3), 1.9, np.float32)
    clean[..., 2] = 254.99
    out = clip_input(clean, (375, 500))
    assert out.shape == (3, 384, 512) and out.dtype == torch.uint8 and out.is_contiguous()
    assert (out[0] == 1).all() and (out[2] == 254).all()  # truncated, not rounded
    assert clip_input(clean, (473, 473)).shape == (3, 480, 480)
    assert clip_input(clean, (28, 56), patch=14).shape == (3, 28, 56)
    ramp = np.random.default_rng(0).uniform(0, 256, (31, 47, 3)).astype(np.float32)
    expected = Image.fromarray(ramp.astype(np.uint8)).resize((64, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(clip_input(ramp, (32, 64)).permute(1, 2, 0), np.asarray(expected))


# ---- what a user is told before anything runs


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a\\b.jpg a/b.png", r"'a\\\\b\.jpg' has a backslash"),
        ("a/b.jpg /data/b.png", "'/data/b.png' is an absolute path"),
        ("C:/a/b.jpg a/b.png", "'C:/a/b.jpg' is an absolute path"),
        ("../../etc/b.jpg a/b.png", "leads out of the data root"),
        ("a/b.jpg a/../../b.png", "leads out of the data root"),
        ("my images/b.jpg labels/b.png", "got .*must not hold spaces"),
    ],
)
def test_paths_that_are_refused(tmp_path, line, says):
    (tmp_path / "list.txt").write_text(f"ok.jpg ok.png\n{line}\n")
    with pytest.raises(UserError, match=rf"list\.txt:2: .*{says}"):
        read_list(tmp_path / "list.txt")


def test_lists_of_other_editors(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("a.jpg a.png\r\nb..c.jpg\tb.png \r\n\r\n".encode("utf-8-sig"))
    assert read_list(path) == [("a.jpg", "a.png"), ("b..c.jpg", "b.png")]
    path.write_bytes("ä.jpg ä.png".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_list(path)


def test_every_novel_class_needs_an_episode():
    f = fold("pascal", 0)
    records = [Record(f"{n}.jpg", f"{n}.png", 9, 9, {1 + n % 5: 3000}, ()) for n in range(20)]
    whole = EpisodeList(build_index(records, f.novel, only=False), 1, seed=3)
    check_novel(whole, f, VOC, 5)
    assert episodes_per_class(whole, 7) == {1: 2, 2: 2, 3: 1, 4: 1, 5: 1}
    with pytest.raises(UserError, match=r"none of the 4 episodes of seed 3.* 5 \(bottle\);.*test_num"):
        check_novel(whole, f, VOC, 4)
    partial = EpisodeList(build_index([r for r in records if not {2, 4} & set(r.pixels)], f.novel, only=False), 1, seed=3)
    with pytest.raises(UserError, match=r"fold 0 of pascal.* 2 \(bicycle\), 4 \(boat\); Data\.val_list"):
        check_novel(partial, f, VOC)


def test_verdict():
    config = Config()
    config.Train.split = 2
    images, pairs = COUNTS["pascal", "val"][2]
    assert verdict(config, "val", 1449, images, pairs).startswith("EQUALS the published index: 592 images, 734 pairs")
    assert verdict(config, "val", 1449, images, 733).startswith("DIFFERS from the published index: 733 pairs, published are 734.")
    assert verdict(config, "val", 1448, images, pairs).startswith("partial list, 1,448 of 1,449 images")
    config.Train.filter_novel = False
    assert "filter_novel" in verdict(config, "train", 5953, 1, 1) and "EQUALS" in verdict(config, "val", 1449, images, pairs)
    config.Train.data_set = "coco"
    assert "EQUALS" in verdict(config, "val", 40137, 13138, 14563)
    config.Train.use_split_coco = False
    assert "use_split_coco" in verdict(config, "val", 40137, 13138, 14563)
    config.Train.use_split_coco = config.Train.filter_novel = True
    assert "no counts" in verdict(config, "train", 82081, 5, 5)
    config.Train.split = 0
    assert "EQUALS" in verdict(config, "train", 82081, 21917, 5) and "DIFFERS" in verdict(config, "train", 82081, 21916, 5)


def test_index_command(block, write_voc, tmp_path, monkeypatch, capsys):
    repository = LISTS.parent
    root, list_file = write_voc({f"im{n}": block((50, 60), (1 + n % 7, 2100)) for n in range(21)})
    given = ["--config", str(repository / "config/pascal/pascal_split0_resnet50.yaml"), f"Data.data_root={root}",
             f"Data.val_list={list_file}", f"Data.train_list={list_file}", "Test_Finetune.test_num=30",
             f"Data.class_names={LISTS}/pascal/classes.txt"]  # fmt: skip
    monkeypatch.chdir(tmp_path)  # the cache
    main(["index", *given])
    text = capsys.readouterr().out
    assert "partial list, 21 of 5,953" in text and "partial list, 21 of 1,449" in text
    assert "   6  bus                   3 images\n" in text and "   1  aeroplane             3 images       6 episodes\n" in text
    (path,) = tmp_path.glob("exp/.cache/index-pascal-0-val-*.json")
    stored = json.loads(path.read_text())
    assert stored["by_class"]["bird"] == ["JPEGImages/im2.jpg", "JPEGImages/im9.jpg", "JPEGImages/im16.jpg"]
    assert len(stored["images"]) == 15 and stored["hash"] in path.name and str(path.relative_to(tmp_path)) in text
    main(["index", *given])
    main(["index", *given, "Data.min_pixels=2000"])
    assert len(list(tmp_path.glob("exp/.cache/index-pascal-0-*.json"))) == 4  # other rules, another file
    with pytest.raises(UserError, match=r"none of the 3 episodes of seed 321.*4 \(boat\), 5 \(bottle\)"):
        main(["index", *given, "Test_Finetune.test_num=3"])


def test_every_fold_of_voc_mini_has_all_classes(voc_mini, tmp_path):
    records = scan(voc_mini, LISTS / "pascal_mini/val.txt", VOC, tmp_path)
    for split in range(4):
        f = fold("pascal", split)
        check_novel(EpisodeList(build_index(records, f.novel, only=False), 1, seed=321), f, VOC, 200)
