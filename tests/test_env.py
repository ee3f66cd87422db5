"""env.py and the shell scripts: what a person meets first. Nothing here touches the network."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import types

import pytest

import env

# --- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "oldest", "ok"),
    [
        ("2.15.0", "2.6", True),  # as numbers, not as text
        ("2.6", "2.6.0", True),
        ("2.6.0+cu124", "2.6", True),
        ("2.6.0a0+ecf3bae40a.nv25.1", "2.6", True),
        ("2.5.1", "2.6", False),
        ("1.13.1", "2.6", False),
    ],
)
def test_version_range(version, oldest, ok):
    row = env.check_package("torch", oldest, installed=lambda name: version)
    assert row.ok == ok
    assert version in row.detail


def test_missing_package_says_what_to_do():
    row = env.check_package("no-such-distribution", "1.0")
    assert not row.ok and "not installed" in row.detail and "env.py" in row.remedy


def test_another_opencv_counts():
    def installed(name):
        if name != "opencv-python":
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.10.0.84"

    assert env.check_package("opencv-python-headless", "4.8", installed).ok
    assert not env.check_package("opencv-python-headless", "4.11", installed).ok


def test_pins_lie_within_the_ranges():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (env.ROOT / "requirements.txt").read_text(), re.MULTILINE))
    for group in ("", "test", "prepare", "weights"):
        for name, oldest in env.ranges(group).items():
            assert env.release(pins[name]) >= env.release(oldest), name


# --- .venv ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty repository; `run` only notes the commands, `.fails` names the ones that fail."""
    (tmp_path / "requirements.txt").write_text("torch==1\n")
    seen = types.SimpleNamespace(commands=[], fails=set(), root=tmp_path)

    def run(*command):
        line = " ".join(map(str, command)).replace(sys.executable, "python").replace(str(tmp_path / ".venv"), ".venv")
        seen.commands.append(line)
        if any(name in line for name in seen.fails):
            return False
        if line.startswith(("uv venv", "python -m venv")):
            (tmp_path / ".venv" / "bin").mkdir(parents=True)
            (tmp_path / ".venv" / "bin" / "python").touch()
        return True

    monkeypatch.setattr(env, "ROOT", tmp_path)
    monkeypatch.setattr(env, "run", run)
    monkeypatch.setattr(env, "works", lambda *command: env.venv_python().exists())
    monkeypatch.setattr(env.shutil, "which", lambda name: None)
    return seen


def test_prepare_creates_once_and_follows_the_requirements(fresh):
    env.prepare()
    assert [line.split(" -")[1] for line in fresh.commands] == ["m venv", "m pip install"]

    fresh.commands.clear()
    env.prepare()
    assert fresh.commands == []

    (fresh.root / "requirements.txt").write_text("torch==2\n")
    env.prepare()
    assert len(fresh.commands) == 1 and "pip install -r requirements.txt" in fresh.commands[0]


def test_an_interrupted_preparation_continues(fresh):
    fresh.fails = {"pip install"}
    with pytest.raises(env.EnvError):
        env.prepare()
    assert not env.prepared()

    fresh.fails, fresh.commands = set(), []
    env.prepare()
    assert env.prepared() and not any("venv --clear" in line for line in fresh.commands)


def test_the_size_is_said_before_the_download(fresh, monkeypatch, capsys):
    env.prepare()
    said = capsys.readouterr().err
    assert "3 GB to download" in said and "6 GB of disk" in said
    env.stamp().unlink()
    monkeypatch.setattr(env.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2e9))
    fresh.commands.clear()
    with pytest.raises(env.EnvError, match="2.0 GB free, .venv needs 6"):
        env.prepare()
    assert not fresh.commands


def test_uv_is_used_when_there_and_pip_when_it_fails(fresh, monkeypatch):
    monkeypatch.setattr(env.shutil, "which", lambda name: name)
    env.prepare()
    assert [line.split(" -")[0] for line in fresh.commands] == ["uv venv", "uv pip install"]

    fresh.commands, fresh.fails = [], {"uv "}
    env.stamp().unlink()
    env.prepare()
    assert fresh.commands[-1] == ".venv/bin/python -m pip install -r requirements.txt"


# --- commands -------------------------------------------------------------------------------------------------------


def test_python_prints_the_active_one_and_nothing_else():
    result = subprocess.run([sys.executable, "env.py", "python"], cwd=env.ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == (sys.executable + "\n", "")


def test_installers_leave_stdout_to_the_answer(capfd):
    assert env.run(sys.executable, "-c", "print('Collecting torch')")
    assert capfd.readouterr() == ("", "Collecting torch\n")


def test_usage_errors():
    assert env.main(["chekc"]) == 2
    with pytest.raises(SystemExit) as stop:
        env.main(["check", "Data.shot=5"])  # an override of which config?
    assert stop.value.code == 2


@pytest.mark.parametrize("arguments", [[], ["--arch", "HDMNet", "Data.shot=5"]])
@pytest.mark.parametrize("ok", [True, False])
def test_check_of_a_config(monkeypatch, capsys, ok, arguments):
    asked = []

    def check(config, arch, overrides, full):
        asked.append((config, arch, overrides))
        return [env.Row("Train.clip_path", ok, "initmodel/ViT-B-16.pt", "get it there")]

    monkeypatch.delenv("ARCH", raising=False)
    monkeypatch.setattr(env, "check_config", check)
    assert env.main(["check", "--config", "c.yaml", *arguments]) == (0 if ok else 1)
    assert asked == [("c.yaml", "HDMNet", ["Data.shot=5"]) if arguments else ("c.yaml", "PI_CLIP", [])]
    assert ("get it there" in capsys.readouterr().out) != ok


def test_check_of_a_bad_config(monkeypatch, capsys):
    file = "config/demo/demo_split0_resnet50.yaml"
    assert env.main(["check", "--config", file, "Data.data_rot=x"]) == 1
    assert "did you mean 'data_root'" in capsys.readouterr().out


# --- train.sh, test.sh ----------------------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
case "$1 $2" in
    "-c import sys"*) exit {old} ;;
    "-c import torch"*) echo 2 ;;
    "env.py python") echo "$0" ;;
    *) echo "in $(pwd), GPUs ${{CUDA_VISIBLE_DEVICES-any}}:"; for a; do echo "[$a]"; done; exit 7 ;;
