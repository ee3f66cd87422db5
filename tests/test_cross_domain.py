"""Weights of one data set tested on another: what comes from where, and that no tested class was learnt."""

import contextlib
import json
from pathlib import Path

import pytest

import test as tester
from model import configure, open_system
from tests.make import ROOT, layouts, make
from tests.make.runs import run_program
from util.data.folds import check_disjoint, fold_of, read_class_names
from util.errors import UserError
from util.prepare.__main__ import prepare

SUIM = ROOT / "config/suim/suim_split0_resnet50.yaml"
HOME = "Test_Finetune.trained_on=demo/split0/resnet50"


@pytest.fixture
def suim(tmp_path: Path) -> list[str]:
    """A drawn SUIM; the keys that name it."""
    with contextlib.chdir(tmp_path):
        layouts.suim(Path("download"))
        prepare(["suim", "--from", "download", "--lists", "lists", "--partial"])
    return [f"Data.data_root={tmp_path}/data/suim", f"Data.val_list={tmp_path}/lists/val.txt",
            f"Data.class_names={tmp_path}/lists/classes.txt", f"Data.folds={tmp_path}/lists/folds.yaml"]  # fmt: skip


def test_demo_weights_under_water(suim, tmp_path, monkeypatch, capsys) -> None:
    """HDMNet has what a fold decides: a base learner, and scores of its base classes."""
    monkeypatch.chdir(ROOT)
    make(tmp_path, "HDMNet")
    trained = ["Train.filter_novel=true", "Train.selection=novel", "Train.val_size=65"]
    given = ["--config", SUIM, "--arch", "HDMNet", "--gpus", 0, *suim, f"Runtime.output={tmp_path}/exp", *trained,
             "Test_Finetune.protocol=insid3", "Train.workers=0", "Runtime.threads=1", HOME]  # fmt: skip
    code, printed = run_program(tester.main, monkeypatch, capsys, *given)
    assert code == 0, printed
    folder = tmp_path / "exp/suim/HDMNet/split0/demo_split0_resnet50/result"
    result = json.loads((folder / "report.json").read_text())
    assert result["checkpoint"] == str(tmp_path / "exp/demo/HDMNet/split0/resnet50/snapshot/best.safetensors")
    assert result["protocol"]["weights trained on"] == "demo/split0/resnet50"
    assert set(result["classes"].values()) == {"fish", "diver", "plants", "reef", "robot", "sea floor", "wreck"}
    assert len(result["episodes"]["rows"]) == 14  # every mask that is not empty, once
    assert "base_miou" not in result["seeds"][0] and len(result["protocol_parts"]) == 6
    wrong = run_program(tester.main, monkeypatch, capsys, *given[:-1], "Test_Finetune.trained_on=demo/split1/resnet50")
    assert wrong[0] == 2 and "demo split1 learnt 1 of the 7 classes they would be tested on: fish" in wrong[1]


def test_network_of_one_data_of_the_other(suim) -> None:
    found = configure(SUIM, "HSNet", [*suim, HOME])
    assert (found.Train.data_set, found.Method.width, found.Train.val_size) == ("suim", 16, 129) and found.Data.min_pixels == 1
    assert configure(SUIM, "HSNet", [*suim, HOME, "Train.val_size=97"]).Train.val_size == 97
    for home, message in (("demo/split0", "DATASET/EXP/NET"), ("demo/split7/resnet50", "no config file")):
        with pytest.raises(UserError, match=message):
            configure(SUIM, "HSNet", [*suim, f"Test_Finetune.trained_on={home}"])
    with pytest.raises(UserError, match=r"base\+target: the base classes are of another data set"):
        open_system("PI_CLIP", configure(SUIM, "PI_CLIP", [*suim, HOME, "CLIP.vocabulary=base+target"]))


def test_no_class_is_tested_that_was_learnt() -> None:
    """COCO to PASCAL: only the data set coco2pascal has the classes that COCO's fold holds out."""
    named = {name: configure(ROOT / f"config/{name}_split{f}_resnet50.yaml", "HSNet")
             for f in range(4) for name in ("coco/coco", "pascal/pascal", "coco2pascal/coco2pascal")}  # the last fold, 3
    folds = {name: fold_of(config) for name, config in named.items()}
    names = {name: read_class_names(ROOT / config.Data.class_names) for name, config in named.items()}
    of = lambda name: (folds[name], names[name])  # noqa: E731
    check_disjoint(*of("coco/coco"), *of("coco2pascal/coco2pascal"))
    with pytest.raises(UserError, match="coco split3 learnt 5 of the 5 .*: pottedplant, sheep, sofa, train, tvmonitor"):
        check_disjoint(*of("coco/coco"), *of("pascal/pascal"))
