"""Whose a run's folder is, and on what data the run in it was started."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from util.config import Config
from util.data.folds import ClassNames
from util.data.index import Record
from util.errors import UserError
from util.run import place
from util.run.checkpoint import check_identity
from util.run.identity import sources
from util.run.place import owned

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from pathlib import Path
from util.run.place import owned
with owned(Path(sys.argv[1])):
    print('own', flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_owner_and_a_crash_frees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "WAIT", 0)
    (tmp_path / "snapshot/resume").mkdir(parents=True)
    left = tmp_path / "snapshot/resume/.000000005.pt.a1b2c3d4"
    left.write_text("half")
    (tmp_path / ".gitignore").write_text("*")
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "own\n"
        assert not left.exists() and (tmp_path / ".gitignore").exists()
        with pytest.raises(UserError, match=f"a run is at work in .*process {other.pid} on "), owned(tmp_path):
            pass
        with owned(tmp_path, main=False):  # other processes of a run do not own
            pass
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with owned(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / ".owner").read_text()


def found(root: Path, same_by: str = "time", order: tuple[int, ...] = (0, 1), pixels: int = 9, text: str = "a cat") -> dict:
    config = Config()
    config.Data.data_root, config.Data.same_by = str(root), same_by
    records = [Record(f"{i}.jpg", f"{i}.png", 4, 5, {1: pixels}, (1,)) for i in order]
    return sources(config, records, ClassNames(("cat",), (text,)))


def test_what_a_run_was_started_on(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(bytes([i] * 20))
    before, sized, read = found(tmp_path), found(tmp_path, "size"), found(tmp_path, "content")

    def changed(now: dict, then: dict = before) -> list[str]:
        return [what for what in now if now[what] != then[what]]

    assert changed(found(tmp_path)) == []
    assert changed(found(tmp_path, order=(1, 0)))[:2] == ["the list and its order", "images (Data.same_by=time)"]
    assert changed(found(tmp_path, pixels=8)) == ["the labels"]
    assert changed(found(tmp_path, text="cats")) == ["class names and texts"]
    os.utime(tmp_path / "1.jpg", (1, 1))
    assert changed(found(tmp_path)) == ["images (Data.same_by=time)"]
    assert changed(found(tmp_path, "size"), sized) == [] == changed(found(tmp_path, "content"), read)
    (tmp_path / "1.jpg").write_bytes(bytes([7] * 20))
    assert changed(found(tmp_path, "content"), read) == ["images (Data.same_by=content)"]


def test_going_on_with_other_data_is_refused_and_with_other_code_said(tmp_path: Path) -> None:
    said: list[str] = []
    run = SimpleNamespace(place=SimpleNamespace(snapshot=tmp_path), log=SimpleNamespace(warning=said.append),
                          progress=SimpleNamespace(sources={"the labels": "1", "code": "1"}))  # fmt: skip
    train.check_sources(run, {})  # a point of before this was recorded
    train.check_sources(run, {"the labels": "1", "code": "0"})
    assert len(said) == 1 and "code has changed" in said[0]
    with pytest.raises(UserError, match="other data: the labels changed .*Train.resume=none"):
        train.check_sources(run, {"the labels": "0", "code": "1"})


def test_metadata_without_a_key_does_not_pass() -> None:
    check_identity(Path("a"), {"system": "BAM", "shot": None}, {"system": "BAM", "shot": None})
    with pytest.raises(UserError, match="Train.shot: the checkpoint has None, the config None"):
        check_identity(Path("a"), {"system": "BAM"}, {"system": "BAM", "shot": None})


def test_the_owner_is_the_latest(tmp_path: Path) -> None:
    """The one before is forgotten: a message that names it would send people to a process that has ended."""
    (tmp_path / ".owner").write_text("process 1 on another machine\n")
    with owned(tmp_path):
        assert (tmp_path / ".owner").read_text().split() == ["process", str(os.getpid()), "on", socket.gethostname()]
