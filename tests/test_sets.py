"""util/prepare/sets: data sets to test on, from small folders of their layouts to lists, labels and episodes."""

import pickle
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pycocotools")

from tests.make import ROOT, layouts
from util.config import load_config
from util.data.index import read_list
from util.data.source import EpisodeSource
from util.data.transforms import read_label
from util.errors import UserError
from util.prepare.__main__ import SETS, prepare
from util.prepare.sets import FACTS

MASKS = {"fss": 20, "isic": 9, "lung": 8, "suim": 14, "deepglobe": 12, "isaid": 30, "lvis": 6, "pascal_part": 15, "paco_part": 6}


def run(name: str, *more: str, draw=None) -> str:
    """Prepare a drawn data set in the working folder; returns where its first list is."""
    (draw or layouts.DRAW[name])(Path("download"))
    prepare([name, "--from", "download", "--lists", f"lists/{name}", "--partial", *more])
    return {"lvis": "lists/lvis/1shot/split0", "paco_part": "lists/paco_part/split0"}.get(name, f"lists/{name}")


@pytest.mark.parametrize("name", FACTS)
def test_from_a_folder_to_episodes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert FACTS.keys() == SETS.keys() == layouts.DRAW.keys()
    monkeypatch.chdir(tmp_path)
    layouts.DRAW[name](Path("download"))
    before = {path: path.read_bytes() for path in Path("download").rglob("*") if path.is_file()}
    lists = run(name, draw=lambda _: None)
    pairs = read_list(f"{lists}/val.txt")
    assert len(pairs) == MASKS[name]
    assert ("a part" in Path(f"{lists}/folds.yaml").read_text()) == (name != "paco_part")  # of which 448 classes are all
    assert {path: path.read_bytes() for path in Path("download").rglob("*") if path.is_file()} == before
    for image, label in pairs:
        values = set(np.unique(read_label(Path("data", name, label))).tolist())
        assert values == {0, int(Path(label).parts[Path(label).parts.index("labels") + 1])}  # that of its folder
        assert Image.open(Path("data", name, image)).size == Image.open(Path("data", name, label)).size
    prepare([name, "--from", "download", "--lists", f"lists/{name}", "--partial"])
    labels = MASKS[name] + len(read_list(f"{lists}/train.txt") if name == "isaid" else ())
    assert f"0 labels written, {labels} were there" in capsys.readouterr().out
    # The rule sets of the table draw episodes over it.
    rules = {"fss": "hsnet", "lung": "insid3", "suim": "insid3", "lvis": "lvis92-1shot"}.get(name, "gfsam")
    config = load_config(ROOT / f"config/{name}/{name}_split0_resnet50.yaml", "HDMNet", [f"Test_Finetune.protocol={rules}"], None)
    source = EpisodeSource(config, tmp_path / "cache")
    (episodes,) = source.test_episodes().values()
    specs = [episodes.spec(i) for i in range(10)]
    assert all(spec.query != spec.supports[0] and spec.cls in source.fold.novel for spec in specs)
    published = {"fss": 2400, "lvis": 2300, "suim": MASKS["suim"], "isaid": 10, "pascal_part": 2500, "paco_part": 2500}
    if name == "isaid":
        assert len(source.training()) == 20  # the pairs of the two other folds
    assert len(episodes) == published.get(name, 600)
    if config.Train.draw == "cycle":
        assert [spec.cls for spec in specs[: len(source.fold.novel)]] == [*source.fold.novel][:10]


