"""util/data/custom: folders, VOC and COCO layouts of one's own become data sets that train and test; what is wrong is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import configure
from tests.make.folders import COLOURS, NAMES, REPO, SIDE, add, label_of, picture, prepare
from util import protocol
from util.data.folds import fold_of, read_class_names, read_folds
from util.data.index import Record, read_list
from util.data.transforms import read_label
from util.errors import UserError
from util.prepare.custom import check
from util.prepare.custom.__main__ import following, main
from util.score.episodes import FewShotTask


def source(split: int = 0, name: str = "mine", net: str = "resnet50") -> FewShotTask:
    config = configure(f"config/{name}/{name}_split{split}_{net}.yaml", "HDMNet")
    return FewShotTask(config, Path("cache"))


def files() -> dict[str, int]:
    """Everything in the repository and when it was written."""
    return {str(path): path.lstat().st_mtime_ns for path in Path().rglob("*") if not path.is_dir() or path.is_symlink()}


# ---- folders


def test_a_folder_becomes_a_data_set(own: Path, capsys: pytest.CaptureFixture) -> None:
    prepare(own)
    shown = capsys.readouterr().out
    assert re.search(r"3  tree +\d+ +\d+ +\d+ +\d+ +split2", shown) and "split3: " in shown, shown
    assert following("mine", 0, False).endswith("ARCH=HDMNet NET=efficientnet_lite0 sh test.sh split0 mine 0")
    for split in range(4):
        data = source(split)
        assert data.fold.novel == (split + 1,) and len(data.fold.base) == 3 and data.names.texts[2] == "tall tree"
        for part in ("train", "val"):
            for record in data.records(f"{part}_list"):
                label = label_of(int(Path(record.image).stem[2:]))
                assert record.pixels == {int(c): int((label == c).sum()) for c in np.unique(label) if c not in (0, 255)}
        sample = data.validation().data[0]
        assert int(sample.cls) == split + 1 and (sample.query_mask == 1).any()
        assert data.training()[0].query.shape == (1, 3, 473, 473)
    assert source(0, net="efficientnet_lite0").config.Train.train_h == 225
    train, val = (read_list(f"lists/mine/{part}.txt") for part in ("train", "val"))
    assert len(train) + len(val) == 32 and not set(train) & set(val)
    for arch, name in (("HDMNet", "auto"), ("PI_CLIP", "strict")):
        config = configure("config/mine/mine_split0_resnet50.yaml", arch, [f"Test_Finetune.protocol={name}"])
        assert protocol.of(config).name == f"{config.Test_Finetune.protocol} but Data.min_pixels=200"


def test_again_changes_nothing_but_what_is_new(own: Path, capsys: pytest.CaptureFixture) -> None:
    prepare(own)
    before = files()
    main(["mine", "--from", str(own)])  # --min-pixels is then that of base.yaml
    assert files() == before and "nothing new to write" in capsys.readouterr().out

    base = Path("config/mine/base.yaml")
    base.write_text(base.read_text().replace("epochs: 20", "epochs: 3"))
    sides = {part: set(read_list(f"lists/mine/{part}.txt")) for part in ("train", "val")}
    for i in range(32, 48):
        add(own, f"im{i:02}", label_of(i % 32))
    main(["mine", "--from", str(own)])
    assert "left alone: config/mine/base.yaml" in capsys.readouterr().out and "epochs: 3" in base.read_text()
    for part, earlier in sides.items():
        assert earlier < set(read_list(f"lists/mine/{part}.txt"))
    base.unlink()
    prepare(own)
    assert "epochs: 20" in base.read_text()


def test_named_parts_and_folds(own: Path, capsys: pytest.CaptureFixture) -> None:
    (own / "train.txt").write_text("\n".join(f"im{i:02}.jpg" for i in range(16)))
    (own / "val.txt").write_text("\n".join(f"im{i:02}" for i in range(16, 30)))
    (own / "folds.yaml").write_text("split0: [fish, house]\nsplit1: [tree]  # star: always a base class\n")
    (own / "masks/im03.png").unlink()
    (own / "images/notes.txt").touch()
    prepare(own)
    shown = capsys.readouterr().out
    for text in ("without a mask .*im03.jpg", r"2 images in neither .*im30, im31", "no PNGs: notes.txt", r"star .*no fold"):
        assert re.search(text, shown), shown
    assert [Path(image).stem for image, _ in read_list("lists/mine/train.txt")] == [f"im{i:02}" for i in range(16) if i != 3]
    assert source(0).fold.novel == (2, 4) and source(1).fold.base == (1, 2, 4)
    assert Path("lists/mine/folds.yaml").read_text() == (own / "folds.yaml").read_text()
    (own / "folds.yaml").write_text("split0: [fish]\nsplit1: [tree]\n")
    prepare(own)
    assert source(0).fold.novel == (2,)
    (own / "folds.yaml").unlink()
    prepare(own, "--folds", "2")  # those of the earlier run
    with pytest.raises(UserError, match=r"--folds 3: lists/mine/folds\.yaml has 2"):
        prepare(own, "--folds", "3")


def test_the_folder_may_lie_where_the_data_go(own: Path) -> None:
    root = Path("data/mine")
    root.parent.mkdir()
    own.rename(root)
    before = files()
    prepare(root)
    assert {path for path in files() if path.startswith("data")} == set(before)
    assert source().records("val_list")


def test_a_rare_class_is_in_both_parts() -> None:
    seen = [check.Seen("", Record(f"i/{n}.jpg", "", 9, 9, pixels, ()), {}) for n, pixels in
            enumerate([{1: 300, 2: 9}] * 40 + [{2: 300}] * 4 + [{1: 300, 3: 300}] * 3)]  # fmt: skip
    parts = check.parted(seen, 200, {})
    in_val = [sum(s.part == "val" and s.record.pixels.get(c, 0) >= 200 for s in parts) for c in (1, 2, 3)]
    assert 4 <= in_val[0] <= 16 and in_val[1] == 2 and in_val[2] <= 1  # three are too few to share out
    assert check.parted(seen[::-1], 200, {})[::-1] == parts
    turned = {s.record.image: "val" if s.part == "train" else "train" for s in parts}
    assert {s.record.image: s.part for s in check.parted(seen, 200, turned)} == turned


@pytest.mark.parametrize(("alone", "said"), [(12, "sh train.sh split1 mine"), (0, "No fold can run yet")])
def test_what_comes_next_can_run(own: Path, capsys: pytest.CaptureFixture, alone: int, said: str) -> None:
    """Class 2 is never without class 1, so split0 has nothing to train on; if 1 is never alone, split1 neither."""
    shutil.rmtree(own)
    for part in ("images", "masks"):
        (own / part).mkdir(parents=True)
    (own / "classes.txt").write_text("crane\ntruck\n")
    for i in range(24):
        mask = np.zeros((120, 160), np.uint8)
        mask[10:80, 10:60], mask[10:80, 80:140] = 1, 2 * (i >= alone)
        Image.fromarray(np.full((120, 160, 3), 9 * i, np.uint8)).save(own / f"images/p{i:02}.jpg")
        Image.fromarray(mask).save(own / f"masks/p{i:02}.png")
    main(["mine", "--from", str(own), "--folds", "2"])
    printed = capsys.readouterr().out
    assert "split0 cannot run yet" in printed and said in printed.split("written to")[-1] and "train.sh split0" not in printed


def test_voc_layout(own: Path) -> None:
    voc = own.parent / "VOC"
    for folder in ("ImageSets/Segmentation", "Annotations"):
        (voc / folder).mkdir(parents=True)
    (own / "images").rename(voc / "JPEGImages")
    (voc / "SegmentationClass").mkdir()
    for i in range(32):
        png = Image.fromarray(label_of(i))
        png.putpalette([(37 * k + 90) % 256 for k in range(768)])
        png.save(voc / f"SegmentationClass/im{i:02}.png")
        (voc / f"Annotations/im{i:02}.xml").write_text("<annotation><object><name>thing</name></object></annotation>")
    for part, numbers in (("train", range(20)), ("val", range(20, 32))):
        (voc / f"ImageSets/Segmentation/{part}.txt").write_text("".join(f"im{i:02}\r\n" for i in numbers))
    main(["mine", "--voc", str(voc), "--classes", str(own / "classes.txt"), "--min-pixels", "200", "--folds", "2"])
    data = source(1)
    assert [r.image for r in data.records("val_list")] == [f"JPEGImages/im{i:02}.jpg" for i in range(20, 32)]
    assert data.fold.novel == (3, 4) and set(data.records("val_list")[0].pixels) == {1, 2}
    assert data.records("val_list")[0].annotated == (1, 2)  # the XML of another tool is not read


def test_masks_of_colours(own: Path) -> None:
    """RGB masks with CVAT's labelmap.txt, in classes.txt's order."""
    (own / "labelmap.txt").write_text("# label:color_rgb:parts:actions\n"
                                      + "".join(f"{name}:{r},{g},{b}::\n" for name, (r, g, b) in COLOURS.items()))
    table = np.full((256, 3), (224, 224, 192), np.uint8)
    table[:5] = [COLOURS[name] for name in ("background", *NAMES)]
    for i in range(32):
        Image.fromarray(table[label_of(i)]).save(own / f"masks/im{i:02}.png")
    prepare(own)
    before = files()
    prepare(own)
    assert files() == before
    assert all(np.array_equal(read_label(f"data/mine/converted/im{i:02}.png"), label_of(i)) for i in range(32))
    assert not Path("data/mine/masks").exists() and source(2).validation().data[0].cls == 3

    Image.new("RGB", (SIDE, SIDE), (5, 5, 5)).save(own / "masks/im07.png")
    with pytest.raises(UserError, match=r"im07\.png: 1 colours are not in labelmap\.txt, 5,5,5"):
        prepare(own)
    (own / "classes.txt").unlink()
    Image.fromarray(table[label_of(7)]).save(own / "masks/im07.png")
    prepare(own)
    assert read_class_names("lists/mine/classes.txt").names == tuple(COLOURS)[1:]


def instances(numbers: range, text: bool = False) -> dict:
    """The images as COCO: polygons, or run lengths as COCO's tools write them; category ids are odd."""
    rle = pytest.importorskip("pycocotools.mask")
    categories = [{"id": 99, "name": "unused"}] + [{"id": 100 - 10 * c, "name": name} for c, name in enumerate(NAMES)]
    annotations = []
    for i in numbers:
        label = label_of(i)
        for cls in {int(c) for c in np.unique(label)} - {0, 255}:
            rows, columns = np.nonzero(label == cls)
            x0, x1, y0, y1 = (int(v) for v in (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1))
            shape = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            if text:
                runs = rle.encode(np.asfortranarray((label == cls).astype(np.uint8)))
                shape = {"size": runs["size"], "counts": runs["counts"].decode()}
            annotations.append({"id": len(annotations), "image_id": i, "category_id": 110 - 10 * cls, "segmentation": shape})
    images = [{"id": i, "file_name": f"im{i:02}.jpg", "height": SIDE, "width": SIDE} for i in numbers]
    return {"images": images, "categories": categories, "annotations": annotations}


