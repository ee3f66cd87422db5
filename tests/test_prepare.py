"""util/data/prepare: the official downloads, tiny ones made on the spot and the real bits at hand, to labels and lists."""

import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

savemat = pytest.importorskip("scipy.io").savemat
pytest.importorskip("pycocotools")

from util.data.folds import read_class_names  # noqa: E402
from util.data.index import read_list  # noqa: E402
from util.data.transforms import read_label  # noqa: E402
from util.prepare import archives, coco, common, pascal  # noqa: E402
from util.prepare.__main__ import main  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared/data"
SHAPE = 30, 40
TRAIN, VAL, SBD_TRAIN, SBD_VAL = ["2007_01", "2008_03"], ["2007_02", "2008_04"], ["2008_03", "2008_05", "2008_04"], ["2008_01"]
MAIN_TRAIN = ["2008_01", "2008_03", "2008_05", "2008_09"]
EXPECTED = ["2008_01", "2008_03", "2008_05", "2007_01"]  # SBD's without those outside MAIN_TRAIN, then the rest of VOC


def label_of(name: str, source: str) -> np.ndarray:
    """A label that tells which image and which source it came from."""
    label = np.zeros(SHAPE, np.uint8)
    label[: int(name[-1]) + 3, : 7 if source == "voc" else 20] = int(name[-1])
    label[-1, -1] = 255 if source == "voc" else 0
    return label


@pytest.fixture
def downloads(tmp_path) -> Path:
    """VOCdevkit and benchmark_RELEASE, unpacked, as the official archives hold them."""
    root = tmp_path / "downloads"
    voc, sbd = root / "VOCdevkit/VOC2012", root / "benchmark_RELEASE/dataset"
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    (sbd / "cls").mkdir(parents=True)
    sets = {"Segmentation/train": TRAIN, "Segmentation/val": VAL, "Main/train": MAIN_TRAIN}
    sets = {voc / f"ImageSets/{name}.txt": ids for name, ids in sets.items()}
    for path, ids in {**sets, sbd / "train.txt": SBD_TRAIN, sbd / "val.txt": SBD_VAL}.items():
        path.write_text("\r\n".join(ids) + "\r\n")  # as a Windows tool leaves it
    for name in {*TRAIN, *VAL, *SBD_TRAIN, *SBD_VAL, "2008_09"}:
        Image.new("RGB", SHAPE[::-1]).save(voc / f"JPEGImages/{name}.jpg")
        (voc / f"Annotations/{name}.xml").write_text("<annotation/>")
    for name in TRAIN + VAL:
        png = Image.fromarray(label_of(name, "voc"))
        png.putpalette([(37 * i + 90) % 256 for i in range(768)])
        png.save(voc / f"SegmentationClass/{name}.png")
    for name in SBD_TRAIN + SBD_VAL:
        cells = np.empty((20, 1), object)
        cells[:] = [[np.eye(3)]]
        content = {"Boundaries": cells, "Segmentation": label_of(name, "sbd"), "CategoriesPresent": [3]}
        savemat(sbd / f"cls/{name}.mat", {"GTcls": content}, do_compression=True)
    return root


@pytest.fixture
def whole(monkeypatch):
    """Let the tiny data set be the whole one."""
    monkeypatch.setattr(pascal, "KNOWN", {"train": 4, "val": 2})
    monkeypatch.setattr(pascal, "TRAIN_NOVAL_MD5", pascal._md5(["2008_01", "2008_03", "2008_05"]))


def pack(root: Path) -> tuple[Path, Path]:
    voc, sbd = root / "voc.tar", root / "sbd.tgz"
    for path, mode, top in ((voc, "w", "VOCdevkit"), (sbd, "w:gz", "benchmark_RELEASE")):
        with tarfile.open(path, mode) as tar:
            tar.add(root / top, top)
    return voc, sbd


def run_pascal(tmp_path, voc, sbd, *more) -> int:
    to = ["--out", str(tmp_path / "out"), "--lists", str(tmp_path / "lists")]
    return main(["pascal", "--voc", str(voc), "--sbd", str(sbd), *to, *more])


def fails(capsys, code: int, *says: str) -> None:
    message = capsys.readouterr().err
    assert code == 2 and message.startswith("error: ")
    for text in says:
        assert re.search(text, message), message


def files(folder: Path) -> set[str]:
    return {str(Path(top, name).relative_to(folder)) for top, _, names in os.walk(folder, followlinks=True) for name in names}


# ---- PASCAL


