"""The whole job through the shell scripts, on a reduced demo; and what the user sees when something is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from util.files import load_tensors

ROOT = Path(__file__).parents[1]
SMALL = ["Train.train_h=65", "Train.val_size=65", "Train.val_episodes=12", "Train.epochs=1", "Train.batch_size=8",
         "Train.workers=0", "Runtime.threads=2"]  # fmt: skip


def sh(script: str, *arguments: str, arch: str = "PI_CLIP", exp: str = "split0") -> subprocess.CompletedProcess:
    """Runs a script as a user does, with this interpreter first on the PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(["sh", script, exp, "demo", "0", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=600,
                          env=os.environ | {"PATH": path, "ARCH": arch})  # fmt: skip


def says(run: subprocess.CompletedProcess, *messages: str) -> None:
    """Exit code 2, the messages on stderr, and no traceback."""
    assert run.returncode == 2, run.stdout + run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    for message in messages:
        assert re.search(message, run.stderr), f"{message!r} not in {run.stderr}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that put the run in a temporary folder, on 160 training scenes."""
    folder = tmp_path_factory.mktemp("demo")
    lines = (ROOT / "lists/demo/train.txt").read_text().splitlines()
    (folder / "train.txt").write_text("\n".join(lines[:200]))
    return [f"Data.train_list={folder}/train.txt", "Data.data_root=data/demo", f"Runtime.output={folder}/exp"]


@pytest.fixture(scope="module")
def trained(world: list[str]) -> Path:
    """Base learner and PI-CLIP of fold 0, trained for one short epoch each; the folder of PI-CLIP's run."""
    for arch in ("PSPNet", "PI_CLIP"):
        run = sh("train.sh", *world, *SMALL, arch=arch)
        assert run.returncode == 0, run.stdout + run.stderr
    return Path(world[-1].partition("=")[2]) / "demo/PI_CLIP/split0/resnet50"


def test_train_then_test(world: list[str], trained: Path) -> None:
    assert (trained / "config.yaml").is_file() and (trained / "train.log").stat().st_size
    assert list((trained / "events").iterdir())
    run = sh("test.sh", *world, *SMALL, "Test_Finetune.test_num=20", "Test_Finetune.seeds=[1,2]")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((trained / "result/report.json").read_text())
    assert [seed["seed"] for seed in report["seeds"]] == [1, 2]
    assert set(report["classes"]) == {"1", "2", "3", "4", "5"} == set(report["seeds"][0]["per_class"])
    # Too short a training to ask for a score: the background half of FB-IoU shows that the counts are real.
    assert 0.2 < report["mean"]["fb_iou"] < 1 and {"miou", "meta_miou"} <= set(report["mean"])
    assert report["baselines"]["everything foreground"]["miou"] > 0
    page = (trained / "result/report.html").read_text()
    assert "VTP" in page and "VVP" in page and "src=\"http" not in page
    assert (trained / "result/gallery.png").stat().st_size > 10_000

    # the same numbers again at another batch size and with workers
    again = sh("test.sh", *world, *SMALL, "Test_Finetune.test_num=20", "Test_Finetune.seeds=[1,2]", "Train.batch_size_val=3",
               "Train.workers=2")  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    repeated = json.loads((trained / "result/report.json").read_text())
    for a, b in zip(report["seeds"], repeated["seeds"], strict=True):
        assert a["miou"] == pytest.approx(b["miou"], abs=2e-3)  # other batches round otherwise: a pixel may flip
        assert a["episodes_per_class"] == b["episodes_per_class"]


@pytest.mark.slow
def test_a_result_can_be_verified(world: list[str], trained: Path, tmp_path: Path) -> None:
    run = sh("test.sh", *world, *SMALL, "Test_Finetune.test_num=12", "Test_Finetune.seeds=[1]", "Test_Finetune.leak_free=false")
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((trained / "result/report.json").read_text())
    assert {"code", "config", "data", "clip", "base_learner", "weights", "torch", "hardware"} <= result["environment"].keys()

    def verify(file: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "model.verify", str(file)]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)

    run = verify(trained / "result/report.json")
    assert run.returncode == 0 and run.stdout.count("the same, bit for bit") == 2, run.stdout + run.stderr
    result["traces"]["1"][1]["prior"]["vvp"][:] = "0", result["traces"]["1"][1]["prior"]["vvp"][1] * 1.1
    (tmp_path / "other.json").write_text(json.dumps(result))
    run = verify(tmp_path / "other.json")
    assert run.returncode == 1 and "episode 0: the same" in run.stdout and "first difference in prior: vvp" in run.stdout
    (tmp_path / "other.json").write_text("{}")
    says(verify(tmp_path / "other.json"), "has no traces")


