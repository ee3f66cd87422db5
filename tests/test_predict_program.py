"""predict.py: its command line from end to end, what it says of wrong input, and where it finds what it needs."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

import predict
from model.predict import arguments
from model.predict.opening import NAMED
from model.predict.predictor import Predictor
from tests.make import ROOT, star
from tests.make.runs import run_program
from util.errors import UserError
from util.files import load_tensors
from util.run.checkpoint import read_meta, save_weights


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Runs predict.py as its command line does; exit code and everything printed."""
    return functools.partial(run_program, predict.main, monkeypatch, capsys)


def test_boxes_that_begin_with_a_minus_sign() -> None:
    assert arguments.joined(["--box", "-5,1,9,9", "--box", "1,2,3,4", "--query", "-"]) == [
        "--box=-5,1,9,9", "--box", "1,2,3,4", "--query", "-"]


def test_command_line(piclip: Path, scenes: Path, tmp_path: Path, program: Callable) -> None:
    """A mask and a box; a folder with something unreadable, a pattern, two files of one name, a video."""
    images, masks = star(scenes, of=4)
    Image.fromarray(masks[0]).save(tmp_path / "mask.png")
    folder = tmp_path / "photos"
    folder.mkdir()
    pictures = [np.asarray(Image.open(image)) for image in images[2:]]
    Image.fromarray(pictures[0]).save(folder / "a.jpg", quality=95)
    Image.fromarray(pictures[1]).save(folder / "a.png")
    (folder / "broken.jpg").write_text("no photo")
    (folder / "notes.txt").write_text("not looked at")
    video = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 48))
    for i in range(5):
        video.write(np.full((48, 64, 3), 40 * i, np.uint8))
    video.release()
    out = tmp_path / "out"
    code, said = program(
        "--support", images[0], "--mask", tmp_path / "mask.png", "--support", images[1], "--box", "10,20,80,90", "--text", "star",
        "--query", folder, tmp_path / "photos/*.png", tmp_path / "clip.avi", "--every", 2, "--weights", piclip, "--out", out,
        "--polygons", "coco",
    )  # fmt: skip
    assert code == 2 and "1 of the queries could not be read" in said and "broken.jpg" in said, said
    record = json.loads((out / "scores.json").read_text())
    names = ["a", "a-2", "clip_000000", "clip_000002", "clip_000004"]
    assert [Path(image["mask"]).stem for image in record["images"]] == names
    assert [item["image"] for item in record["unread"]] == [str(folder / "broken.jpg")]
    assert {f.name for f in (out / "supports").iterdir()} == {"1.jpg", "2.jpg"} and record["notes"]
    assert record["left_out"] == [str(folder / "notes.txt")] and "left out, since" in said
    assert len(record["found_in_supports"]) == said.count("its overlap with what is found there is") == 2
    predictor = Predictor.from_checkpoint(piclip)
    predictor.set_support(images[:2], [masks[0], None], "star", [None, [10, 20, 80, 90]])
    found = predictor.predict(folder / "a.png")
    stored = Image.open(out / "masks/a-2.png")
    assert stored.mode == "L" and np.array_equal(np.asarray(stored), found.mask * np.uint8(255))
    row = record["images"][1]
    assert row["fraction"] == pytest.approx(found.mask.mean(), abs=1e-4) and (row["height"], row["width"]) == found.mask.shape
    data = json.loads((out / "coco.json").read_text())
    assert len(data["images"]) == 5 and data["categories"][0]["name"] == "star"
    overlay = np.asarray(Image.open(out / "overlays/a-2.jpg")).astype(int)
    changed = np.abs(overlay - pictures[1]).max(-1) > 40
    assert overlay.shape == pictures[1].shape and changed[~found.mask].mean() < 0.02 < changed[found.mask].mean()
    assert not [f for f in out.rglob(".*")] and Image.open(out / "overview.jpg").width > 300

    code, said = program("--text", "star", "--query", folder / "a.png", "--weights", piclip, "--out", tmp_path / "text",
                         "--polygons", "labelme", "--precision", "fp32")  # fmt: skip
    assert code == 0 and "text alone" in said, said
    record = json.loads((tmp_path / "text/labelme/a.json").read_text())
    mask = np.asarray(Image.open(tmp_path / "text/masks/a.png")) > 0
    assert (tmp_path / "text/labelme" / record["imagePath"]).resolve() == (folder / "a.png").resolve()
    assert (record["imageHeight"], record["imageWidth"]) == mask.shape
    area = sum(cv2.contourArea(np.array(shape["points"], np.float32)) for shape in record["shapes"])
    assert area == mask.sum() > 0

    code, said = program("--clip", "demo/clip", "--text", "star", "--query", folder / "a.png", "--out", tmp_path / "clip")
    assert code == 0 and "without a trained network" in said, said  # no weights at all
    record = json.loads((tmp_path / "clip/scores.json").read_text())
    assert (record["weights"], record["clip"], len(record["images"])) == (None, "demo/clip", 1)