def check_pascal(tmp_path) -> None:
    train, val = read_list(tmp_path / "lists/train.txt"), read_list(tmp_path / "lists/val.txt")
    assert [label for _, label in train] == [f"SegmentationClassAug/{name}.png" for name in EXPECTED]
    assert [image for image, _ in val] == [f"JPEGImages/{name}.jpg" for name in VAL]
    for image, label in train + val:
        name = Path(label).stem
        expected = label_of(name, "voc" if name in TRAIN + VAL else "sbd")
        assert np.array_equal(read_label(tmp_path / "out" / label), expected), name
        assert np.array_equal(cv2.imread(str(tmp_path / "out" / label), 0), expected), name  # no palette to trip over
        assert (tmp_path / "out" / image).is_file() and (tmp_path / f"out/Annotations/{name}.xml").is_file()
    assert len(list((tmp_path / "out/SegmentationClassAug").iterdir())) == 6


def test_archives_end_to_end(tmp_path, downloads, whole, monkeypatch):
    monkeypatch.setattr(common, "SERIAL_BELOW", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    voc, sbd = pack(downloads)
    assert run_pascal(tmp_path, voc, sbd) == 0
    check_pascal(tmp_path)
    assert "JPEGImages/2008_09.jpg" not in files(tmp_path / "out")  # nobody needs it

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    lost = [tmp_path / "out" / name for name in ("SegmentationClassAug/2008_05.png", "JPEGImages/2007_01.jpg")]
    for path in lost:
        path.unlink()
    lost.append(tmp_path / "out/Annotations/2008_01.xml")
    lost[-1].write_text("<annot")  # not the size of the archive's
    assert run_pascal(tmp_path, voc, sbd) == 0
    check_pascal(tmp_path)
    assert {path for path, time in before.items() if path.stat().st_mtime_ns != time} == set(lost)
    assert lost[-1].read_text() == "<annotation/>"


def test_folders_are_linked_and_left_alone(tmp_path, downloads, whole):
    before = files(downloads)
    assert run_pascal(tmp_path, downloads, downloads) == 0
    check_pascal(tmp_path)
    assert files(downloads) == before and (tmp_path / "out/JPEGImages").is_symlink()


def test_in_place_and_ready_made_labels(tmp_path, downloads, capsys):
    voc = downloads / "VOCdevkit/VOC2012"
    (voc / "SegmentationClass").rename(voc / "SegmentationClassAug")
    lists = ["--lists", str(tmp_path / "lists")]
    given = ["pascal", "--voc", str(voc), "--out", str(voc)]
    fails(capsys, main([*given, *lists]), r"5,623 ids.*no --sbd", r"train: the image sets name 2 of 5,953")
    fails(capsys, main([*given, "--partial"]), "--partial needs --lists")
    assert not (tmp_path / "lists").exists()
    assert main([*given, *lists, "--partial"]) == 0
    assert [Path(image).stem for image, _ in read_list(tmp_path / "lists/train.txt")] == TRAIN
    assert "of 5,953 images" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path, downloads, whole, capsys):
    voc, sbd = downloads / "VOCdevkit/VOC2012", downloads / "benchmark_RELEASE/dataset"
    (sbd / "cls/2008_05.mat").unlink()
    (voc / "JPEGImages/2007_02.jpg").unlink()
    fails(capsys, run_pascal(tmp_path, downloads, downloads), r"1 images in .*JPEGImages: 2007_02\n", r"1 labels.*cls: 2008_05\n")
    assert not (tmp_path / "out").exists() and not (tmp_path / "lists").exists()
    assert run_pascal(tmp_path, downloads, downloads, "--partial") == 0
    assert [Path(i).stem for i, _ in read_list(tmp_path / "lists/train.txt")] == ["2008_01", "2008_03", "2007_01"]
    assert [Path(i).stem for i, _ in read_list(tmp_path / "lists/val.txt")] == ["2008_04"]


SETS, SBD = "VOCdevkit/VOC2012/ImageSets", "benchmark_RELEASE/dataset"


def spoil(path: str, text: str):
    return lambda root: (root / path).write_text(text)


def strange_class(root):
    savemat(root / SBD / "cls/2008_05.mat", {"GTcls": {"Segmentation": np.full(SHAPE, 21, np.uint8)}})


