"""COCO JSON of one's own, as annotation tools write it: what does not become a mask is said, what contradicts itself refused."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.data.folds import read_class_names, read_folds
from util.data.index import read_list
from util.data.transforms import read_label
from util.errors import UserError
from util.prepare.custom import sources
from util.prepare.custom.__main__ import main

coco, custom_coco = (pytest.importorskip(f"util.prepare.{name}") for name in ("coco", "custom.coco"))
HEIGHT, WIDTH = 60, 80
SHAPE = [[10, 8, 55, 8, 55, 48, 10, 48]]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(
    folder: str = "i", file: str = "a.json", first: int = 0, count: int = 16, change: Callable = lambda content: None
) -> None:
    """Images and their JSON: one object each, of two classes by turns."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    content: dict = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "crane"}, {"id": 2, "name": "truck"}]}
    for k in range(first, first + count):
        Image.new("RGB", (WIDTH, HEIGHT), (5 * k, 90, 20)).save(f"{folder}/p{k}.jpg")
        content["images"].append({"id": k, "file_name": f"p{k}.jpg", "height": HEIGHT, "width": WIDTH})
        content["annotations"].append({"id": k, "image_id": k, "category_id": 1 + k % 2, "bbox": [10, 8, 45, 40], "iscrowd": 0,
                                       "segmentation": SHAPE})
    change(content)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(content))


def run(*files: str, images: str = "i") -> None:
    main(["own", "--coco-images", images, "--annotations", *(files or ("a.json",)), "--min-pixels", "200"])


def every(step: int, **fields: object) -> Callable:
    """Changes each `step`-th annotation."""
    return lambda content: [annotation.update(fields) for annotation in content["annotations"][::step]]


def without(content: dict) -> None:
    for annotation in content["annotations"][::4]:
        del annotation["segmentation"]


def buried(content: dict) -> None:
    small = {"category_id": 2, "segmentation": [[20, 20, 40, 20, 40, 40, 20, 40]]}
    content["annotations"][:0] = [a | small | {"id": 900 + a["id"]} for a in content["annotations"] if a["category_id"] == 1]


