"""WeCLIP and CLIP-ES from the command line: train, interrupt, test, verify, import; training-free labels as files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import configure, open_system
from tests.make import ROOT
from util.data.index import read_list
from util.data.transforms import read_label
from util.files import load_tensors

CONFIG = "config/demo/demo_weak_vit8.yaml"
RUN = Path("demo/WeCLIP/weak/vit8")
STOP = """
import os, signal
import train, util.run.checkpoint as c
def stop(path, value, f=c.save_json):
    f(path, value)
    os.kill(os.getpid(), signal.SIGTERM)
c.save_json = stop
train.cli.run(train.main)
"""


def program(name: str, arch: str, *overrides: str, code: str = "") -> subprocess.CompletedProcess:
    what = ["-c", code] if code else [f"{name}.py"]
    command = [sys.executable, *what, "--config", CONFIG, "--arch", arch, *overrides]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600, env=one)


@pytest.fixture(scope="module")
def few(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides: 24 scenes to train on, without masks, and 6 to test on; RFM after 3 of 6 steps."""
    folder = tmp_path_factory.mktemp("weak")
    pairs = read_list(scenes / "list.txt")
    (folder / "train.txt").write_text("\n".join(image for image, _ in pairs[:24]))
    (folder / "val.txt").write_text("\n".join(f"{image} {label}" for image, label in pairs[24:30]))
    return [f"Data.data_root={scenes}", "Data.maker=", f"Data.train_list={folder}/train.txt", f"Data.val_list={folder}/val.txt",
            "Train.workers=0", "Runtime.threads=1", "Train.train_h=64", "Train.batch_size=2"]  # fmt: skip


@pytest.fixture(scope="module")
def short(few: list[str]) -> list[str]:
    return [*few, "Train.iterations=6", "Method.static_steps=3", "Train.validate_every=0", "Train.watch=false"]