@pytest.mark.slow
def test_protocols_and_episode_files(world: list[str], trained: Path, tmp_path: Path) -> None:
    """The paper's row stands beside the one without leaks; `strict` takes the last epoch; a file of episodes gives the
    numbers of the episodes it was made from."""
    few = [*world, *SMALL, "Test_Finetune.test_num=12", "Test_Finetune.seeds=[1]"]
    reports = []
    for more in ([], ["Test_Finetune.protocol=strict"]):
        run = sh("test.sh", *few, *more)
        assert run.returncode == 0, run.stdout + run.stderr
        reports.append(json.loads((trained / "result/report.json").read_text()))
    paper, strict = reports
    assert paper["protocol"]["name"].startswith("piclip-paper but Test_Finetune.test_num=12, ")
    assert paper["checkpoint"].endswith("best.safetensors") and strict["checkpoint"].endswith("last.safetensors")
    assert paper["leak_free"]["mean"] == strict["mean"] and "leak_free" not in strict
    assert paper["protocol_hash"] != strict["protocol_hash"] and paper["episodes"]["hash"] == strict["episodes"]["hash"]
    low, high = strict["interval"]["miou"]
    assert low <= strict["mean"]["miou"] <= high

    file = tmp_path / "episodes.txt"
    config = ["--config", "config/demo/demo_split0_resnet50.yaml"]
    made = subprocess.run([sys.executable, "-m", "util.data", "export", *config, "--out", str(file), *few], cwd=ROOT)
    assert made.returncode == 0
    run = sh("test.sh", *few, "Test_Finetune.protocol=strict", f"--episodes={file}")
    assert run.returncode == 0, run.stdout + run.stderr
    again = json.loads((trained / "result/report.json").read_text())
    assert again["episodes"] == strict["episodes"] and str(file) in again["protocol"]["name"]
    file.write_text(file.read_text().replace("JPEGImages", "Images", 1))
    says(sh("test.sh", *few, f"--episodes={file}"), r"episodes\.txt:\d+: the image Images/.* is not in Data.val_list")


KILL = """
import os, signal, sys
import train, util.run.checkpoint as c
calls = [0]
def stop(path, value, f=c.save_json):
    calls[0] += 1
    if calls[0] == {call}:
        os.kill(os.getpid(), signal.{signal})
    f(path, value)
c.save_json = stop
train.cli.run(train.main)
"""