def coco(own: Path, *jsons: Path, more: tuple[str, ...] = ()) -> None:
    main(["mine", "--coco-images", str(own / "images"), "--annotations", *map(str, jsons), "--min-pixels", "200", *more])


@pytest.mark.parametrize("text", [False, True])
def test_coco_with_chosen_categories(own: Path, text: bool, capsys: pytest.CaptureFixture) -> None:
    file = own / "export.json"
    file.write_text(json.dumps(instances(range(32), text)))
    with pytest.raises(UserError, match=r"too few images .*unused \(0 and 0\)(.|\n)*Enough: house, tree, fish, star"):
        coco(own, file)
    assert not Path("lists").exists() and not Path("config").exists()
    classes = own / "chosen.txt"
    classes.write_text("star\ntree | tall tree\nfish\n")
    coco(own, file, more=("--classes", str(classes)))
    house = sum(set(np.unique(label_of(i))) <= {0, 4, 255} for i in range(32))
    shown = capsys.readouterr().out
    assert "2 categories not in" in shown and f"{house} images of" in shown, shown
    order = np.zeros(256, np.uint8)
    order[[1, 3, 2]] = 1, 2, 3
    pairs = [pair for part in ("train", "val") for pair in read_list(f"lists/mine/{part}.txt")]
    assert len(pairs) == 32 - house
    for image, label in pairs:
        expected = order[label_of(int(Path(image).stem[2:]))]
        assert np.array_equal(read_label(Path("data/mine") / label), expected), image
    before = files()
    coco(own, file)  # the classes of the earlier run
    assert files() == before and source(1).names.texts[1] == "tall tree" and source(1).validation().data[0].cls == 2