def test_wrong_command_lines(piclip: Path, scenes: Path, tmp_path: Path, program: Callable, monkeypatch) -> None:
    (image, query), (mask, _) = star(scenes)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:-1]).save(tmp_path / "other.png")
    Image.fromarray(mask & False).save(tmp_path / "empty.png")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "clip.mp4").write_text("no video")
    base = piclip.parents[4] / "PSPNet/split0/resnet50/snapshot/best.safetensors"
    good = {"--support": image, "--mask": tmp_path / "mask.png", "--text": "star", "--query": query, "--weights": piclip,
            "--out": tmp_path / "out"}  # fmt: skip
    wrong = [
        ({"--support": tmp_path / "none.jpg"}, "no such file.*none.jpg"), ({"--support": tmp_path / "file"}, "not an image"),
        ({"--mask": tmp_path / "other.png"}, "needs the size of its photo"), ({"--mask": tmp_path / "empty.png"}, "is empty"),
        ({"--mask": None}, "give a mask or boxes"), ({"--box": "1,1,9,9"}, "not both"), ({"--text": None}, "give a text"),
        ({"--support": None}, "give its --support"), ({"--query": tmp_path / "*.jpg"}, "no such file, folder or pattern"),
        ({"--query": tmp_path / "folder"}, "no photo and no video"), ({"--query": tmp_path / "clip.mp4"}, "not a readable video"),
        ({"--weights": tmp_path / "none.safetensors"}, "no such checkpoint: .*none"),
        ({"--weights": tmp_path / "file"}, "--arch PI_CLIP"),
        ({"--weights": base}, "is a base learner"), ({"--out": tmp_path / "file/out"}, "cannot be written"),
        ({"--out": tmp_path / "file"}, "cannot be written"), ({"--every": "0"}, "at least 1"), ({"--device": "tpu9"}, "device"),
        ({"--box": "1,2,3", "--mask": None}, "four numbers with commas"), ({"--box": "a,b", "--mask": None}, "four numbers"),
        ({"--tile": "0"}, "must be positive"), ({"--tile": "7"}, "smaller than a patch"),
        ({"--tile": "64", "--support": None, "--mask": None}, "windows are for what --support shows"),
    ]  # fmt: skip
    for change, message in wrong:
        arguments = [str(part) for option, value in (good | change).items() if value is not None for part in (option, value)]
        code, said = program(*arguments)
        assert code == 2 and "Traceback" not in said, (change, said)
        assert re.search(message, said), (message, said)
    clip = {"--clip": "demo/clip", "--text": "star", "--query": query, "--out": tmp_path / "out"}
    wrong = [({"--weights": piclip}, "no trained network, and so nothing of weights"), ({"--text": None}, "give a text"),
             ({"--support": image}, "examples need a trained system"), ({"--clip": "none.pt"}, "no file none.pt"),
             ({"--clip": "demo"}, "demo has no config.json")]  # fmt: skip
    for change, message in wrong:
        arguments = [str(part) for option, value in (clip | change).items() if value is not None for part in (option, value)]
        code, said = program(*arguments)
        assert code == 2 and re.search(message, said), (message, said)
    monkeypatch.setitem(NAMED, "demo", "nowhere/best.safetensors")
    code, said = program("--text", "star", "--query", query, "--out", tmp_path / "out", "--weights", "demo")
    assert code == 2 and "sh train.sh split0 demo 0" in said
    code, said = program("--text", "star", "--query", scenes, "--out", scenes, "--weights", piclip)
    assert code == 2 and "is searched" in said and not (scenes / "scores.json").exists()


def test_checkpoint_tells_its_config(piclip: Path, scenes: Path, tmp_path: Path, program: Callable, monkeypatch) -> None:
    """From any folder; of before the config was recorded: the run's config.yaml; and what is missing is named."""
    assert read_meta(piclip)["config"]["Train"]["val_size"] == 65
    monkeypatch.chdir(tmp_path)  # the config's demo/clip is found in the repository
    Predictor.from_checkpoint(piclip)
    run = tmp_path / "exp/demo/PI_CLIP/split0/resnet50"
    meta, state = read_meta(piclip), load_tensors(piclip)
    config = meta.pop("config")
    save_weights(run / "snapshot/best.safetensors", state, meta)
    with pytest.raises(UserError, match="does not tell its config"):
        Predictor.from_checkpoint(run / "snapshot/best.safetensors")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="Method.pre_weight = auto: no base learner"):
        Predictor.from_checkpoint(run / "snapshot/best.safetensors")
    base = piclip.parents[4] / "PSPNet/split0/resnet50/snapshot/best.safetensors"
    code, said = program(f"Method.pre_weight={base}", "--text", "star", "--query", star(scenes)[0][0], "--out", "out",
                         "--weights", run / "snapshot/best.safetensors")  # fmt: skip
    assert code == 0, said


def test_nobody_listens(piclip: Path, scenes: Path, tmp_path: Path) -> None:
    """`predict.py ... | head -1`"""
    command = f"'{sys.executable}' -u predict.py --text star --query '{scenes}/JPEGImages/00500*.jpg' --weights '{piclip}'"
    run = subprocess.run(f"{command} --out '{tmp_path}/out' | head -1", shell=True, cwd=ROOT, text=True, capture_output=True,
                         timeout=300)  # fmt: skip
    assert run.stdout.count("\n") == 1 and "Traceback" not in run.stderr and "BrokenPipe" not in run.stderr, run.stderr


def test_as_a_program(piclip: Path, scenes: Path, tmp_path: Path) -> None:
    """In a process of its own, in another folder."""
    command = [sys.executable, ROOT / "predict.py", "--text", "star", "--query", star(scenes)[0][0], "--weights", piclip]
    run = subprocess.run([*command, "--out", "out"], cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert run.returncode == 0 and len(list((tmp_path / "out/masks").iterdir())) == 1, run.stderr