@pytest.mark.parametrize(("harm", "says"), [
    (spoil(f"{SETS}/Segmentation/train.txt", "2007_01\n2007_01\n"), r"train\.txt:2: 2007_01 is already on line 1"),
    (spoil(f"{SETS}/Segmentation/val.txt", "2007_02\nJPEGImages\\2008_04\n"), r"val\.txt:2: .*is no image name"),
    (lambda root: (root / SBD / "val.txt").write_bytes("2008_01\n".encode("utf-16")), r"dataset/val\.txt: not UTF-8 text"),
    (spoil(f"{SBD}/train.txt", "2008 03\n"), r"dataset/train\.txt:1: '2008 03' is no image name"),
    (spoil(f"{SBD}/train_noval.txt", "2008_03\n2008_04\n"), r"1 images are in training and in VOC 2012 val \(2008_04\)"),
    (spoil(f"{SBD}/train_noval.txt", "2008_03\n"), r"found 1 others; put the published train_noval\.txt"),
    (spoil(f"{SBD}/cls/2008_05.mat", "MATLAB"), r"2008_05\.mat: not a readable SBD mask"),
    (strange_class, r"2008_05\.mat: label values \[21\] are no class"),
    (lambda root: shutil.copy(root / SBD / "cls/2008_05.mat", root / "VOCdevkit/VOC2012/SegmentationClass/2007_02.png"),
     r"2007_02\.png: not a readable label"),
    (lambda root: (root / SBD / "val.txt").unlink(), r"dataset/val\.txt: not there"),
    (lambda root: shutil.rmtree(root / SBD / "cls"), r"no folder cls in it"),
])
def test_wrong_input(tmp_path, downloads, whole, capsys, harm, says):
    harm(downloads)
    fails(capsys, run_pascal(tmp_path, downloads, downloads), says)
    assert not (tmp_path / "lists").exists()
    assert all(re.fullmatch(r"\d{4}_\d\d\.(png|jpg|xml)|(train|val)\.txt", Path(f).name) for f in files(tmp_path / "out"))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_truncated_archive(tmp_path, downloads, whole, capsys, which, part):
    given = pack(downloads)
    content = given[which].read_bytes()
    given[which].write_bytes(content[: int(len(content) * part)])
    fails(capsys, run_pascal(tmp_path, *given), r"(voc\.tar|sbd\.tgz): damaged, truncated.*download it again")
    assert not (tmp_path / "lists").exists()
    for name in files(tmp_path / "out"):  # whole files only
        assert Path(name).name.startswith(("2", "train", "val")) and (tmp_path / "out" / name).stat().st_size > 0
    given[which].write_bytes(content)
    assert run_pascal(tmp_path, *given) == 0
    check_pascal(tmp_path)


def test_official_name_wrong_content(tmp_path, downloads, capsys):
    voc, sbd = pack(downloads)
    official = voc.rename(voc.with_name("VOCtrainval_11-May-2012.tar"))
    assert official.name in archives.MD5
    fails(capsys, run_pascal(tmp_path, official, sbd), r"May-2012\.tar: [\d,]+ bytes with MD5 \w{32}.*truncated download")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["VOCdevkit/../../JPEGImages/2007_01.jpg", "/tmp/JPEGImages/2007_01.jpg", "link"])