def test_coco_in_two_files(own: Path) -> None:
    files = own / "my_train.json", own / "my_val.json"
    (own / "classes.txt").write_text("\n".join(NAMES))
    for file, numbers in zip(files, (range(18), range(18, 32)), strict=True):
        file.write_text(json.dumps(instances(numbers)))
    coco(own, *files, more=("--classes", str(own / "classes.txt")))
    assert [image for image, _ in read_list("lists/mine/val.txt")] == [f"val/im{i}.jpg" for i in range(18, 32)]
    assert len(source().records("train_list")) == 18
    content = instances(range(18))
    content["categories"][0]["name"] = "other"
    files[0].write_text(json.dumps(content))
    with pytest.raises(UserError, match="have other categories"):
        coco(own, *files)
    files[0].write_text(json.dumps(instances(range(18)) | {"categories": [{"id": 1, "name": "a|b"}]}))
    with pytest.raises(UserError, match=r"category 1: 'a\|b' is no name"):
        coco(own, files[0])
    with pytest.raises(UserError, match="one file, or one with 'train'"):
        coco(own, files[1], files[1])


def test_real_coco(own: Path) -> None:
    folder = REPO.parent / "shared/data/coco128"
    if not folder.is_dir():
        pytest.skip(f"no cut of COCO at {folder}")
    (own / "few.txt").write_text("person\ncar\ncat\ndog\n")
    main(["mine", "--coco-images", str(folder), "--annotations", str(folder / "instances_train2017.json"),
          "--classes", str(own / "few.txt")])  # fmt: skip
    assert source(3).fold.novel == (4,) and 60 < len(source(3).records("train_list")) < 128


