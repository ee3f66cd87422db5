"""Several classes at once, and whether a thing is there at all."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from model.predict.classes import ClassPredictor
from model.predict.predictor import Predictor
from model.predict.presence import best_cells, object_feature
from tests.make import ROOT, make, star, upright
from tests.make.runs import run_program
from util.errors import UserError


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_best_class_of_each_pixel(piclip: Path, scenes: Path) -> None:
    """Against one predictor for each class, whole and through windows; the query's encoder runs once."""
    images, masks = star(scenes, of=4)
    predictor = Predictor.from_checkpoint(piclip)
    several = ClassPredictor(predictor)
    given = {"star": (images[:2], masks[:2]), "house": (images[1], ~masks[1])}  # of one and of two groups
    for name, support in given.items():
        several.add(name, *support)
    alone, results = Predictor.from_checkpoint(piclip), []
    for name, support in given.items():
        alone.set_support(*support, name)
        results.append(alone.predict(images[3]))
    several.predict(images[2])
    seen: list[int] = []
    predictor.system.encoder.register_forward_hook(lambda *_: seen.append(1))
    found = several.predict(images[3])
    assert len(seen) == 1 and several.classes == {0: "background", 1: "star", 2: "house"}
    best = np.argmax([np.where(one.mask, one.score, 0) for one in results], 0)
    either = results[0].mask | results[1].mask
    assert np.array_equal(found.label, np.where(either, best + 1, 0)) and len(np.unique(found.label)) > 1
    highest = np.max([one.score for one in results], 0)
    np.testing.assert_allclose(found.score[~either], 1 - highest[~either], atol=1e-6)
    assert np.array_equal(several.predict(images[3], ["house"]).label, results[0].mask)
    assert not several.predict(images[3], ["house", "star"]).label.any()

    picture = upright(np.random.default_rng(0), (90, 150))
    for each in (predictor, alone):
        each.set_tiles(64)
    tiled = several.predict(picture)
    expected = []
    for name, support in given.items():
        alone.set_support(*support, name)
        expected.append(alone.predict(picture))
    assert np.array_equal(tiled.label == 1, expected[0].mask & (~expected[1].mask | (expected[0].score >= expected[1].score)))
    for name, kinds, message in (("STAR", (images[0], masks[0]), "two classes have the name"), ("fish", (None,), "no support"),
                                 (" ", (images[0], masks[0]), "needs a name"), ("fish", (images[0],), "give a mask or boxes")):
        with pytest.raises(UserError, match=message):
            several.add(name, *kinds)
    with pytest.raises(UserError, match="nothing to look for"):
        ClassPredictor(predictor).predict(picture)


def test_presence(scenes: Path, tmp_path: Path) -> None:
    """The formula on numbers by hand; a picture has what its own object shows; none without masks or supports."""
    features = torch.zeros(3, 2, 2)
    features[0, 0], features[1, 1] = 1, 1
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 255, 1], [0, 0, 1, 1], [0, 0, 1, 1]])
    wanted = torch.tensor([2 - 0.25, 1, 0])
    torch.testing.assert_close(object_feature(features, mask), wanted / wanted.norm())
    assert best_cells(torch.tensor([0.9, 0.5] + [-1.0] * 38)) == pytest.approx(0.7)
    assert best_cells(torch.tensor([-0.5, -1])) == 0 and best_cells(torch.tensor([0.4, -1])) == pytest.approx(0.4)
    predictor = Predictor.from_checkpoint(make(tmp_path, "HDMNet")[1])
    images, masks = star(scenes, of=3)
    assert predictor.presence(images[0]) is None
    predictor.set_support(images[:2], masks[:2])
    own, other = predictor.presence(images[0]), predictor.presence(np.zeros((80, 100, 3), np.uint8))
    assert 0 <= other < own <= 1
    predictor.set_tiles(64)
    assert predictor.presence(images[0]) != own


def test_command_line(scenes: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    images, masks = star(scenes, of=3)
    weight = make(tmp_path, "HDMNet")[1]
    for i, mask in enumerate(masks[:2]):
        Image.fromarray(mask).save(tmp_path / f"{i}.png")
    good = ["--class", "star", "--support", images[0], "--mask", tmp_path / "0.png", "--class", "house", "--support", images[1],
            "--box", "5,5,60,60", "--query", images[2], "--weights", weight, "--out", tmp_path / "out"]  # fmt: skip

    def program(*arguments: object) -> tuple[int, str]:
        return run_program(predict.main, monkeypatch, capsys, *arguments)

    code, said = program(*good, "--polygons", "coco")
    assert code == 0, said
    record = json.loads((tmp_path / "out/scores.json").read_text())
    row = record["images"][0]
    assert record["classes"] == {"0": "background", "1": "star", "2": "house"} and row["presence"].keys() == {"star", "house"}
    several = ClassPredictor(Predictor.from_checkpoint(weight))
    several.add("star", images[0], masks[0])
    several.add("house", images[1], boxes=[5, 5, 60, 60])
    stored = Image.open(tmp_path / "out" / row["mask"])
    assert stored.mode == "P" and np.array_equal(np.asarray(stored), several.predict(images[2]).label)
    names = [item["name"] for item in json.loads((tmp_path / "out/coco.json").read_text())["categories"]]
    assert names == ["star", "house"]
    code, said = program(*good, "--absent-below", "1")
    assert code == 0 and "not here: star (presence 0." in said, said
    assert not np.asarray(Image.open(tmp_path / "out" / row["mask"])).any()
    one = [*good[2:6], *good[12:]]
    for limit, says in ((1, "not here (presence 0."), (0, " % of the image")):
        code, said = program(*one, "--absent-below", limit)
        row = json.loads((tmp_path / "out/scores.json").read_text())["images"][0]
        assert code == 0 and says in said and 0 < row["presence"] < 1, said
        assert np.asarray(Image.open(tmp_path / "out" / row["mask"])).any() == (limit == 0)

    for arguments, message in (
        ([*good, "--class", "Star", "--support", images[0]], "--class Star: named twice"),
        ([*good, "--class", "tree"], "no --support"),
        ([*good[2:6], *good], "before the first --class"), ([*good, "--text", "star"], "also the text"),
        (["--class", "tree", *good[4:]], "give its --support first"), ([*one, "--absent-below", "1.5"], "number between 0 and 1"),
        ([*one, "--absent-below", "often"], "between 0 and 1, or auto"), ([*one, "--absent-below", "auto"], "no threshold was"),
        (["--clip", "demo/clip", "--text", "star", "--absent-below", "0.5", *good[12:14]], "presence is known where supports"),
        (["--clip", "demo/clip", *good[:14]], "give a text, and no --support"),
    ):  # fmt: skip
        code, said = program(*arguments, "--out", tmp_path / "wrong")
        assert code == 2 and message in said, (message, said)
        assert not (tmp_path / "wrong").exists()
