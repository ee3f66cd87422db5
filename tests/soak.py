"""`python -m tests.soak [--processes N]`: a training is stopped at random, again and again, and must end with the weights of
one that nobody disturbed. Takes about a quarter of an hour; not part of the tests.

A third of the stops are SIGTERM, a third kill one process with SIGKILL, a third all of them at once; SIGKILLs are counted. A
resume point is written after every iteration, so that many stops fall into a write.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from util.files import load_tensors

ROOT = Path(__file__).parents[1]
PLACE = Path("demo/PFENet/split0/resnet50")


def start(folder: Path, processes: int, epochs: int, minutes: float) -> subprocess.Popen:
    lines = (ROOT / "lists/demo/train.txt").read_text().splitlines()
    (folder / "train.txt").write_text("\n".join(lines[:100]))
    options = [f"Data.train_list={folder}/train.txt", "Train.train_h=65", "Train.val_size=65", "Train.batch_size=4",
               "Train.workers=0", "Train.selection=last", "Runtime.threads=1",
               f"Runtime.processes={processes}", f"Train.epochs={epochs}",
               f"Train.save_minutes={minutes}", f"Runtime.output={folder}"]  # fmt: skip
    around = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ARCH": "PFENet"}
    with (folder / "said.txt").open("a") as log:
        return subprocess.Popen(["sh", "train.sh", "split0", "demo", "0", *options], cwd=ROOT, env=around, stdout=log,
                                stderr=subprocess.STDOUT)  # fmt: skip


def newest(folder: Path) -> str:
    return max((p.stem for p in (folder / PLACE / "snapshot/resume").glob("*.json")), default="")


def stop(run: subprocess.Popen, how: str) -> None:
    """`run` itself is torchrun, whose children are the processes, or the only process."""
    found = subprocess.run(["pgrep", "-P", str(run.pid)], text=True, capture_output=True).stdout
    processes = [int(pid) for pid in found.split()] or [run.pid]
    if how == "SIGTERM":
        run.send_signal(signal.SIGTERM)
    elif how == "one process":
        kill(random.sample(processes, 1))
    else:
        kill([*processes, run.pid])
    try:
        run.wait(timeout=60)
    except subprocess.TimeoutExpired:
        kill([*processes, run.pid])
        raise SystemExit(f"a run did not end within a minute after: {how}") from None


def kill(processes: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    for name in ("calm", "stopped"):
        (folder / name).mkdir()
    if start(folder / "calm", given.processes, given.epochs, 60).wait():
        raise SystemExit(f"the undisturbed run failed, see {folder}/calm/said.txt")

    stops: dict[str, int] = {}
    while True:
        run, before = start(folder / "stopped", given.processes, given.epochs, 0), newest(folder / "stopped")
        while run.poll() is None and newest(folder / "stopped") == before:
            time.sleep(0.02)
        if run.poll() is None and sum(stops.values()) - stops.get("SIGTERM", 0) < given.kills:
            time.sleep(random.uniform(0, 2))
            how = random.choice(["SIGTERM", "one process", "all processes"])
            stop(run, how)
            stops[how] = stops.get(how, 0) + 1
            print(f"{sum(stops.values())}: {how}, resume point {newest(folder / 'stopped')}", flush=True)
        elif run.wait():
            raise SystemExit(f"a run failed by itself, see {folder}/stopped/said.txt")
        else:
            break
    a, b = (load_tensors(folder / name / PLACE / "snapshot/last.safetensors") for name in ("calm", "stopped"))
    same = a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    print(f"{sum(stops.values())} stops {stops}: the final weights are {'the same, bit for bit' if same else 'NOT the same'}")
    if not same:
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