def test_which_classes_are_in_a_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LVIS: of the classes with more than K images, in the order of the file, every tenth; PACO-Part: every fourth of train's."""
    monkeypatch.chdir(tmp_path)
    run("lvis")
    enough = [(7 * i) % 23 for i in range(3, 23)]
    for fold in (0, 9):
        names = Path(f"lists/lvis/1shot/split{fold}/classes.txt").read_text().split("\n")
        assert names[:-1] == [f"class_{enough[fold + 10 * v]} | class {enough[fold + 10 * v]}" for v in range(2)]
    label = read_label(Path("data/lvis", read_list("lists/lvis/1shot/split0/val.txt")[0][1]))
    assert label[3, 3] == label[11, 11] == 1 and (label > 0).sum() < 2 * 49  # the union of two boxes
    with pytest.raises(UserError, match="of lvis there are 1shot, 5shot"):
        prepare(["lvis", "--from", "download", "--lists", "lists/lvis", "--partial", "--variant", "2shot"])
    shutil.rmtree("download")
    run("paco_part")
    assert Path("lists/paco_part/split1/classes.txt").read_text().splitlines() == ["class_3 | class 3", "class_15 | class 15"]
    crop, label = (Path("data/paco_part", name) for name in read_list("lists/paco_part/split1/val.txt")[0])
    assert Image.open(crop).size == (18, 19) and read_label(label)[2, 3] == 1  # x0 = 2, y0 = 3


def test_layouts_of_one_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("isic", "deepglobe"):
        run(name, draw=partial(getattr(layouts, name), flat=True))
        shutil.rmtree("download")
    assert Path("lists/isic/classes.txt").read_text().splitlines() == ["nevus", "melanoma", "seborrheic keratosis"]
    pairs = read_list("lists/deepglobe/val.txt")  # an image is there once for each of its classes
    assert len(pairs) == 12 and len({Path(image).name for image, _ in pairs}) == 7
    run("lung", "--variant", "566")
    assert len(read_list("lists/lung/val.txt")) == 5
    shutil.make_archive("lung", "zip", "download")
    shutil.rmtree("download")
    shutil.rmtree("data")
    prepare(["lung", "--from", "lung.zip", "--lists", "lists/lung", "--partial"])
    assert len(read_list("lists/lung/val.txt")) == 8 and Path("data/lung/source/CXR_png").is_dir()
    Path("broken.tar").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"broken\.tar: damaged, or no zip or tar"):
        prepare(["isic", "--from", "broken.tar", "--lists", "lists/isic", "--partial"])
    assert not Path("data/isic").is_dir() or not [*Path("data/isic").iterdir()]  # nothing half-written


def test_counts_name_the_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layouts.lung(Path("download"))
    with pytest.raises(UserError, match="download has 8 masks; 566 has 566 masks; 704 has 704 masks"):
        prepare(["lung", "--from", "download"])
    with pytest.raises(UserError, match="download has 5 masks; 566 has 566 masks\n"):
        prepare(["lung", "--from", "download", "--variant", "566"])
    assert not Path("lists").exists() and not Path("data").exists()
    monkeypatch.setitem(FACTS["lung"].variants, "small", {"masks": 8})
    prepare(["lung", "--from", "download"])
    assert Path("lists/lung/folds.yaml").read_text() == "# lung, variant small\nall\n"


def test_wrong_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(name: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            prepare([name, "--from", "download", "--lists", "lists/x", "--partial"])

    refuse("suim", "no such folder or archive")
    Path("download").mkdir()
    refuse("suim", "no folder in it has images and masks")
    refuse("fss", "no list of the 240 test classes")
    refuse("paco_part", "no paco_part_train.pkl")
    layouts.isaid(Path("download"))
    Path("download/splits/val/fold1.txt").write_text("P0001_0__3\n")
    refuse("isaid", r"fold1\.txt:1: expected TILE__CLASS with a class 6\.\.10")
    layouts.lvis(Path("download"))
    Path("download/lvis_val.pkl").write_bytes(pickle.dumps({1: {"val2017/1.jpg": {}}}))
    refuse("lvis", "no image and mask of 1shot/split0")
    Path("download/lvis_val.pkl").write_bytes(pickle.dumps(dict.fromkeys(range(20), ["val2017/1.jpg"] * 3)))
    refuse("lvis", r"lvis_val\.pkl: expected \{class id: ")
    Path("download/lvis_val.pkl").write_bytes(pickle.dumps(np.zeros(3)))
    refuse("lvis", r"lvis_val\.pkl: not a pickle of dicts.*numpy")
    layouts.lung(Path("download"))
    layouts.save(Path("download/CXR_png/CHNCXR_0.png"), 0)
    Image.new("L", (7, 9)).save("download/CXR_png/CHNCXR_1.png")
    refuse("lung", "CHNCXR_1")
