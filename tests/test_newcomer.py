"""What a newcomer does first: --help, typing mistakes, Ctrl-C, a first training. Nothing happens unasked, and words are plain."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import test as tester
import train
from demo import world
from model import SYSTEMS, configure, early
from model.backbone import build_encoder
from model.predict.arguments import use_threads
from util import cli
from util.errors import UserError
from util.photos.reading import Photo, box_mask

ROOT = Path(__file__).parents[1]
DEMO = "config/demo/demo_split0_resnet50.yaml"


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("module", ["demo.train_backbone", "model.backbone.lite0"])
def test_help_does_nothing(module: str, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-m", module, "--help"], cwd=tmp_path, text=True, capture_output=True, timeout=60,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert run.returncode == 0 and "usage" in run.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "said"), [
    (["Train.epoch=3"], "unknown key Train.epoch; did you mean 'epochs'"),
    (["Method.widht=3"], "Method.widht; did you mean width"), (["Train.epochs=abc"], "Train.epochs = 'abc': expected int"),
    (["Train.split=9"], "unknown fold 9"), (["--arch", "PICLIP"], "did you mean PI_CLIP"),
    (["--config", DEMO.replace("resnet50", "resnet5")], "did you mean demo_split0_resnet50"),
    (["--config", DEMO.replace("demo/", "dem/")], "did you mean demo"), (["--help"], "usage"),
])  # fmt: skip
def test_mistakes_are_answered_without_torch(words: list[str], said: str, capfd: pytest.CaptureFixture) -> None:
    """By both programs, in a second: importing torch takes several."""
    for program in ("train", "test"):
        run = without_torch(f"{program}.py", ["--config", DEMO, "--arch", "PI_CLIP", *words])
        assert run.returncode == (0 if said == "usage" else 2) and said in run.stdout + run.stderr, run.stderr


@pytest.mark.parametrize(("words", "said"), [
    (["--help"], "usage"), ([], "--query"), (["--query", "a.jpg", "--every", "0"], "--every 0: must be at least 1"),
    (["--query", "a.jpg", "--clip"], "give a text"), (["--mask", "a.png", "--query", "b.jpg"], "give its --support first"),
])  # fmt: skip
def test_predict_answers_without_torch(words: list[str], said: str) -> None:
    run = without_torch("predict.py", words)
    assert run.returncode == (0 if said == "usage" else 2) and said in run.stdout + run.stderr, run.stderr


def without_torch(program: str, words: list[str]) -> subprocess.CompletedProcess:
    """Run a program where torch cannot be imported."""
    code = ("import runpy, sys; sys.modules['torch.nn'] = None\n"
            f"sys.argv = {[program, *words]}\nrunpy.run_path('{program}', run_name='__main__')")  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(("config", "arch"), [("voc/voc_weak", "WeCLIP"), ("coco/coco_weak", "CLIP_ES"),
                                             ("voc/voc_voc21", "NACLIP")])  # fmt: skip
def test_early_asks_no_folds_of_systems_without(config: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", f"config/{config}_vitb16.yaml", "--arch", arch])
    early.check("", episodes=False, plan=False)


def test_early_knows_what_the_systems_have() -> None:
    assert early.systems() == [*SYSTEMS]
    assert early.options() == sorted({field.name for cls in SYSTEMS.values() for field in dataclasses.fields(cls.Options)})


def test_scripts_suggest(tmp_path: Path) -> None:
    for words, said in ((["split0", "paskal"], "did you mean pascal?"), (["split9", "demo"], "did you mean split"),
                        (["split0", "demo"], "NET = resnet50")):  # fmt: skip
        run = subprocess.run(["sh", "train.sh", *words], text=True, capture_output=True, env=os.environ | {"NET": "resnet5"})
        assert run.returncode == 2 and said in run.stderr and "base.yaml" not in run.stderr


def test_overrides_that_do_not_reach_the_base_learner() -> None:
    overrides = ["Train.epochs=1", "Train.workers=0", "Runtime.threads=1"]
    config = configure(DEMO, "PI_CLIP", overrides)
    recipe = train.recipe_of("PSPNet", config, DEMO)
    assert recipe.Train.workers == 0 and recipe.Runtime.threads == 1
    assert recipe.Train.epochs > 1
    assert train.only_second(overrides, config, recipe) == [f"Train.epochs=1 (there {recipe.Train.epochs})"]


def test_ctrl_c_speaks_of_what_was_stopped(capsys: pytest.CaptureFixture) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    for after, said in (("", "interrupted\n"), ("it goes on", "interrupted; it goes on\n")):
        with pytest.raises(SystemExit) as code:
            cli.run(stopped, after)
        assert code.value.code == 130 and capsys.readouterr().err.endswith(said)


def test_threads_are_those_of_free_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr("torch.set_num_threads", used.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    for load in (0.2, 11.8, 40.0):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0, 0))
        use_threads(None)
    use_threads(5)
    assert used == [16, 4, 1, 5]
    with pytest.raises(UserError, match="--threads 0"):
        use_threads(0)


def test_boxes_in_fractions() -> None:
    photo = Photo(np.zeros((200, 400, 3), np.uint8), "a.jpg")
    with pytest.raises(UserError, match=r"fractions of its sides; give pixels, here 40,50,200,180"):
        box_mask([(0.1, 0.25, 0.5, 0.9)], photo)


def test_priors_at_their_best_threshold_are_marked() -> None:
    trivial = {"baselines": {"everything foreground": {"miou": 0.1}}}
    seeds = [trivial | {"prior_quality": {"vtp": [0.1] * 7 + [best, 0.2]}} for best in (0.3, 0.4)]
    assert tester.baselines(seeds)["VTP > 0.8, chosen on this test"] == {"miou": pytest.approx(0.35)}
    assert tester.baselines([{"prior_quality": {"vtp": [0.1] * 9}}]) == {}


def test_drawing_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(world, "TRAIN", range(2))
    monkeypatch.setattr(world, "VAL", range(2, 3))
    world.ensure(tmp_path / "demo", workers=1)
    assert "drawing the demo's 3 scenes" in capsys.readouterr().err
    world.ensure(tmp_path / "demo", workers=1)  # they are there
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "sam2_hiera_tiny", "xception41"])
def test_encoders_that_do_not_fit(name: str) -> None:
    with pytest.raises(UserError, match=r"which interface to write"):
        build_encoder(f"timm:{name}")


def test_a_config_of_another_system_is_said_to_be_one() -> None:
    with pytest.raises(UserError, match=r"unknown key Method\.\w+.*It is a key of .*WeCLIP.*: did you mean ARCH=WeCLIP\?"):
        configure("config/demo/demo_weak_vit8.yaml", "PI_CLIP")
