"""Zero-shot systems through the programs: labels, stages, results, wrong input. Formulas: test_zero_shot.py."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import test as tester
import train as trainer
from model import build_system, configure
from model.verify import read, verify
from model.zero_shot.texts import read_bank
from tests.make import ROOT
from tests.make.scenes import NUMBERS
from tests.make.zero_shot import published
from util import protocol
from util.config import Config
from util.data.folds import fold_of, read_class_names, read_label_table
from util.errors import UserError
from util.files import load_tensors
from util.prepare.__main__ import prepare
from util.run import preflight
from util.run.checkpoint import read_meta
from util.run.distributed import Context
from util.run.log import RunLog
from util.run.place import Experiment
from util.run.schedule import Schedule
from util.score.task import headline
from util.score.zero_shot import ZeroShotTask

CPU = Context(torch.device("cpu"))


@pytest.fixture(scope="module")
def small(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Overrides for a few steps on a few scenes, in the repository's folder."""
    folder = tmp_path_factory.mktemp("zero")
    lines = (scenes / "list.txt").read_text().splitlines()
    (folder / "list.txt").write_text("\n".join(lines[:12]))
    with contextlib.chdir(ROOT):
        yield [f"Data.data_root={scenes}", "Data.maker=", f"Data.train_list={folder}/list.txt",
               f"Data.val_list={folder}/list.txt", f"Runtime.output={folder}/exp",
               "Train.iterations=4", "Train.keep=[2]", "Train.batch_size=2", "Train.workers=0",
               "Train.train_h=64", "Train.val_size=64", "Method.crop=64", "Method.stride=48", "Method.prompts=2",
               "Method.dropout=0.1"]  # fmt: skip


def configured(exp: str, arch: str, overrides: list[str], data_set: str = "demo", net: str = "vit8") -> tuple[Config, Experiment]:
    file = f"config/{data_set}/{data_set}_{exp}_{net}.yaml"
    config = configure(file, arch, overrides)
    return config, Experiment.from_config_path(arch, file, config.Runtime.output)


def train(exp: str, overrides: list[str], arch: str = "CLIP_RC") -> Experiment:
    config, place = configured(exp, arch, overrides)
    trainer.train(config, place, CPU, quiet=True)
    return place


def evaluate(exp: str, overrides: list[str], arch: str = "CLIP_RC") -> dict:
    config, place = configured(exp, arch, overrides)
    tester.ready(config, place)
    with RunLog(place.result, "test.log", quiet=True) as log:
        tester.test(config, place, CPU, log)
    return json.loads((place.result / "report.json").read_text())


# ---- the task

def test_labels_are_channels_without_background(small: list[str]) -> None:
    config, _ = configured("inductive", "CLIP_RC", small)
    task = ZeroShotTask(config)
    assert task.channels == task.classes == tuple(range(1, 21)) and task.headline == "hiou"
    assert set(task.fold.novel) == {1, 2, 3, 4, 5} and len(task.fold.base) == 15
    item = task.images("val_list", training=False)[0]
    label = np.array(Image.open(Path(config.Data.data_root) / task.records("val_list")[0].label))
    assert torch.equal(item.original_label[0], torch.from_numpy(np.where((label == 0) | (label == 255), 255, label - 1)))
    assert min(item.image.shape[2:]) == 64 and not item.placed[0].corners
    taught = task.training()[0]
    assert taught.image.shape == (1, 3, 64, 64) and not taught.placed
    with pytest.raises(UserError, match="batch_size_val = 2"):
        ZeroShotTask(configured("inductive", "CLIP_RC", [*small, "Train.batch_size_val=2"])[0])


def test_without_unseen_classes_the_mean_is_the_headline(small: list[str], tmp_path: Path) -> None:
    (tmp_path / "folds.yaml").write_text("split0: []")
    config, _ = configured("full", "CLIP_RC", [*small, f"Data.folds={tmp_path}/folds.yaml"])
    task = ZeroShotTask(config)
    assert task.headline == "miou" and len(task.fold.base) == 20
    system = build_system("CLIP_RC", config, task.fold, task.names)
    scores = task.evaluate(system.eval().predict, task.validation(), tester.How(CPU, RunLog(tmp_path, main=False)))
    assert {"miou", "pixel_accuracy"} <= scores.record.keys() and not {"hiou", "seen_miou"} & scores.record.keys()


# ---- stages