def test_archive_that_leads_out(tmp_path, downloads, capsys, name):
    voc, sbd = pack(downloads)
    with tarfile.open(voc, "a") as tar:
        member = tarfile.TarInfo("VOCdevkit/VOC2012/SegmentationClass/2007_01.png" if name == "link" else name)
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(member)
    fails(capsys, run_pascal(tmp_path, voc, sbd), r"voc\.tar: .*this is not the official file")
    assert {path.name for path in tmp_path.iterdir()} == {"downloads", "out"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_nothing_is_unpacked_through_a_link(tmp_path, downloads, whole, capsys):
    assert run_pascal(tmp_path, downloads, downloads) == 0  # out/JPEGImages is now a link to the download
    given = pack(downloads)
    (downloads / "VOCdevkit/VOC2012/JPEGImages/2007_01.jpg").unlink()
    fails(capsys, run_pascal(tmp_path, *given), "is a link to .*nothing is unpacked there")


def test_published_lists_follow_from_the_rule(tmp_path):
    lists = SHARED / "lists/pascal"
    if not lists.is_dir():
        pytest.skip(f"no published image sets at {lists}")
    read = {path.stem: common.read_ids(path) for path in lists.iterdir()}
    assert pascal._md5(read["sbd_train_noval"]) == pascal.TRAIN_NOVAL_MD5
    made = pascal.make_sets(read["sbd_train_noval"], read["voc2012_train"], read["voc2012_val"])
    assert made["train"] == read["pfenet_train"] and {name: len(ids) for name, ids in made.items()} == pascal.KNOWN
    for name, ids in made.items():
        common.write_list(tmp_path / "list.txt", pascal.pairs(ids))
        assert (tmp_path / "list.txt").read_bytes() == (REPO / f"lists/pascal/{name}.txt").read_bytes()


def test_the_small_cut_of_voc(tmp_path, voc_mini):
    assert main(["pascal", "--voc", str(voc_mini), "--out", str(tmp_path / "out"), "--lists", str(tmp_path), "--partial"]) == 0
    for name in ("train", "val"):
        assert (tmp_path / f"{name}.txt").read_bytes() == (REPO / f"lists/pascal_mini/{name}.txt").read_bytes()


# ---- COCO


NAMES = read_class_names(REPO / "lists/coco/classes.txt").names
GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids that COCO 2014 does not use
IDS = [i for i in range(1, 91) if i not in GAPS]


def box(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def instances() -> dict:
    """Three images 10 x 12 (the last without an object): a crowd listed late, objects over others."""
    def entry(n, image, category, shape, crowd=0):
        return {"id": n, "image_id": image, "category_id": category, "iscrowd": crowd, "segmentation": shape}

    everywhere = {"size": [10, 12], "counts": [0, 60, 60]}  # column-major: the left six columns
    return {
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:02}.jpg", "height": 10, "width": 12} for i in (7, 5, 9)],
        "categories": [{"id": i, "name": name} for i, name in reversed(list(zip(IDS, NAMES, strict=True)))],
        "annotations": [entry(1, 7, 13, box(4, 2, 8, 6)), entry(2, 7, 90, box(6, 4, 12, 8)),
                        entry(3, 5, 90, box(0, 0, 2, 2) + box(9, 9, 12, 10)), entry(4, 7, 1, everywhere, crowd=1),
                        entry(5, 7, 90, box(10, 6, 12, 8))],
    }


@pytest.fixture
def run_coco(tmp_path):
    def run(content=None, *more, name="instances_val2014.json", keep=None) -> int:
        (tmp_path / "images/val2014").mkdir(parents=True, exist_ok=True)
        for i in keep or (5, 7, 9):
            Image.new("RGB", (12, 10)).save(tmp_path / f"images/val2014/COCO_val2014_{i:02}.jpg")
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content or instances()))
        return main(["coco", "--images", str(tmp_path / "images"), "--annotations", str(path), "--out", str(tmp_path / "out"),
                     "--lists", str(tmp_path / "lists"), *more])

    return run


def test_coco_end_to_end(tmp_path, run_coco, capsys, monkeypatch):
    fails(capsys, run_coco(), r"instances_val2014\.json: 2 images with an object, val2014 has 40,137")
    monkeypatch.setattr(coco, "KNOWN", {"val2014": 2})
    assert run_coco() == 0
    said = capsys.readouterr().out
    pairs = read_list(tmp_path / "lists/val.txt")
    assert pairs == [(f"val2014/COCO_val2014_0{i}.jpg", f"annotations/val2014/COCO_val2014_0{i}.png") for i in (5, 7)]
    expected = np.zeros((10, 12), np.uint8)
    expected[:, :6] = 1  # the crowd, beneath
    expected[2:6, 4:8] = 12  # category 13 is the 12th: 12 is a gap
    expected[4:8, 6:12] = 80  # later in the file
    assert np.array_equal(read_label(tmp_path / "out" / pairs[1][1]), expected)
    other = read_label(tmp_path / "out" / pairs[0][1])
    assert (other == 80).sum() == 7 and (other > 0).sum() == 7  # both polygons of one object
    assert "12 pixels claimed by several classes" in said and "52 pixels" in said  # 8 over the crowd, 4 over class 12
    assert all((tmp_path / "out" / image).is_file() for image, _ in pairs) and not (tmp_path / "lists/train.txt").exists()

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/annotations").rglob("*.png")}
    lost = tmp_path / "out" / pairs[0][1]
    lost.unlink()
    assert run_coco() == 0 and "1 labels written, 1 were there" in capsys.readouterr().out
    assert {path for path, time in times.items() if path.stat().st_mtime_ns != time} == {lost}

    (tmp_path / "images/val2014/COCO_val2014_05.jpg").unlink()
    fails(capsys, run_coco(None, keep=[7]), r"1 images of instances_val2014.json in .*val2014: COCO_val2014_05.jpg")
    assert run_coco(None, "--partial", keep=[7]) == 0 and len(read_list(tmp_path / "lists/val.txt")) == 1


