"""A data set of one's own (test_custom.py) to the end: base learner, PI-CLIP, report; and folds that change on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.make.folders import NAMES, REPO, write_own
from util.prepare.custom.__main__ import main

RUN = """
import sys, test, train
from pathlib import Path
from util.errors import UserError

def run(module, arch):
    sys.argv = ["", "--config", "config/mine/mine_split1_resnet50.yaml", "--arch", arch, *overrides]
    module.main()

overrides = sys.argv[1:]
for module, arch in ((train, "PSPNet"), (train, "PI_CLIP"), (test, "PI_CLIP")):
    run(module, arch)
Path("lists/mine/folds.yaml").write_text("split0: [tree, house]\\nsplit1: [star, fish]\\n")
for module, arch in ((test, "PI_CLIP"), (train, "PSPNet")):
    try:
        run(module, arch)
    except UserError as error:
        print(f"REFUSED {error}")
"""


@pytest.mark.slow
def test_train_and_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base learner and PI-CLIP with random weights, the class names through the demo's CLIP; then the folds are changed."""
    write_own(tmp_path / "own")
    (tmp_path / "own/classes.txt").write_text("\n".join(NAMES))
    monkeypatch.chdir(tmp_path)
    main(["mine", "--from", "own", "--min-pixels", "200", "--folds", "2"])
    tiny = [f"CLIP.clip_path={REPO}/demo/clip", "Method.width=8", "Method.backbone_weight=none", "Train.train_h=65",
            "Train.val_size=65", "Train.epochs=1", "Train.workers=0", "Train.val_episodes=8", "Runtime.threads=1",
            "Test_Finetune.test_num=12", "Test_Finetune.seeds=[1]", "Test_Finetune.leak_free=false"]  # fmt: skip
    code = f"import sys; sys.path.insert(0, {str(REPO)!r})\n{RUN}"
    done = subprocess.run([sys.executable, "-c", code, *tiny], text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(Path("exp/mine/PI_CLIP/split1/resnet50/result/report.json").read_text())
    assert report["classes"] == {"3": "tree", "4": "house"} and report["data_set"] == "mine"
    assert report["protocol"]["name"].startswith("piclip-paper but Data.min_pixels=200, Test_Finetune.test_num=12")
    assert set(report["seeds"][0]["episodes_per_class"]) == {"3", "4"}
    refused = done.stdout.split("REFUSED ")[1:]
    assert len(refused) == 2, done.stdout
    for message in refused:
        assert "Data.folds, novel classes: the checkpoint has ['tree', 'house'], the config ['star', 'fish']" in message