def test_the_stages(small: list[str]) -> None:
    """Inductive, self-training from its half-way weights, test, verification."""
    config, place = configured("transductive", "CLIP_RC", [*small, "Train.start_from=inductive/2", "Train.iterations=2"])
    finding, = preflight.start_weights(config, place, trainer.system_class("CLIP_RC").facts)
    assert not finding.ok and "`ARCH=CLIP_RC NET=vit8 sh train.sh inductive demo GPUS`" in finding.detail
    with pytest.raises(UserError, match=r"no weights at .*inductive/vit8/snapshot/2\.safetensors; train it first: .*keep=\[2\]"):
        trainer.train(config, place, CPU, quiet=True)

    first = train("inductive", small)
    half = load_tensors(first.snapshot / "2.safetensors")
    kept = load_tensors(first.last)
    assert any(not torch.equal(half[name], kept[name]) for name in half)
    with RunLog(place.folder, main=False) as log:
        run = trainer.build(config, place, CPU, log)
    assert all(torch.equal(half[name], value) for name, value in run.system.trained_state().items())
    assert not run.optimizer.state and run.progress.step == 0 and type(run.optimizer) is torch.optim.AdamW
    trainer.train(config, place, CPU, quiet=True)
    assert "2.safetensors, step 2" in read_meta(place.last)["start"] and read_meta(place.last)["vocabulary"] == "all classes"
    assert read_meta(first.last)["vocabulary"] == "seen classes"

    result = evaluate("transductive", [*small, "Train.start_from=inductive/2", "Train.iterations=2"])
    assert {"pixel_accuracy", "seen_miou", "unseen_miou", "hiou", "miou"} <= result["mean"].keys()
    assert len(result["seeds"][0]["per_class"]) == 20 and "a leak" in result["protocol"]["setting"]
    assert "smallest object" not in result["protocol"] and "pixel accuracy" in (place.result / "report.html").read_text()
    assert not verify(read(place.result / "report.json"), configured("transductive", "CLIP_RC", small)[0], CPU)

    with pytest.raises(UserError, match=r"prompts: the checkpoint has 2, the config 3"):
        train("transductive", [*small, "Train.start_from=inductive/2", "Method.prompts=3", f"Runtime.output={first.root}"])
    with pytest.raises(UserError, match="setting: the checkpoint has 'inductive', the config 'full'"):
        evaluate("full", [*small, f"Test_Finetune.weight={first.last}"])
    for wrong in ("inductive", "a/b/2", "/2"):
        with pytest.raises(UserError, match="write EXP/STEP"):
            train("transductive", [*small, f"Train.start_from={wrong}"])