def test_rerun_continues_bit_for_bit(world: list[str], trained: Path, tmp_path: Path) -> None:
    """Two epochs in one go equal a run that is killed while it writes a checkpoint in the middle of an epoch, then terminated,
    then finds its newest checkpoint damaged."""
    common = [*world[:-1], *SMALL, "Train.epochs=2", "Train.selection=last", "Train.save_minutes=0", "Train.print_freq=1",
              f"Method.pre_weight={trained.parents[2] / 'PSPNet/split0/resnet50/snapshot/best.safetensors'}"]  # fmt: skip
    assert sh("train.sh", *common, f"Runtime.output={tmp_path}/a", "Train.save_minutes=60", arch="HDMNet").returncode == 0
    broken = [*common, f"Runtime.output={tmp_path}/b"]
    given = ["--config", "config/demo/demo_split0_resnet50.yaml", "--arch", "HDMNet", "--gpus", "0", *broken]

    def stopped(signal: str, call: int) -> subprocess.CompletedProcess:
        code = KILL.format(signal=signal, call=call)
        return subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, text=True, capture_output=True, timeout=600)

    assert stopped("SIGKILL", 5).returncode == -9
    points = tmp_path / "b/demo/HDMNet/split0/resnet50/snapshot/resume"
    assert sorted(p.name for p in points.glob("*.json")) == ["000000003.json", "000000004.json"]  # 5 has no manifest
    run = stopped("SIGTERM", 3)
    assert run.returncode == 143 and "saved after iteration" in run.stderr, run.stderr
    assert "0 of 2 epochs and 4 iterations are done" in run.stdout
    newest = max(points.glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    again = sh("train.sh", *broken, arch="HDMNet")
    assert again.returncode == 0 and "is damaged" in again.stdout and "the one before is used" in again.stdout, again.stdout
    assert len(list(points.iterdir())) == 6  # two points of three files, and nothing half written
    a, b = (load_tensors(tmp_path / name / "demo/HDMNet/split0/resnet50/snapshot/last.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = ((tmp_path / name / "demo/HDMNet/split0/resnet50/curves.jsonl").read_text() for name in "ab")
    assert a == b and a.count('"train"') == 30  # no point twice, none missing
    says(sh("train.sh", *broken, "Train.base_lr=0.1", arch="HDMNet"), r"Train\.base_lr was 0\.0", "Train.resume=none")
    assert "nothing is left" in sh("train.sh", *broken, arch="HDMNet").stdout
    for manifest in points.glob("*.json"):
        manifest.write_text("{")
    says(sh("train.sh", *broken, arch="HDMNet"), "resume point .* is damaged", "Train.resume=none")


def test_dry_run_writes_nothing(world: list[str], trained: Path, tmp_path: Path) -> None:
    base = f"Method.pre_weight={trained.parents[2] / 'PSPNet/split0/resnet50/snapshot/best.safetensors'}"
    run = sh("train.sh", *world[:-1], *SMALL, base, f"Runtime.output={tmp_path}", "--dry-run", arch="HDMNet")
    assert run.returncode == 0 and "nothing is written" in run.stdout, run.stdout + run.stderr
    for told in (r"steps +\d+ an epoch, 1 epochs; 8 samples", r"time +0:\d\d:\d\d = \d+ steps"):
        assert re.search(told, run.stdout), run.stdout
    run = sh("train.sh", *world[:-1], *SMALL, f"Runtime.output={tmp_path}", "--dry-run", arch="HDMNet")  # no base learner yet
    assert re.findall(r"^(\w+) on demo", run.stdout, re.MULTILINE) == ["PSPNet", "HDMNet"], run.stdout + run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_poisoned_loss_leaves_its_batch(world: list[str], trained: Path, tmp_path: Path) -> None:
    base = f"Method.pre_weight={trained.parents[2] / 'PSPNet/split0/resnet50/snapshot/best.safetensors'}"
    run = sh("train.sh", *world[:-1], *SMALL, base, f"Runtime.output={tmp_path}", "Train.base_lr=1e30", arch="HDMNet")
    says(run, r"the loss is not finite at iteration \d+ \(main nan", r"bad_batch0\.safetensors")
    kept = load_tensors(tmp_path / "demo/HDMNet/split0/resnet50/bad_batch0.safetensors")
    assert kept["query"].shape == (8, 3, 65, 65) and any(name.startswith("weights.matcher") for name in kept)


@pytest.mark.slow
def test_full_disk_keeps_the_last_checkpoint(world: list[str], trained: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk."""
    code = ("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)); import train; train.cli.run(train.main)")
    base = f"Method.pre_weight={trained.parents[2] / 'PSPNet/split0/resnet50/snapshot/best.safetensors'}"
    given = ["--config", "config/demo/demo_split0_resnet50.yaml", "--arch", "HDMNet", "--gpus", "0", *world[:-1], *SMALL, base,
             f"Runtime.output={tmp_path}"]  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, text=True, capture_output=True, timeout=600)
    says(run, "could not be written", "Is the disk full")
    assert not [p for p in (tmp_path / "demo/HDMNet/split0/resnet50/snapshot").rglob("*") if p.is_file()]


@pytest.mark.slow
def test_checkpoint_of_something_else(world: list[str], trained: Path) -> None:
    says(sh("test.sh", *world, *SMALL, arch="HDMNet"), "no checkpoint", "ARCH=HDMNet")
    weight = f"Test_Finetune.weight={trained / 'snapshot/best.safetensors'}"
    says(sh("test.sh", *world, *SMALL, weight, "Train.shot=5"), "Train.shot: the checkpoint has 1, the config 5")
    says(sh("test.sh", *world, *SMALL, weight, "Train.split=1", "Method.priors=[vvp]"), "Train.split", "Method.priors")
    says(sh("test.sh", *world, *SMALL, weight, arch="HDMNet"), "ARCH: the checkpoint has 'PI_CLIP'")
    says(sh("test.sh", *world, *SMALL, weight, "CLIP.clip_path=random"), "trained with other frozen weights: clip")
    other = trained / "other.pth"
    torch.save({"layer0.0.weight": torch.zeros(64, 3, 3, 3)}, other)
    says(sh("test.sh", *world, *SMALL, f"Test_Finetune.weight={other}"), "does not fit this model, nothing was loaded")
    torch.save({"f": print}, other)
    says(sh("test.sh", *world, *SMALL, f"Test_Finetune.weight={other}"), "not opened")
    truncated = trained / "truncated.safetensors"
    truncated.write_bytes((trained / "snapshot/best.safetensors").read_bytes()[:5000])
    says(sh("test.sh", *world, *SMALL, f"Test_Finetune.weight={truncated}"), "damaged")


@pytest.mark.parametrize(("overrides", "messages"), [
    (["Data.train_list=nowhere.txt"], ["train_list", r"nowhere\.txt"]),
    (["Data.class_names=lists/coco/classes.txt"], ["Data.class_names", "no folds.yaml beside it"]),
    (["CLIP.clip_path=nowhere/ViT-B-16.pt"], ["CLIP.clip_path", r"nowhere/ViT-B-16\.pt", "sha256"]),
    (["Method.pre_weight=nowhere.pth"], ["Method.pre_weight", r"nowhere\.pth", "ARCH=PSPNet"]),
    (["Train.split=7"], ["Train.split", "split0 to split3"]),
    (["Train.shot=900"], ["900-shot", "class"]),
    (["Train.batch_size=100000"], ["Train.batch_size"]),
    (["Train.epoch=1"], ["did you mean 'epochs'"]),
    (["Test_Finetune.protocol=strickt"], ["Test_Finetune.protocol", "did you mean strict", "piclip-paper"]),
    (["Method.priors=[vtp,magic]"], ["Method.priors", "magic", "cosine"]),
])  # fmt: skip
def test_wrong_input(world: list[str], trained: Path, overrides: list[str], messages: list[str]) -> None:
    says(sh("train.sh", *world, *SMALL, *overrides), *messages)


@pytest.mark.slow
def test_wrong_labels(world: list[str], trained: Path, tmp_path: Path) -> None:
    """A label of another size, then one with a class that does not exist, are named with their file."""
    from PIL import Image

    lines = (ROOT / "lists/demo/train.txt").read_text().splitlines()[:60]
    for line in lines:
        for part in line.split():
            (tmp_path / part).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / "data/demo" / part, tmp_path / part)
    (tmp_path / "train.txt").write_text("\n".join(lines))
    bad = tmp_path / lines[7].split()[1]
    options = [*world[2:], *SMALL, f"Data.data_root={tmp_path}", f"Data.train_list={tmp_path}/train.txt",
               f"Data.val_list={tmp_path}/train.txt", "Train.data_set=pascal"]  # fmt: skip
    Image.new("L", (10, 10)).save(bad)
    says(sh("train.sh", *options, arch="PSPNet"), "differ in size", bad.name)
    with Image.open(tmp_path / lines[7].split()[0]) as image:
        Image.new("L", image.size, 99).save(bad)
    says(sh("train.sh", *options, arch="PSPNet"), bad.name, "99")
    says(sh("train.sh", *options, "Data.data_root=nowhere", arch="PSPNet"), r"Data\.data_root", "nowhere")
    (tmp_path / "train.txt").write_text("\n".join([*lines[:3], "only/one/path.jpg"]))
    says(sh("train.sh", *options, arch="PSPNet"), r"train\.txt:4")


def test_scripts_name_what_exists() -> None:
    says(sh("train.sh", exp="split9"), "demo has no experiment 'split9', did you mean split0", "split3")
    says(sh("train.sh", arch="PICLIP"), "unknown system ARCH", "PICLIP", "PI_CLIP")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for gpus in ("1", "64"):
        run = subprocess.run(["sh", "train.sh", "split0", "demo", gpus], cwd=ROOT, text=True, capture_output=True,
                             env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
        says(run, gpus)