@pytest.fixture(scope="module")
def trained(short: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    run = program("train", "WeCLIP", *short, f"Runtime.output={out}", "Train.watch=true")
    assert run.returncode == 0 and re.search(r"foreground_miou \d", run.stdout), run.stdout + run.stderr
    a, b = (load_tensors(out / RUN / f"snapshot/{name}.safetensors") for name in ("best", "last"))
    assert all(torch.equal(a[key], b[key]) for key in a)  # validation watched and chose nothing
    return out


def test_interrupted_before_rfm_and_after_it_starts(short: list[str], trained: Path, tmp_path: Path) -> None:
    """The same weights, bit for bit; dropout is among what must be restored. How many workers read the data may change."""
    stepwise, stops = [*short, f"Runtime.output={tmp_path}", "Train.save_minutes=0", "Train.watch=true"], []
    for _ in range(2):
        run = program("train", "WeCLIP", *stepwise, code=STOP)
        assert run.returncode == 143, run.stdout + run.stderr
        stops.append(int(re.search(r"saved after iteration (\d+)", run.stderr)[1]))
    assert stops[0] < 3 < stops[1] < 6
    assert program("train", "WeCLIP", *stepwise, "Train.workers=1").returncode == 0
    a, b = (load_tensors(out / RUN / "snapshot/last.safetensors") for out in (trained, tmp_path))
    assert all(torch.equal(a[key], b[key]) for key in a)
    static = program("train", "WeCLIP", *short, f"Runtime.output={tmp_path}/static", "Method.static_steps=100")
    assert static.returncode == 0
    other = load_tensors(tmp_path / "static" / RUN / "snapshot/last.safetensors")
    assert not all(torch.equal(a[key], other[key]) for key in a)  # the switch was on the way


@pytest.mark.slow
def test_rows_of_one_result(short: list[str], trained: Path) -> None:
    given = [*short, f"Runtime.output={trained}", "Test_Finetune.baselines=true"]
    run = program("test", "WeCLIP", *given)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((trained / RUN / "result/report.json").read_text())
    (seed,) = result["seeds"]
    rows = {"single scale", "everything the largest given class", "CAM of the given labels", "refined CAM of the given labels",
            "pseudo label of the given labels", "everything background"}  # fmt: skip
    assert seed["variants"].keys() == rows and result["classes"]["0"] == "background" and len(result["classes"]) == 21
    found = [iou for iou in seed["per_class"].values() if iou is not None]
    assert seed["miou"] == pytest.approx(sum(found) / len(found)) and 0 in map(int, seed["per_class"])
    assert seed["variants"]["CAM of the given labels"]["miou"] > 2 * seed["variants"]["everything background"]["miou"]
    page = (trained / RUN / "result/report.html").read_text()
    assert all(f"mIoU, {name}" in run.stdout and name in page for name in rows)
    words = re.sub(r'data:image[^"]*', "", page)
    assert not re.search("episode|-shot|support", words.split("<main>")[1]) and "seconds per image" in words
    for text in ("Worst confusions", "Why objects fail", "CAM", "pseudo label", "affinity at its peak"):
        assert text in words, text
    assert not re.search("episode|-shot", run.stdout + run.stderr)
    pairs = seed["confused"]
    assert 0 < len(pairs) <= 12 and all(a != b and 0 < share <= 1 for a, b, _, share in pairs)
    file = str(trained / RUN / "result/report.json")
    compared = subprocess.run([sys.executable, "-m", "util.report", "compare", file, file, "--html", f"{trained}/both.html"],
                              cwd=ROOT, text=True, capture_output=True)  # fmt: skip
    assert compared.returncode == 0 and not re.search("episode|-shot", compared.stdout), compared.stdout + compared.stderr
    assert not re.search("episode|-shot", re.sub(r'data:image[^"]*', "", (trained / "both.html").read_text()).split("<main>")[1])
    assert "image-level labels" in run.stdout and "1 seed × 6 images" in run.stdout
    command = [sys.executable, "-m", "model.verify", str(trained / RUN / "result/report.json")]
    again = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert again.returncode == 0 and again.stdout.count("the same, bit for bit") == 2, again.stdout + again.stderr


def test_another_recipe_is_another_checkpoint(short: list[str], trained: Path, tmp_path: Path) -> None:
    run = program("test", "WeCLIP", *short, f"Runtime.output={trained}", "Method.static_steps=4")
    assert run.returncode == 2 and "Method.static_steps: the checkpoint has 3, the config 4" in run.stderr, run.stderr
    names = tmp_path / "names.txt"
    names.write_text((ROOT / "lists/demo/classes.txt").read_text().replace("crown\n", ""))
    weight = trained / RUN / "snapshot/last.safetensors"
    run = program("test", "WeCLIP", *short, f"Data.class_names={names}", "Data.folds=lists/demo/folds.yaml",
                  f"Test_Finetune.weight={weight}")
    assert run.returncode == 2 and re.search("classify.weight is .*21.* expected .*20|no class|not in the class list", run.stderr)


@pytest.mark.slow
def test_a_published_checkpoint_gives_the_same_result(short: list[str], trained: Path, tmp_path: Path) -> None:
    system, _ = open_system("WeCLIP", configure(ROOT / CONFIG, "WeCLIP", short))
    state = load_tensors(trained / RUN / "snapshot/last.safetensors")
    official = {f"module.{system.official_name(f'head.{name}')}": value for name, value in state.items()}
    torch.save(official | {"module.par.kernel": torch.zeros(8, 1, 3, 3)}, tmp_path / "published.pth")
    assert len(state) == len(official)
    given = [*short, f"Runtime.output={tmp_path}", f"Test_Finetune.weight={tmp_path}/published.pth"]
    scores = []
    for weight in (tmp_path / "published.pth", trained / RUN / "snapshot/last.safetensors"):
        run = program("test", "WeCLIP", *given[:-1], f"Test_Finetune.weight={weight}")
        assert run.returncode == 0, run.stdout + run.stderr
        scores.append(json.loads((tmp_path / RUN / "result/report.json").read_text())["seeds"])
    assert scores[0] == scores[1]


def test_clip_es_needs_no_checkpoint_and_writes_labels(few: list[str], scenes: Path, tmp_path: Path) -> None:
    given = [*few, f"Runtime.output={tmp_path}", f"Test_Finetune.maps={tmp_path}/maps"]
    run = program("test", "CLIP_ES", *given)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "demo/CLIP_ES/weak/vit8/result/report.json").read_text())
    assert result["checkpoint"] == "none, nothing is trained" and result["seeds"][0]["variants"].keys() == {"CAM"}
    pairs = read_list(few[3].partition("=")[2])
    for image, label in pairs:
        found, truth = read_label((tmp_path / "maps" / image).with_suffix(".png")), read_label(scenes / label)
        assert found.shape == truth.shape and set(np.unique(found)) <= {0, *np.unique(truth)}
    assert len(list((tmp_path / "maps").rglob("*.png"))) == len(pairs)
    assert Image.open((tmp_path / "maps" / pairs[0][0]).with_suffix(".png")).mode == "L"
    run = program("train", "CLIP_ES", *few)
    assert run.returncode == 2 and "CLIP_ES trains nothing. Test it: `ARCH=CLIP_ES sh test.sh weak demo" in run.stderr
    run = program("test", "CLIP_ES", *given, "Test_Finetune.crf=true")
    if run.returncode:
        assert run.returncode == 2 and "pip install pydensecrf2" in run.stderr
    else:
        assert "mIoU, with CRF" in run.stdout
