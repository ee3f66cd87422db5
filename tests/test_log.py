"""Where curves go: curves.jsonl, TensorBoard, and Weights & Biases where it is asked for."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from util.errors import UserError
from util.run.log import Ahead, RunLog, tracking


def test_weights_and_biases_gets_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, points = {}, []
    run = SimpleNamespace(log=lambda values, step: points.append((step, values)), finish=lambda: points.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: asked.update(how) or run))
    with tracking("wandb", "PI_CLIP split0 demo", tmp_path, {"Train": {}}) as tracked, RunLog(tmp_path, tracked=tracked) as log:
        log.scalars({"loss": 0.5}, 10, "train")
    assert points == [(10, {"train/loss": 0.5}), "finished"]
    assert asked["name"] == "PI_CLIP split0 demo" and asked["resume"] == "allow"
    assert "loss" in (tmp_path / "curves.jsonl").read_text() and list((tmp_path / "events").iterdir())
    with tracking("wandb", "again", tmp_path, {}):
        assert len(asked["id"]) == 16
    first = asked["id"]
    with tracking("wandb", "another", tmp_path / "b", {}):
        assert asked["id"] != first


def test_trackio_gets_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is known by its name alone: two folders have two names, a run that goes on has its own."""
    asked, points = [], []
    run = SimpleNamespace(log=lambda values, step: points.append((step, values)), finish=lambda: points.append("finished"))
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda **how: asked.append(how) or run))
    for folder in ("a", "b", "a"):
        with tracking("trackio", "PI_CLIP demo", tmp_path / folder, {}) as tracked, RunLog(tmp_path, tracked=tracked) as log:
            log.scalars({"loss": 0.5}, 10, "train")
    assert points == [(10, {"train/loss": 0.5}), "finished"] * 3 and "dir" not in asked[0]
    assert [how["resume"] for how in asked] == ["allow"] * 3 and asked[0]["name"] == asked[2]["name"] != asked[1]["name"]
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="pip install trackio"), tracking("trackio", "x", tmp_path, {}):
        pass


def test_ends_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the epoch, and of all that follows it; a part of unknown length is not hidden."""
    clock = iter(range(0, 10**6, 10))  # ten seconds a step
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with RunLog(tmp_path, quiet=True) as log:
        log.ahead = Ahead("training", 1000, 3600)
        with log.progress(40, "epoch 1/26") as bar:
            bar.step(8)
            assert str(bar).endswith("epoch ends in 6 min, training in 3 h 53 min")
        log.ahead = Ahead("training", 30_000, more=True)
        assert "base classes ends in" not in str(log.progress(3, "base classes"))
        with log.progress(3, "base classes") as bar:
            bar.step()
            assert str(bar).endswith("base classes ends in 20 s, training in more than 3 days 11 h")
        log.ahead = None
        with log.progress(3, "seed 321") as bar:
            bar.step()
            assert str(bar).endswith("img/s  seed ends in 20 s")


def test_nobody_else_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import fails
    with tracking("tensorboard", "x", tmp_path, {}) as tracked:
        assert tracked is None
    with pytest.raises(UserError, match="pip install wandb"), tracking("wandb", "x", tmp_path, {}):
        pass


def test_quiet_keeps_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with RunLog(tmp_path, quiet=True) as log:
        log.info("all is well")
        log.warning("look here")
    assert "all is well" not in capsys.readouterr().out and "all is well" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(("files", "said"), [
    ({"wandb/readme.txt": ""}, "hides the package"),
    ({"wandb.py": "def init(**_):\n    raise RuntimeError('no login')\n"}, "could not start .*no login"),
])  # fmt: skip
def test_a_tracker_that_cannot_start(files: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=f"Runtime.tracker=wandb.*{said}"), tracking("wandb", "name", tmp_path / "run", {}):
        pass
