"""The sweep: what it runs, in which order, on which GPU; how it goes on; the table. The runs themselves are played."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import sweep
from util.errors import UserError


class Runs:
    """Stands in for subprocess.run: writes the report that test.sh would, and remembers what ran where."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, ...]] = []
        self.devices: list[str | None] = []
        self.broken = ""
        self._lock = threading.Lock()

    def __call__(self, command, *, env, stdout, **_):
        with self._lock:
            self.commands.append(tuple(command[1:5]) + (env["ARCH"],))
            self.devices.append(env.get("CUDA_VISIBLE_DEVICES"))
        values = dict(argument.split("=", 1) for argument in command[5:])
        if self.broken and self.broken in values.get("Method.priors", ""):
            stdout.write("error: it broke\n")
            stdout.flush()
            return subprocess.CompletedProcess(command, 2)
        if command[1] == "test.sh":
            folder = Path(values["Runtime.output"]) / command[3] / env["ARCH"] / command[2] / env["NET"] / "result"
            folder.mkdir(parents=True)
            miou = (int(command[2][-1]) + int(values["Train.manual_seed"]) % 10) / 100
            (folder / "report.json").write_text(json.dumps({"mean": {"miou": miou, "fb_iou": 0.5}}))
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    played = Runs()
    monkeypatch.setattr(sweep.subprocess, "run", played)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return played


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    sweep.main()


def test_cells_order_devices_and_table(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["pascal", "Test_Finetune.protocol=strict", "--systems", "HDMNet", "BAM:vtp,vvp", "--folds", "0", "1", "--shots", "1",
             "5", "--seeds", "321", "323", "--gpus", "2", "--out", str(tmp_path)]  # fmt: skip
    call(monkeypatch, *given)
    assert [c[4] for c in runs.commands[:4]] == ["PSPNet"] * 4  # base learners first
    assert len(runs.commands) == 2 * (2 + 16) and set(runs.devices) == {"0", "1"}
    assert all(c[3] == "1" for c in runs.commands)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| system | shot | fold 0 | fold 1 | mean | FB-IoU |"
    assert lines[2] == "| HDMNet | 1 | 2.00 ± 1.41 | 3.00 ± 1.41 | 2.50 | 50.00 |"
    assert [line.split(" | ")[0:2] for line in lines[4:]] == [["| BAM with vtp + vvp", "1"], ["| BAM with vtp + vvp", "5"]]
    assert r"HDMNet & 1 & 2.00 $\pm$ 1.41" in (tmp_path / "table.tex").read_text()
    call(monkeypatch, *given)  # nothing is done again
    assert len(runs.commands) == 36
    with pytest.raises(UserError, match="other settings"):
        call(monkeypatch, *given, "--net", "resnet101")


def test_a_failed_cell_does_not_stop_the_others(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    runs.broken = "vvp"
    given = ["demo", "--systems", "PFENet:vvp", "PFENet", "--folds", "0", "--out", str(tmp_path)]
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        call(monkeypatch, *given)
    assert "train.sh ended with code 2: error: it broke" in capsys.readouterr().out
    assert "| PFENet with vvp | 1 | – | – | – |" in (tmp_path / "table.md").read_text()
    assert "| PFENet | 1 | 1.00 | 1.00 | 50.00 |" in (tmp_path / "table.md").read_text()
    assert not any(c[4] == "PSPNet" for c in runs.commands)  # PFENet has none
    runs.broken = ""
    call(monkeypatch, *given)
    assert "| PFENet with vvp | 1 | 1.00 | 1.00 | 50.00 |" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(("wrong", "message"), [
    (["demo", "--systems", "PIKLIP"], "unknown system"), (["demo", "--folds", "7"], "no config/demo/demo_split7"),
    (["demo", "epochs=3"], "Section.key=value"), (["demo", "--slurm", "gpus_per_node=1"], "submitit"),
])  # fmt: skip
def test_wrong_input(wrong: list[str], message: str, tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=message):
        call(monkeypatch, *wrong, "--out", str(tmp_path))
    assert not runs.commands


def test_what_trains_nothing_is_tested_alone(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a joined prior has a folder of its own."""
    systems = ["CONTRAST", "PFENet:contrast,naclip", "PFENet:contrast+naclip"]
    call(monkeypatch, "demo", "--systems", *systems, "--folds", "0", "--out", str(tmp_path))
    ran = [(c[0], c[4]) for c in runs.commands]
    assert ran.count(("train.sh", "PFENet")) == ran.count(("test.sh", "PFENet")) == 2
    assert ("test.sh", "CONTRAST") in ran and ("train.sh", "CONTRAST") not in ran
    assert {"own", "contrast+naclip", "contrast-with-naclip"} <= {path.name for path in tmp_path.iterdir()}