esac
"""


class Scripts:
    """A copy of the scripts beside one config, with a Python and an nvidia-smi that only tell how they were called."""

    def __init__(self, root):
        self.repo, self.bin = root / "my repo", root / "bin"
        for name in ("train.sh", "test.sh", "util/launch.sh"):
            (self.repo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(env.ROOT / name, self.repo / name)
        (self.repo / "config/demo").mkdir(parents=True)
        (self.repo / "config/demo/demo_split0_resnet50.yaml").touch()
        self.bin.mkdir()
        self.fake("nvidia-smi", "#!/bin/sh\nexit 9\n")
        for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
            self.fake(name, PYTHON.format(old=1))
        self.fake("python3.12", PYTHON.format(old=0))

    def fake(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def __call__(self, script, *arguments, **variables):
        inherited = {k: v for k, v in os.environ.items() if k not in ("ARCH", "NET", "CUDA_VISIBLE_DEVICES")}
        path = f"{self.bin}:{os.environ['PATH']}"
        return subprocess.run(["sh", self.repo / script, *arguments], cwd=self.bin, capture_output=True, text=True,
                              env=inherited | {"PATH": path} | variables)

    def called(self, *arguments, **variables):
        """The environment line and the arguments that Python got."""
        result = self("train.sh", *arguments, **variables)
        assert result.returncode == 7, result.stderr  # Python's own exit code comes through
        first, *rest = result.stdout.splitlines()
        assert first.startswith("train.sh: ") and "python3.12 " in first
        return rest[0], [line[1:-1] for line in rest[1:]]


@pytest.fixture
def scripts(tmp_path):
    return Scripts(tmp_path)


TRAIN = ["train.py", "--config", "config/demo/demo_split0_resnet50.yaml", "--arch", "PI_CLIP", "--gpus"]


def test_cpu(scripts):
    where, arguments = scripts.called("split0", "demo", "0", "Data.data_root=a b", "Train.epochs=1")
    assert where == f"in {scripts.repo}, GPUs :"
    assert arguments == [*TRAIN, "0", "Data.data_root=a b", "Train.epochs=1"]


def test_one_gpu(scripts):
    where, arguments = scripts.called("split0", "demo", "1")
    assert where.endswith("GPUs any:") and arguments == [*TRAIN, "1"]


def test_several_gpus_go_through_torchrun(scripts):
    where, arguments = scripts.called("split0", "demo", "2", "Train.epochs=1")
    assert where.endswith("GPUs any:")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=0"]
    assert arguments == [*torchrun, *TRAIN, "2", "Train.epochs=1"]


def test_gpus_left_out(scripts):
    assert scripts.called("split0", "demo", "Train.epochs=1")[1] == [*TRAIN, "0", "Train.epochs=1"]
    scripts.fake("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n")
    assert scripts.called("split0", "demo")[1] == [*TRAIN, "1"]


def test_arch_and_net(scripts):
    (scripts.repo / "config/demo/demo_split3_vgg.yaml").touch()
    arguments = scripts.called("split3", "demo", "0", ARCH="HDMNet", NET="vgg")[1]
    assert arguments[1:5] == ["--config", "config/demo/demo_split3_vgg.yaml", "--arch", "HDMNet"]


def test_test_sh_takes_the_same_arguments(scripts):
    result = scripts("test.sh", "split0", "demo", "0")
    assert result.stdout.startswith("test.sh: ")
    assert [line[1:-1] for line in result.stdout.splitlines()[2:]] == ["test.py", *TRAIN[1:], "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: "),
        (["--help"], "usage: "),
        (["split0"], "usage: "),
        (["split7", "demo", "0"], "no experiment 'split7', did you mean split0? There are: split0"),
        (["split0", "dmeo", "0"], "unknown data set 'dmeo', did you mean demo? There are: demo"),
        (["split0", "demo", "two"], "GPUS must be a number, not 'two'"),
        (["split0", "demo", "-1"], "GPUS must be a number, not '-1'"),
        (["split0", "demo", "0", "1"], "'1' is not of the form Section.key=value"),
        (["split0", "demo", "0", "epochs=1"], "'epochs=1' is not of the form Section.key=value"),
        (["split0", "demo", "3"], "asked for 3 GPUs, torch sees 2"),
    ],
)
def test_wrong_arguments(scripts, arguments, message):
    result = scripts("train.sh", *arguments)
    assert result.returncode == 2
    assert message in result.stderr and result.stdout == ""


def test_no_python_is_new_enough(scripts):
    scripts.fake("python3.12", PYTHON.format(old=1))
    result = scripts("train.sh", "split0", "demo", "0")
    assert result.returncode == 2 and "needs Python 3.11" in result.stderr
