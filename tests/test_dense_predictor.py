"""Dense systems on a user's images: the labels of an evaluation, other classes, files, wrong input, one file to share."""

import contextlib
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import demo.web.__main__ as web
import predict
from model import load_weights, open_system
from model.predict.dense_predictor import DensePredictor, load_predictor, read_classes
from model.predict.predictor import Predictor
from model.predict.share import export
from tests.make import ROOT, photo, star
from tests.make.runs import run_program
from tests.make.scenes import make_dense
from util.errors import UserError
from util.files import load_tensors
from util.report.viz import palette
from util.run.checkpoint import read_meta
from util.run.place import Experiment

SMALL = ("Method.prompts=2", "Train.val_size=64", "Method.crop=64", "Method.stride=48")
CHECKPOINTS = {"WeCLIP": ("weak_vit8", "Method.long_side=96"), "CLIP_RC": ("inductive_vit8", *SMALL)}


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def made(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """ARCH -> config and checkpoint."""
    root, lists = tmp_path_factory.mktemp("dense"), f"{scenes}/list.txt"
    given = [f"Data.data_root={scenes}", "Data.maker=", f"Data.train_list={lists}", f"Data.val_list={lists}"]
    with contextlib.chdir(ROOT):
        return {arch: make_dense(root, arch, *options, *given) for arch, options in CHECKPOINTS.items()}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    return functools.partial(run_program, predict.main, monkeypatch, capsys)


@pytest.mark.parametrize("arch", CHECKPOINTS)
def test_labels_are_those_of_an_evaluation(arch: str, made: dict, scenes: Path) -> None:
    config, weight = made[arch]
    system, task = open_system(arch, config)
    load_weights(system, config, Experiment.of_checkpoint(weight, arch, config), weight)
    sample = task.images("val_list", training=False)[3]
    expected = system.eval().predict(sample).decide(0, sample.placed[0])
    predictor = load_predictor(weight, "cpu")
    found = predictor.predict(scenes / sample.name[0])
    assert np.array_equal(found.label, np.array(task.channels)[expected]) and len(np.unique(expected)) > 1
    assert found.score.shape == found.label.shape and 0 <= found.score.min() < found.score.max() <= 1
    assert list(predictor.classes) == list(task.channels) and predictor.classes[20] == "crown"
    assert ("vocabulary" in " ".join(predictor.notes)) == (arch == "CLIP_RC") == (0 not in predictor.classes)


def test_a_photo_larger_than_the_network_sees(made: dict, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels at its own size; that classes are taken a few at a time changes nothing."""
    picture = np.asarray(Image.open(photo(scenes, 5003))).repeat(5, 0).repeat(5, 1)
    predictor = load_predictor(made["WeCLIP"][1], "cpu")
    whole = predictor.predict(picture).label
    monkeypatch.setattr("model.system.AT_ONCE", 3 * picture.shape[0] * picture.shape[1])
    assert whole.shape == picture.shape[:2] and np.array_equal(predictor.predict(picture).label, whole)


def test_other_classes(made: dict, scenes: Path, tmp_path: Path) -> None:
    """Unseen names, a file with texts, and the trained list again; a class seen in training stays one."""
    predictor, image = load_predictor(made["CLIP_RC"][1], "cpu"), photo(scenes, 5003)
    trained = predictor.predict(image).label
    seen = {predictor.names.names[c - 1] for c in predictor.fold.base}
    predictor.set_classes(["Mug", "star"])
    assert predictor.classes == {1: "Mug", 2: "star"} and {"mug"} == {"mug", "star"} & seen
    assert predictor.system.seen.tolist() == [0] and set(np.unique(predictor.predict(image).label)) <= {1, 2}
    file = tmp_path / "names.txt"
    file.write_text("a cup | mug\nstar\n")
    predictor.set_classes(read_classes(str(file)))
    assert predictor.classes[1] == "a cup" and predictor.system.seen.tolist() == []
    predictor.set_classes(list(predictor.names.names))
    assert np.array_equal(predictor.predict(image).label, trained)
    with pytest.raises(UserError, match="two classes have the name 'Star'"):
        predictor.set_classes(["star", "Star"])
    with pytest.raises(UserError, match="255 classes: name at least one and at most 254"):
        predictor.set_classes([f"c{i}" for i in range(255)])


def test_command_line(made: dict, scenes: Path, tmp_path: Path, program: Callable) -> None:
    """Palette PNGs, overlays, polygons, a record; a picture that is too small is reported, and the others continue."""
    weight, out, folder = made["WeCLIP"][1], tmp_path / "out", tmp_path / "photos"
    folder.mkdir()
    Image.open(photo(scenes, 5003)).save(folder / "b.png")
    Image.fromarray(np.zeros((5, 60, 3), np.uint8)).save(folder / "a.png")
    Image.fromarray(np.zeros((9, 150, 3), np.uint8)).save(folder / "c.png")  # a patch high, until it is scaled
    code, said = program("--weights", weight, "--query", folder, "--out", out, "--polygons", "coco")
    assert code == 2 and "a.png is 60 x 5 pixels: smaller than a patch of CLIP (8 pixels)" in said, said
    assert "21 classes, on cpu in fp32" in said and "drawn demo world" in said and re.search("c.png: images of .* smaller", said)
    label = load_predictor(weight, "cpu").predict(folder / "b.png").label
    stored = Image.open(out / "masks/b.png")
    assert stored.mode == "P" and np.array_equal(np.asarray(stored), label)
    assert np.array_equal(np.array(stored.getpalette()).reshape(-1, 3)[:21], palette()[:21])
    record = json.loads((out / "scores.json").read_text())
    (row,), names = record["images"], record["classes"]
    assert sum(found["fraction"] for found in row["classes"]) == pytest.approx(1, abs=1e-3)
    assert all(found["fraction"] == pytest.approx((label == found["value"]).mean(), abs=1e-4)
               and names[str(found["value"])] == found["class"] for found in row["classes"])  # fmt: skip
    assert len(record["unread"]) == 2 and record["unread"][0]["image"].endswith("a.png")
    data = json.loads((out / "coco.json").read_text())
    assert [category["name"] for category in data["categories"]] == list(names.values())[1:]
    areas = {annotation["category_id"]: annotation["area"] for annotation in data["annotations"]}
    assert areas == {c: int((label == c).sum()) for c in np.unique(label).tolist() if c}
    overlay = Image.open(out / "overlays/b.jpg")
    assert overlay.height == label.shape[0] and overlay.width > label.shape[1] + 30  # with a legend
    code, said = program("--weights", made["CLIP_RC"][1], "--query", folder / "b.png", "--out", out, "--classes", "house, star")
    assert code == 0 and "2 classes" in said and "scores depend on the vocabulary" in said, said
    assert json.loads((out / "scores.json").read_text())["classes"] == {"1": "house", "2": "star"}


def test_wrong_command_lines(made: dict, piclip: Path, scenes: Path, tmp_path: Path, program: Callable) -> None:
    query = photo(scenes, 5003)
    weak, zero = (made[arch][1] for arch in ("WeCLIP", "CLIP_RC"))
    wrong = [
        (weak, ("--support", query, "--box", "1,1,60,60"), "--support: .* labels every pixel"),
        (weak, ("--classes", "star"), "--classes with .*: it knows the classes that it was trained with and no others"),
        (zero, ("--text", "star"), "--text: .* labels every pixel"),
        (piclip, ("--classes", "star"), "--classes: .* finds one thing"),
        (zero, ("--classes", ""), "is no name of a class"), (zero, ("--classes", "star,,house"), "is no name of a class"),
        (zero, ("--classes", "star, Star"), "two classes have the name 'Star'"),
        (zero, ("--classes", tmp_path / "none.txt"), "no such file"), (zero, ("--classes", "star, sofa"), "does not know sofa"),
    ]  # fmt: skip
    for weight, options, message in wrong:
        code, said = program("--weights", weight, "--query", query, "--out", tmp_path / "out", *options)
        assert code == 2 and re.search(message, said) and "Traceback" not in said, (options, said)
    code, said = program("--classes", "star", "--query", query, "--out", tmp_path / "out")
    assert code == 2 and "name the weights of a system that labels every pixel" in said
    for opener, weight, message in ((Predictor, weak, "looks for no example: `python predict.py --weights"),
                                    (DensePredictor, piclip, "finds what an example shows")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            opener.from_checkpoint(weight, "cpu")
    assert not (tmp_path / "out").exists()


def test_a_published_checkpoint(made: dict, scenes: Path, tmp_path: Path, program: Callable) -> None:
    """With --config and --arch; one of COCO's 81 classes does not fit 21."""
    config, weight = made["WeCLIP"]
    system, _ = open_system("WeCLIP", config)
    state = {system.official_name(f"head.{name}"): value for name, value in load_tensors(weight).items()}
    torch.save(state, tmp_path / "published.pth")
    wide = {name: torch.zeros(81, *value.shape[1:]) for name, value in state.items() if name.startswith("decoder.linear_pred.")}
    torch.save(state | wide, tmp_path / "coco.pth")
    query = photo(scenes, 5003)
    given = ["--config", "config/demo/demo_weak_vit8.yaml", "--arch", "WeCLIP", "--query", query, "--out", tmp_path / "out"]
    code, said = program("--weights", tmp_path / "published.pth", *given, "Method.long_side=96")
    found = np.asarray(Image.open(tmp_path / "out/masks/005003.png"))
    assert code == 0 and np.array_equal(found, load_predictor(weight, "cpu").predict(query).label), said
    code, said = program("--weights", tmp_path / "coco.pth", *given)
    assert code == 2 and re.search(r"linear_pred.weight is \(81, 256, 1, 1\), expected \(21, 256, 1, 1\)", said), said


def test_the_web_page_refuses(made: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(web, "check_gradio", lambda: None)
    code, said = run_program(web.main, monkeypatch, capsys, "--weights", made["WeCLIP"][1])
    assert code == 2 and "labels every pixel with its own classes" in said and "predict.py --weights" in said, said


@pytest.mark.parametrize("arch", CHECKPOINTS)
def test_one_file_to_share(arch: str, made: dict, scenes: Path, tmp_path: Path) -> None:
    """It stands alone but for CLIP, gives the same labels, and is taken by test.py."""
    config, weight = made[arch]
    image, file = star(scenes)[0][0], tmp_path / "shared.safetensors"
    export(weight, file, note="rough")
    card = file.with_suffix(".md").read_text()
    assert "semantic-segmentation" in card and "crown" in card and "shot" not in card and "--support" not in card
    assert ("--classes" in card) == ("set_classes" in card) == ("without labels in training: star" in card) == (arch == "CLIP_RC")
    assert str(ROOT) not in json.dumps(read_meta(file)) and str(scenes) not in json.dumps(read_meta(file))
    mine, other = (load_predictor(path, "cpu") for path in (weight, file))
    assert np.array_equal(mine.predict(image).label, other.predict(image).label) and "rough" in other.notes
    assert (other.classes, other.fold) == (mine.classes, mine.fold)
    system, _ = open_system(arch, config)
    load_weights(system, config, Experiment.of_checkpoint(weight, arch, config), file)
    assert all(torch.equal(a, b) for a, b in zip(system.trained.parameters(), mine.system.trained.parameters(), strict=True))
