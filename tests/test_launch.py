"""torchrun through train.sh, on the CPU: two machines (both this one), and a process that dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from util.run.checkpoint import load_resume

ROOT = Path(__file__).parents[1]
PFENET = Path("demo/PFENet/split0/resnet50")  # needs no base learner


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    lines = (ROOT / "lists/demo/train.txt").read_text().splitlines()
    (tmp_path / "train.txt").write_text("\n".join(lines[:100]))
    return [f"Data.train_list={tmp_path}/train.txt", "Train.train_h=65", "Train.val_size=65", "Train.batch_size=4",
            "Train.workers=0", "Train.selection=last", "Runtime.threads=1", "Runtime.processes=2"]  # fmt: skip


def launch(*overrides: str, **environment: str) -> subprocess.Popen:
    around = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ARCH": "PFENet"} | environment
    return subprocess.Popen(["sh", "train.sh", "split0", "demo", "0", *overrides], cwd=ROOT, env=around, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


@pytest.mark.slow
def test_two_machines_train_one_model(tmp_path: Path, options: list[str]) -> None:
    """Each machine has its own folder; only process 0 writes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [launch(*options, "Runtime.processes=1", "Train.epochs=1", f"Runtime.output={tmp_path}/{rank}", NODE_RANK=str(rank),
                    **meet) for rank in (0, 1)]  # fmt: skip
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "2 process(es) on cpu" in said[0]
    assert (tmp_path / "0" / PFENET / "snapshot/last.safetensors").is_file()
    assert not (tmp_path / "1" / PFENET / "snapshot").exists()


def test_a_process_that_dies_ends_the_run(tmp_path: Path, options: list[str]) -> None:
    """The other one is not left waiting, and the same command goes on from the last resume point."""
    place = tmp_path / PFENET
    run = launch(*options, "Train.epochs=50", "Train.save_minutes=0", f"Runtime.output={tmp_path}")
    try:
        for _ in range(1200):
            if list(place.glob("snapshot/resume/*.json")) or run.poll() is not None:
                break
            time.sleep(0.1)
        found = subprocess.run(["pgrep", "-f", f"train.py .*Runtime.output={tmp_path}$"], text=True, capture_output=True).stdout
        ranks = [pid for pid in map(int, found.split()) if (env(pid).get("RANK"), env(pid).get("WORLD_SIZE")) == ("1", "2")]
        assert len(ranks) == 1, (found, run.poll())
        os.kill(ranks[0], signal.SIGKILL)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 1 and "SIGKILL" in said, said
    step = load_resume(place / "snapshot")[2]["progress"]["step"]
    assert step > 0
    again = launch(*options, "Train.epochs=50", "Train.save_minutes=0", f"Runtime.output={tmp_path}")
    for line in again.stdout:
        if "of 50 epochs" in line:
            break
    again.send_signal(signal.SIGTERM)
    assert again.wait(timeout=60) != 0
    assert f"0 of 50 epochs and {step} iterations are done" in line, line


def env(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