# ---- what is wrong


def cut_off(own: Path) -> None:
    path = own / "images/im05.jpg"
    path.write_bytes(path.read_bytes()[:900])


def turned(own: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    picture(label_of(5)).save(own / "images/im05.jpg", exif=exif)


def binary(own: Path) -> None:
    for path in (own / "masks").iterdir():
        Image.fromarray(np.where(read_label(path), 255, 0).astype(np.uint8)).save(path)


def jpeg_masks(own: Path) -> None:
    for path in (own / "masks").iterdir():
        path.rename(path.with_suffix(".jpg"))


def without_fish(own: Path) -> None:
    for i in range(4, 32):
        if 2 in label_of(i):
            (own / f"masks/im{i:02}.png").unlink()


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda own: (own / name).write_text(content)


def lists(content: str) -> Callable[[Path], object]:
    return lambda own: [(own / f"{part}.txt").write_text(content) for part in ("train", "val")]


def mask(values: np.ndarray | Image.Image) -> Callable[[Path], object]:
    return lambda own: (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(own / "masks/im05.png")


@pytest.mark.parametrize(("spoil", "says"), [
    (mask(np.zeros((9, 8), np.uint8)), [r"1 of 32", r"im05\.jpg is \(64, 64\), .*im05\.png is \(9, 8\)"]),
    (mask(np.full((SIDE, SIDE), 7, np.uint8)), [r"im05\.png: label values \[7\] are no class; expected 0\.\.4"]),
    (mask(Image.new("RGB", (SIDE, SIDE))), [r"im05\.png: .*not RGB; colours need a labelmap\.txt"]),
    (text("masks/im05.png", "no PNG"), [r"im05\.png: not a readable label"]),
    (cut_off, [r"im05\.jpg: not a readable image \(.*truncated"]),
    (turned, [r"im05\.jpg: its EXIF note"]),
    (binary, ["no mask shows any class"]),
    (jpeg_masks, [r"masks are PNGs .*im00\.jpg"]),
    (without_fish, [r"too few images .*fish \(", "Enough: star, tree, house"]),
    (lambda own: picture(label_of(5)).save(own / "images/im05.png"), [r"im05\.jpg and im05\.png have the same stem"]),
    (lambda own: (own / "images/im05.jpg").rename(own / "images/im 5.jpg"), [r"'im 5\.jpg' is no image name"]),
    (lambda own: (own / "masks").rename(own / "labels"), ["has no masks/. Needed are images/"]),
    (lambda own: (own / "classes.txt").unlink(), [r"has no classes\.txt"]),
    (lambda own: [(own / "masks").rename(own / "labels"), (own / "classes.txt").unlink()], [r"no masks/ and no classes\.txt"]),
    (text("classes.txt", "star\n"), ["1 class named; needed are 2"]),
    (text("classes.txt", "background\nstar\nfish\ntree\nhouse\n"), ["'background' among the classes"]),
    (text("classes.txt", "star\nfish\ntree\nhouse\nkey\n"), [r"too few images .*key \(0 and 0\)"]),
    (text("train.txt", "im01\n"), [r"val\.txt: not there"]),
    (lists("im01\nim02\n"), [r"val\.txt: im01 is in train\.txt too"]),
    (lists("im99\n"), [r"train\.txt: im99 is no image of"]),
    (text("folds.yaml", "split0: [star, wish]\n"), [r"folds\.yaml: split0 names 'wish', .*'fish'"]),
    (text("folds.yaml", "split0: [star]\nsplit1: [fish, star]\n"), ["'star' is in split0 and in split1"]),
    (text("folds.yaml", "split0: [star]\nsplit0: [fish]\n"), [r"'split0' is there twice"]),
    (text("folds.yaml", "split1: [star]\n"), ["numbered from 0"]),
    (text("folds.yaml", "split0: [star, on]\n"), ["list of class names, .*in quotes"]),
    (text("folds.yaml", "split0: [star, fish, tree, house]\n"), ["a fold needs base classes"]),
    (text("folds.yaml", "split0: [star"), ["is no valid YAML"]),
])  # fmt: skip
def test_what_is_wrong_is_named_and_nothing_written(own: Path, spoil: Callable, says: list[str]) -> None:
    spoil(own)
    with pytest.raises(UserError) as error:
        prepare(own)
    for message in says:
        assert re.search(message, str(error.value)), str(error.value)
    assert not files()


@pytest.mark.parametrize("name", ["pascal", "coco", "Demo", "pascal_mini", "protocol", "other", "../x", "a b", "-a", "", "é"])
def test_names(own: Path, name: str) -> None:
    Path("config/other").mkdir(parents=True)
    Path("config/other/base.yaml").write_text("Train: {data_set: pascal}\n")
    with pytest.raises((UserError, SystemExit)) as error:
        main([name, "--from", str(own)])
    assert isinstance(error.value, SystemExit) or "no name" in str(error.value) or "taken" in str(error.value)
    assert list(files()) == ["config/other/base.yaml"]


def test_a_name_is_not_given_twice(own: Path) -> None:
    prepare(own)
    before = files()
    for i in range(32):
        add(own.parent / "second", f"im{i:02}", label_of(i))
    (own.parent / "second/classes.txt").write_text("\n".join(NAMES))
    with pytest.raises(UserError, match="data/mine/images is there and is not .*second/images; delete it, or"):
        prepare(own.parent / "second")
    assert files() == before


def test_folds_of_a_config(own: Path) -> None:
    prepare(own)
    file = "config/mine/mine_split0_resnet50.yaml"
    assert fold_of(configure(file, "HDMNet", ["Data.folds="])) == fold_of(configure(file, "HDMNet"))  # beside the class names
    Path("names").mkdir()
    shutil.copy("lists/mine/classes.txt", "names")
    for override, says in {"Train.split=4": "has split0 to split3", "Data.folds=": "unknown data set 'mine'.*Data.folds",
                           "Train.data_set=pascal": "pascal has its own", "Data.folds=x.yaml": "x.yaml cannot be read"}.items():
        with pytest.raises(UserError, match=says):
            fold_of(configure(file, "HDMNet", [override, "Data.class_names=names/classes.txt"]))
    assert read_folds("lists/mine/folds.yaml", read_class_names("lists/mine/classes.txt")) == [(1,), (2,), (3,), (4,)]