@pytest.mark.parametrize("arch", ["CLIP_RC", "ZegCLIP"])
def test_goes_on_bit_for_bit(arch: str, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = [*small, "Train.save_minutes=0", "Train.keep=[]"]
    whole = train("full", [*common, f"Runtime.output={tmp_path}/a"], arch)
    save = trainer.save_point

    def stop(run: trainer.Run) -> None:
        save(run)
        if run.progress.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_point", stop)
    with pytest.raises(KeyboardInterrupt):
        train("full", [*common, f"Runtime.output={tmp_path}/b"], arch)
    monkeypatch.undo()
    again = train("full", [*common, f"Runtime.output={tmp_path}/b"], arch)
    assert "3 iterations are done" in (again.folder / "train.log").read_text()
    a, b = load_tensors(whole.last), load_tensors(again.last)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_photographs_with_a_random_clip(voc_mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VOC's configs and labels, ViT-B/16 of random weights: inductive, its self-training, windows; every line says random."""
    monkeypatch.chdir(ROOT)
    for key, count in (("train", 4), ("val", 2)):
        lines = (ROOT / f"lists/pascal_mini/{key}.txt").read_text().splitlines()[:count]
        (tmp_path / f"{key}.txt").write_text("\n".join(lines))
    given = [f"Data.data_root={voc_mini}", f"Data.train_list={tmp_path}/train.txt", f"Data.val_list={tmp_path}/val.txt",
             "CLIP.clip_path=random", f"Runtime.output={tmp_path}/exp", "Train.train_h=64", "Train.val_size=64", "Method.crop=64",
             "Method.stride=48", "Train.batch_size=2", "Train.workers=0", "Train.iterations=2"]  # fmt: skip
    places = []
    for exp, own in (("inductive", ["Train.keep=[1]"]), ("transductive", ["Train.start_from=inductive/1"])):
        config, place = configured(exp, "CLIP_RC", [*given, *own], "voc", "vitb16")
        trainer.train(config, place, CPU, quiet=True)
        places.append(place)
    first, second = (load_tensors(place.last) for place in places)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    tester.ready(config, place)
    with RunLog(place.result, "test.log", quiet=True) as log:
        tester.test(config, place, CPU, log)
    result = json.loads((place.result / "report.json").read_text())
    assert result["mark"] == "[random CLIP]" and "every score means nothing" in result["warnings"][0]
    assert result["seeds"][0]["episodes"] == 2 and "[random CLIP]" in (place.result / "test.log").read_text()


# ---- published settings

def test_schedule_of_the_papers() -> None:
    """Rates of the published training, from its own hook (spec section 9)."""
    rates = {("voc", "inductive"): {0: 2e-10, 750: 9.83195e-05, 1500: 1.93271e-04, 20000: 1.07641e-04, 39999: 1.01435e-06},
             ("coco_stuff", "inductive"): {1500: 1.96639e-04}, ("voc", "transductive"): {1500: 1.86516e-04}}  # fmt: skip
    for (data_set, exp), expected in rates.items():
        train = configured(exp, "CLIP_RC", [], data_set, "vitb16")[0].Train
        schedule = Schedule.of(train, train.iterations)
        for step, rate in expected.items():
            assert schedule.rate(train.base_lr, step) == pytest.approx(rate, rel=1e-5)
        assert train.batch_size == 16 and train.weight_decay == 0.01


def test_splits_and_weights_of_the_papers() -> None:
    unseen = {"voc": range(15, 20), "coco_stuff": (19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160),
              "context": (0, 6, 7, 14, 19, 24, 31, 33, 48, 54)}  # fmt: skip
    counts = {"voc": 20, "coco_stuff": 171, "context": 59}
    for data_set, classes in unseen.items():
        fold = fold_of(configured("inductive", "CLIP_RC", [], data_set, "vitb16")[0])
        assert [c - 1 for c in fold.novel] == list(classes) and fold.num_classes == counts[data_set]
    assert (len(fold_of(configured("inductive-bg", "CLIP_RC", [], "context", "vitb16")[0]).base), len(fold.base)) == (50, 49)
    for data_set, exp, weights in (("voc", "inductive", (100, 1, 2)), ("voc", "transductive", (100, 1, 2)),
                                   ("voc", "full", (100, 1, 0)), ("coco_stuff", "inductive", (200, 3, 50)),
                                   ("coco_stuff", "full", (100, 1.5, 1))):  # fmt: skip
        options = configured(exp, "CLIP_RC", [], data_set, "vitb16")[0].Method
        assert (options.focal, options.dice, options.recovery) == weights and options.setting == exp
        assert (options.prompts, options.templates) == ((100, "many") if data_set == "coco_stuff" else (10, "one"))
    transductive, strict = (configured(exp, "CLIP_RC", [], "voc", "vitb16")[0] for exp in ("transductive", "transductive-strict"))
    assert transductive.Train.start_from == strict.Train.start_from == "inductive/20000"
    assert 20000 in configured("inductive", "CLIP_RC", [], "voc", "vitb16")[0].Train.keep
    assert strict.Method.setting == "transductive-strict" and protocol.of(strict).hash != protocol.of(transductive).hash


def test_label_tables() -> None:
    """Of stuffthingmaps 171 of 182 values are classes, in the order of labelTrainIds; others are an error when read."""
    ids, raw = (read_label_table(ROOT / f"lists/coco_stuff/{name}.yaml", 171) for name in ("train_ids", "stuffthingmaps"))
    assert ids[:171].tolist() == list(range(1, 172)) and ids[255] == raw[255] == 255
    unused = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]  # COCO's ids 12, 26, ... less one
    assert [int(c) for v, c in enumerate(raw[:182]) if v not in unused] == list(range(1, 172))
    assert (raw[unused] > 171).all() and (raw[unused] < 255).all() and ids[171] == 254 and ids[200] == 200
    names = read_class_names(ROOT / "lists/coco_stuff/classes.txt").names
    assert names[raw[0] - 1] == "person" and names[raw[91] - 1] == "banner" and names[raw[181] - 1] == "wood"
    background = read_label_table(ROOT / "lists/context_bg/labels.yaml", 60)
    assert background[0] == 1 and background[59] == 60 and background[60] == 254


# ---- published checkpoints

def test_a_published_checkpoint(small: list[str], tmp_path: Path) -> None:
    config, _ = configured("inductive", "CLIP_RC", small)
    fold, names = fold_of(config), read_class_names(config.Data.class_names)
    system = build_system("CLIP_RC", config, fold, names)
    torch.save({"meta": {"CLASSES": names.names}, "state_dict": published(system)}, tmp_path / "iter_40000.pth")
    result = evaluate("inductive", [*small, f"Test_Finetune.weight={tmp_path}/iter_40000.pth"])
    assert result["mean"].keys() >= {"hiou", "pixel_accuracy"} and result["checkpoint"].endswith("iter_40000.pth")
    assert result["protocol"]["checkpoint"] == ZeroShotTask.says["Train.selection"]
    for other, shown in ((names.names[1:], "19 classes, number 1 'fish'; .* 20 classes, number 1 'star'"),
                         ((*names.names, "sofa"), "21 classes, number 21 'sofa'; .* 20 classes, number 21 none")):  # fmt: skip
        torch.save({"meta": {"CLASSES": other}, "state_dict": published(system)}, tmp_path / "other.pth")
        with pytest.raises(UserError, match=shown):
            evaluate("inductive", [*small, f"Test_Finetune.weight={tmp_path}/other.pth"])
    with pytest.raises(UserError, match="has 2 prompts in each layer, this system 10"):
        evaluate("inductive", [*small, f"Test_Finetune.weight={tmp_path}/iter_40000.pth", "Method.prompts=10"])


def test_other_classes_at_test_time(small: list[str], tmp_path: Path) -> None:
    """All names in another order: the same scores. Fewer and new ones: their own channels, rows of the data set's classes."""
    config, _ = configured("inductive", "CLIP_RC", [*small, "Method.start=clip"])  # scores that differ, without training
    names = read_class_names(config.Data.class_names).names
    system = build_system("CLIP_RC", config, fold_of(config), read_class_names(config.Data.class_names))
    own = {system.official_name(f"head.{name}"): value for name, value in system.trained_state().items()}
    torch.save(published(system) | own, tmp_path / "iter.pth")
    few = Path(config.Data.val_list).read_text().splitlines()[:4]
    (tmp_path / "list.txt").write_text("\n".join(few))
    given = [*small, f"Data.val_list={tmp_path}/list.txt", f"Test_Finetune.weight={tmp_path}/iter.pth",
             f"Test_Finetune.classes={tmp_path}/classes.txt"]  # fmt: skip
    whole = evaluate("inductive", given[:-1])
    (tmp_path / "classes.txt").write_text("\n".join(reversed(names)))
    again = evaluate("inductive", given)
    assert again["seeds"][0]["per_class"] == pytest.approx(whole["seeds"][0]["per_class"], abs=2e-3)
    assert again["mean"]["miou"] == pytest.approx(whole["mean"]["miou"], abs=2e-3)
    assert again["protocol_hash"] != whole["protocol_hash"]
    (tmp_path / "classes.txt").write_text("sofa | a heart\n" + "\n".join(names[2:8]) + "\nposter | house and tree")
    fewer = evaluate("inductive", given)
    assert [*fewer["seeds"][0]["per_class"]] == [str(c) for c in range(3, 9)] and "sofa" in fewer["other_classes"].values()
    assert any("8 of a list, 2 of them new" in warning for warning in fewer["warnings"])
    assert "classes of" in fewer["protocol"]["name"] and "classes of a file, hash" in fewer["protocol"]
    found = [iou for iou in fewer["seeds"][0]["per_class"].values() if iou is not None]
    assert fewer["seeds"][0]["miou"] == pytest.approx(sum(found) / len(found))
    assert not verify(read(configured("inductive", "CLIP_RC", given)[1].result / "report.json"),
                      configured("inductive", "CLIP_RC", given)[0], CPU)  # fmt: skip
    (tmp_path / "classes.txt").write_text("sofa | heart\nposter | house")
    with pytest.raises(UserError, match="none of its 2 names is a class of demo"):
        evaluate("inductive", given)
    with pytest.raises(UserError, match=r"Test_Finetune\.classes.*none\.txt"):
        evaluate("inductive", [*given[:-1], f"Test_Finetune.classes={tmp_path}/none.txt"])


# ---- text banks, lists and wrong input

def test_a_bank_from_a_file(tmp_path: Path) -> None:
    names = ("cat", "dog", "sky", "tree", "boat")
    own = F.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), dim=1).half().float()
    np.save(tmp_path / "bank.npy", own.half().numpy())  # as published
    torch.save(own, tmp_path / "bank.pth")
    torch.save({"a": own, "b": own}, tmp_path / "two.pth")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name in ("bank.npy", "bank.pth"):
        bank, warnings = read_bank(tmp_path / name, names, own)
        assert torch.equal(bank, own) and bank.dtype == torch.float32 and not warnings
    np.save(tmp_path / "other.npy", own.flip(0).numpy())
    assert "'cat' to 'boat'" in read_bank(tmp_path / "other.npy", names, own)[1][0]
    for name, few, computed, message in (
        ("bank.npy", names[:4], own[:4], r"shape \(5, 32\); 4 classes and this CLIP need \(4, 32\)"),
        ("bank.npy", names, own[:, :16], r"shape \(5, 32\)"), ("two.pth", names, own, "holds 2 tensors; expected one"),
        ("objects.npy", names, own, "damaged, or no array of numbers"), ("none.npy", names, own, "no file"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_bank(tmp_path / name, few, computed)
    np.save(tmp_path / "bank.npy", own.numpy() * np.array([[1], [1], [np.nan], [1], [1]]))
    with pytest.raises(UserError, match="not of length 1"):
        read_bank(tmp_path / "bank.npy", names, own)


def test_lists_of_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def touch(name: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    sets = tmp_path / "ImageSets/Segmentation"
    sets.mkdir(parents=True)
    for name, ids in (("train", ["a"]), ("trainaug", ["b", "a"]), ("val", ["v"])):
        (sets / f"{name}.txt").write_text("\n".join(ids))
    for name in ("JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/v.jpg", "SegmentationClass/a.png",
                 "SegmentationClass/v.png"):
        touch(name)
    command = ["voc", "--root", str(tmp_path), "--lists", str(tmp_path / "lists")]
    with pytest.raises(UserError, match=r"1 files of train: SegmentationClassAug/b.png\n.*train has 2 images, not 10,582"):
        prepare(command)
    touch("SegmentationClassAug/b.png")
    prepare([*command, "--partial"])
    found = (tmp_path / "lists/train.txt").read_text().splitlines()
    assert found == ["JPEGImages/a.jpg SegmentationClass/a.png", "JPEGImages/b.jpg SegmentationClassAug/b.png"]
    (sets / "val.txt").write_text("b")
    with pytest.raises(UserError, match="in train and in val, the first b"):
        prepare(command)

    for split in ("train", "val"):
        touch(f"images/{split}2017/7.jpg")
        touch(f"annotations/{split}2017/7.png")
    prepare(["coco_stuff", "--root", str(tmp_path), "--lists", str(tmp_path / "coco"), "--partial"])
    assert "stuffthingmaps.yaml" in capsys.readouterr().out
    touch("annotations/train2017/7_labelTrainIds.png")
    prepare(["coco_stuff", "--root", str(tmp_path), "--lists", str(tmp_path / "coco"), "--partial"])
    assert (tmp_path / "coco/train.txt").read_text() == "images/train2017/7.jpg annotations/train2017/7_labelTrainIds.png\n"


def test_wrong_input(small: list[str], scenes: Path, tmp_path: Path) -> None:
    """Label values without a class, a class list of another length, a seen class among the unseen, two of one name."""
    (tmp_path / "table.yaml").write_text("".join(f"{v}: {v}\n" for v in range(20)))  # 20 is in the labels
    shown = {int(v) for n in NUMBERS[:12] for v in np.unique(np.array(Image.open(scenes / f"SegmentationClassAug/{n:06d}.png")))}
    assert 20 in shown
    config, _ = configured("inductive", "CLIP_RC", [*small, f"Data.label_table={tmp_path}/table.yaml"])
    with pytest.raises(UserError, match=r"label values \[254\] are no class"):
        ZeroShotTask(config, tmp_path / "cache").records("train_list")
    names = (ROOT / "lists/demo/classes.txt").read_text().split("\n")[:20]
    for lines, folds, message in (
        (names[:19], "split0: [star]", "values .* are no class"), ([*names, "star"], "split0: []", "already on line 1"),
        (names, "split0: [star, star]", "in split0 and in split0"), (names, "split0: [sofa]", "no class"),
    ):  # fmt: skip
        (tmp_path / "classes.txt").write_text("\n".join(lines))
        (tmp_path / "folds.yaml").write_text(folds)
        with pytest.raises(UserError, match=message):
            given = [*small, f"Data.class_names={tmp_path}/classes.txt"]
            ZeroShotTask(configured("inductive", "CLIP_RC", given)[0]).records("val_list")
    with pytest.raises(UserError, match=r"unknown key Method\.setting"):
        configure("config/demo/demo_split0_resnet50.yaml", "PFENet", ["Test_Finetune.protocol=cliprc-inductive"])


def test_a_validation_without_unseen_classes_chooses_nothing() -> None:
    with pytest.raises(UserError, match="Data.val_list gives no hiou"):
        headline(SimpleNamespace(headline="hiou"), {"miou": 0.5})