def changed(*where, value):
    content = instances()
    inner = content
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    return content


@pytest.mark.parametrize(("content", "says"), [
    (json.dumps(instances(), indent=0)[:400], r"val2014\.json:\d+: not JSON.*truncated"),
    ("[1, 2]", "no COCO annotation file: expected the lists images, annotations, categories"),
    (changed("annotations", 0, value={"id": 1}), "lacks or mistypes a field .*'image_id'"),
    (changed("categories", 0, "id", value=91), r"category ids \[91\]; those of COCO lie in 1\.\.90"),
    (changed("categories", 0, "name", value="teeth"), r"they differ in: \['teeth', 'toothbrush'\]"),
    (changed("annotations", 1, "category_id", value=12), "annotation 2: unknown category 12"),
    (changed("annotations", 1, "image_id", value=8), "annotation 2: no image 8"),
    (changed("annotations", 1, "segmentation", value=[[1, 2, "x", 4, 5, 6]]), "annotation 2: its segmentation is neither"),
    (changed("annotations", 3, "segmentation", "counts", value=[0, 60, 61]), "annotation 4: run lengths that do not fill"),
    (changed("images", 1, "file_name", value="COCO_val2014_07.jpg"), r"image 5: .* is there twice \(image 7\)"),
    (changed("images", 1, "file_name", value="val2014\\a.jpg"), "image 5: .*is no image name"),
    (changed("images", 1, "file_name", value="../a b.jpg"), "image 5: .*is no image name"),
    (changed("images", 1, "file_name", value="COCO_train2014_05.jpg"), "image 5: .*is a train image"),
])
def test_wrong_annotations(tmp_path, run_coco, capsys, monkeypatch, content, says):
    monkeypatch.setattr(coco, "KNOWN", {})
    fails(capsys, run_coco(content), says)
    assert not (tmp_path / "lists").exists()
    labels = {f for f in files(tmp_path / "out") if not f.endswith(".jpg")}
    assert labels <= {"annotations/val2014/COCO_val2014_05.png"}  # the image before the bad one


def test_foreign_label_in_the_way(tmp_path, run_coco, capsys, monkeypatch):
    monkeypatch.setattr(coco, "KNOWN", {})
    assert run_coco() == 0
    label = tmp_path / "out/annotations/val2014/COCO_val2014_05.png"
    Image.fromarray(np.full((10, 12), 90, np.uint8)).save(label)  # uncompacted ids: the published mistake
    fails(capsys, run_coco(), r"05\.png: label values \[90\] are no class; expected 0\.\.80")
    Image.new("L", (5, 5)).save(label)
    fails(capsys, run_coco(), r"05\.png is \(5, 5\).*delete it")
    fails(capsys, run_coco(name="instances.json"), "its split, e.g. instances_train2014.json; rename it")


def test_real_coco(tmp_path, monkeypatch):
    source = SHARED / "coco128"
    if not source.is_dir():
        pytest.skip(f"no cut of COCO at {source}")
    path = source / "instances_train2017.json"
    to = ["--out", str(tmp_path), "--lists", str(tmp_path)]
    assert main(["coco", "--images", str(source), "--annotations", str(path), *to]) == 0
    pairs = read_list(tmp_path / "train.txt")
    assert len(pairs) == 126
    content = json.loads(path.read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    same = total = 0
    for image in content["images"]:
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        if not mine:
            assert not (tmp_path / f"annotations/train2017/{image['id']:012}.png").exists()
            continue
        drawn = np.zeros((image["height"], image["width"]), np.uint8)  # another rasteriser, classes by name
        for a in sorted(mine, key=lambda a: -a["iscrowd"]):
            cls = NAMES.index(names[a["category_id"]]) + 1
            if a["iscrowd"]:
                runs = a["segmentation"]["counts"]
                drawn[np.repeat(np.arange(len(runs)) % 2, runs).reshape(drawn.shape[::-1]).T == 1] = cls
            for polygon in [] if a["iscrowd"] else a["segmentation"]:
                cv2.fillPoly(drawn, [np.round(np.reshape(polygon, (-1, 2)) - 0.5).astype(np.int32)], cls)
        label = read_label(tmp_path / f"annotations/train2017/{image['id']:012}.png")
        same += (label == drawn).sum()
        total += label.size
        assert set(np.unique(label)) <= set(np.unique(drawn)) and (label == drawn).mean() > 0.95, image["file_name"]
    assert same / total > 0.99
