"""Where curves go: curves.jsonl, TensorBoard, and Weights & Biases where it is asked for."""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from util.errors import UserError
from util.run.log import RunLog, tracking


def test_weights_and_biases_gets_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, points = {}, []
    run = SimpleNamespace(log=lambda values, step: points.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **how: asked.update(how) or nullcontext(run)))
    with tracking("wandb", "PI_CLIP split0 demo", tmp_path, {"Train": {}}) as tracked, RunLog(tmp_path, tracked=tracked) as log:
        log.scalars({"loss": 0.5}, 10, "train")
    assert points == [(10, {"train/loss": 0.5})] and asked["name"] == "PI_CLIP split0 demo" and asked["resume"] == "allow"
    assert "loss" in (tmp_path / "curves.jsonl").read_text() and list((tmp_path / "events").iterdir())
    with tracking("wandb", "again", tmp_path, {}):
        assert len(asked["id"]) == 16
    first = asked["id"]
    with tracking("wandb", "another", tmp_path / "b", {}):
        assert asked["id"] != first


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