@pytest.mark.parametrize(("change", "says"), [
    *((every(4, segmentation=nothing), r"4 annotations of a\.json with a box but no outline.*: 0 \(p0\.jpg\), ")
      for nothing in ([], None, {}, [[]])),
    (without, "4 annotations of .* no outline"),
    (every(4, segmentation=[[10, 10, 50, 50]]), "4 annotations of .* fewer than three points"),
    (every(4, segmentation=[*SHAPE, [60, 10, 70, 50]]), "4 annotations of .* fewer than three points"),
    (every(4, segmentation=[[WIDTH, 10, WIDTH + 3, 10, WIDTH + 3, 30]]), "4 annotations of .* outside their image"),
    (every(4, segmentation=[[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]]), "4 annotations of .* too small for a pixel"),
    (every(4, segmentation={"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}), "4 annotations of .* too small for a pixel"),
    (buried, r"3,200 pixels of a\.json are claimed by several(.|\n)*8 annotations of .* covered by later ones: 900 \(p0\.jpg\)"),
])  # fmt: skip
def test_what_is_lost_is_counted(own: Path, change: Callable, says: str, capsys: pytest.CaptureFixture) -> None:
    export(change=change)
    run()
    assert re.search(says, shown := capsys.readouterr().out), shown
    kept = [image for part in ("train", "val") for image, _ in read_list(f"lists/own/{part}.txt")]
    assert len(kept) == (12 if "images of a.json on which" in shown else 16)


def test_an_object_under_another_of_its_class_is_not_lost(own: Path, capsys: pytest.CaptureFixture) -> None:
    export(change=lambda content: content["annotations"].extend([a | {"id": 900 + a["id"]} for a in content["annotations"]]))
    run()
    assert "annotations" not in capsys.readouterr().out


def grown(content: dict) -> None:
    every(1, segmentation=[[10, 8, 2 * WIDTH, 8, 2 * WIDTH, 100]])(content)


def sideways(content: dict) -> None:
    """Photos of a phone: sizes as stored, outlines as shown."""
    exif = Image.Exif()
    exif[sources.ORIENTATION] = 6
    for image in content["images"]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(f"i/{image['file_name']}", exif=exif)
    every(1, segmentation=[[8, 20, 50, 20, 50, 75, 8, 75]])(content)


def claimed(side: object) -> Callable:
    return lambda content: content["images"][3].update(height=side, width=side)


@pytest.mark.parametrize(("change", "says"), [
    (every(1, segmentation=[]), r"boxes alone are no masks\n16 annotations of a\.json with a box but no outline"),
    (grown, r"16 of 16 .*\n.*annotation 0: its outline.*reaches beyond the 80 x 60 pixels(.|\n)*6 more"),
    (sideways, "annotation 0: its outline.*EXIF"),
    (claimed(2**15 - 1), r"p3\.jpg is \(60, 80\), a\.json is \(32767, 32767\)"), (claimed(True), "height True, width True"),
    (lambda content: content["images"][1].update(id=True), "images whose id is true"),
    (lambda content: content["annotations"][1].update(image_id=True), "annotations whose image_id is true"),
    (lambda content: content["annotations"][1].update(category_id=True), "annotations whose category_id is true"),
    (every(1, segmentation=[[True, 8, 55, 8, 55, 48]]), "annotation 0: .*neither polygons"),
    (every(1, segmentation={"size": [HEIGHT, WIDTH], "counts": [True, HEIGHT * WIDTH - 1]}), "annotation 0: run lengths"),
    (lambda content: content["categories"][0].update(name="a|b"), "category 1: 'a|b' is no name"),
    (lambda content: content["categories"][0].update(name=" \n"), "is no name"),
    (lambda content: content["categories"][0].update(name="\ud800"), "is no name"),
    (lambda content: content["categories"][0].update(name="truck "), "several categories are called truck"),
])  # fmt: skip
def test_what_contradicts_itself(own: Path, change: Callable, says: str) -> None:
    export(change=change)
    with pytest.raises(UserError, match=says) as error:
        run()
    assert "classes.txt" not in str(error.value) and not Path("lists").exists()


def test_claimed_sizes_take_no_memory(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(change=claimed(2**15 - 1))
    images, _ = coco.read_annotations(Path("a.json"), "", lambda path, entries: {1: 1, 2: 2})
    image = next(image for image in images if image.name == "p3.jpg")
    for module in (coco, custom_coco):
        monkeypatch.setattr(module, "paint", lambda *_: pytest.fail("painted"))
    with pytest.raises(UserError, match=r"p3\.jpg is \(60, 80\)"):
        coco.make_label(Path("a.json"), Path("i"), Path("out"), image)
    assert "p3.jpg is (60, 80)" in custom_coco._make(Path("a.json"), Path("i"), Path("out"), image)


@pytest.mark.parametrize("counts", [
    "o" * 4_000_000, "0" * 4_000_000, "PPYo0" + "o" * 10, "é1", "~~~~", "PPYoooooo0", "1o"
], ids=range(7))  # fmt: skip
def test_run_lengths_without_end(counts: str) -> None:
    """A run that goes on for ever would be a number of millions of digits, each character slower than the one before."""
    annotation = coco.Annotation(7, 1, False, {"size": [10, 12], "counts": counts})
    begin = time.process_time()
    with pytest.raises(UserError, match="annotation 7: run lengths that do not fill"):
        coco.rasterise(Path("a.json"), annotation, 10, 12)
    assert time.process_time() - begin < 1


def test_run_lengths_as_written(own: Path) -> None:
    """Also of many runs: a checkerboard, and one whose first pixel is set."""
    board = np.indices((30, 41)).sum(0) % 2
    for mask in (board, 1 - board, np.ones_like(board), np.zeros_like(board)):
        code = coco.rle.encode(np.asfortranarray(mask.astype(np.uint8)))
        shape = {"size": code["size"], "counts": code["counts"].decode()}
        assert np.array_equal(coco.rasterise(Path("a.json"), coco.Annotation(7, 1, False, shape), 30, 41)[0], mask)


@pytest.mark.parametrize("name", [
    "crane ", " crane", "fire\nhydrant", "fire\u2028hydrant", "\ufeffcrane", "no", "a\x0bb", "7: x"
])  # fmt: skip
def test_names_are_written_as_they_are_read(own: Path, name: str) -> None:
    export(change=lambda content: content["categories"][0].update(name=name))
    for _ in range(2):
        run()
        names = read_class_names("lists/own/classes.txt")
        assert names.names[1] == "truck" and names.names[0] == " ".join(name.replace("\ufeff", "").split())
        assert read_folds("lists/own/folds.yaml", names) == [(1,), (2,)]


@pytest.mark.parametrize("root", ["crane", "cranes-and-trucks"])
def test_a_category_that_only_groups_is_no_class(own: Path, root: str, capsys: pytest.CaptureFixture) -> None:
    categories = [{"id": 0, "name": root, "supercategory": "none"}, {"id": 1, "name": "crane", "supercategory": root},
                  {"id": 2, "name": "truck", "supercategory": root}]
    export(change=lambda content: content.update(categories=categories))
    run()
    assert f"no classes: {root}\n" in capsys.readouterr().out
    assert read_class_names("lists/own/classes.txt").names == ("crane", "truck")
    assert set(np.unique(read_label("data/own/converted/p0.png"))) == {0, 1}
    export(change=lambda content: content.update(categories=[c | {"supercategory": c["name"]} for c in categories[1:]]))
    run()  # its own supercategory, as `person` of COCO


@pytest.mark.parametrize(("folders", "files"), [
    (("d/train", "d/valid"), ("train.json", "valid.json")), (("d/train2017", "d/val2017"), ("train.json", "val.json")),
    (("d/train", "d/valid"), ("d/train/_annotations.coco.json", "d/valid/_annotations.coco.json")),
    (("d", "d"), ("train.json", "val.json")),
])  # fmt: skip
def test_folders_of_the_parts(own: Path, folders: tuple[str, str], files: tuple[str, str]) -> None:
    for folder, file, first in zip(folders, files, (0, 50), strict=True):
        export(folder, file, first, 12)
    run(*files, images="d")
    assert [len(read_list(f"lists/own/{part}.txt")) for part in ("train", "val")] == [12, 12]
