"""The environment doctor: prepares `.venv`, says what is missing and how to get it.

    python env.py                                      prepare .venv from requirements.txt (a second call is instant)
    python env.py check [--config FILE] [--full] [--arch ARCH] [Section.key=value ...]
                                                       what is there: Python, packages, GPUs, weights, data;
                                                       exit 1 when the packages or the named config cannot run
    python env.py test [pytest arguments]              run the tests
    python env.py python                               print the Python that satisfies the requirements

Runs before anything is installed, so it imports the standard library only. An environment satisfies the requirements
when its packages lie within the ranges of pyproject.toml; requirements.txt pins one set of versions that does.
"""

# ruff: noqa: E402 (an old Python must hear the reason before it meets an import or annotation it does not know)

import sys

OLDEST_PYTHON = (3, 11)
if sys.version_info < OLDEST_PYTHON:
    sys.exit(f"env.py: needs Python >= 3.11, {sys.executable} is {sys.version.split()[0]}; try python3.11 env.py")

import argparse
import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import tomllib
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SAME_MODULE = {  # distributions that bring the same module
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
}

DOWNLOAD, DISK = 3, 6  # GB of requirements.txt, rounded: torch with CUDA is 5 of the 6

Row = namedtuple("Row", "what ok detail remedy")  # one line of the table; same fields as util.run.preflight.Finding


class EnvError(Exception):
    """Something the user has to mend; the message says what."""


# --- versions -------------------------------------------------------------------------------------------------------


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version without trailing zeros: `2.6.0+cu124` -> (2, 6)."""
    numbers = [int(n) for n in re.match(r"\d+(\.\d+)*", version).group().split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def ranges(group: str = "") -> dict[str, str]:
    """Distribution -> oldest version, from pyproject.toml: the dependencies, or those of an optional group."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][group] if group else project["dependencies"]
    return dict(line.split(">=") for line in lines)


def check_package(name: str, oldest: str, installed=importlib.metadata.version) -> Row:
    """Whether `name` (or a distribution with the same module) is installed and not older than `oldest`."""
    for candidate in (name, *SAME_MODULE.get(name, ())):
        try:
            version = installed(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
        ok = release(version) >= release(oldest)
        return Row(candidate, ok, version if ok else f"{version} is older than {oldest}", "python env.py")
    return Row(name, False, f"not installed, needs >= {oldest}", "python env.py")


def satisfied(*groups: str) -> bool:
    """Whether the running Python has the dependencies and those of `groups`."""
    return all(check_package(*item).ok for group in ("", *groups) for item in ranges(group).items())


# --- .venv ----------------------------------------------------------------------------------------------------------


def venv_python() -> Path:
    return ROOT / ".venv" / "bin" / "python"


def fingerprint() -> str:
    return hashlib.sha256((ROOT / "requirements.txt").read_bytes()).hexdigest()


def stamp() -> Path:
    """Written last: holds the fingerprint of the requirements that .venv was prepared with."""
    return ROOT / ".venv" / "requirements.sha256"


def prepared() -> bool:
    return venv_python().exists() and stamp().exists() and stamp().read_text() == fingerprint()


def say(message: str) -> None:
    print(f"env.py: {message}", file=sys.stderr, flush=True)


def run(*command) -> bool:
    """Run a command; what it prints goes to stderr (stdout belongs to `env.py python`)."""
    return subprocess.run([str(part) for part in command], cwd=ROOT, stdout=sys.stderr).returncode == 0


def works(*command) -> bool:
    """Whether a command exists and succeeds; it runs silently."""
    try:
        return subprocess.run([str(part) for part in command], capture_output=True).returncode == 0
    except OSError:
        return False


def prepare() -> None:
    """Create .venv and install requirements.txt, with uv when it is there. Continues after an interruption."""
    if prepared():
        return
    with open(ROOT / ".venv.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # two trainings started at once on a fresh machine
            say("another env.py is preparing .venv, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if prepared():
            return
        uv, python = shutil.which("uv"), venv_python()
        stamp().unlink(missing_ok=True)
        if not works(python, "-c", f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"):
            say(f"[1/2] creating .venv with Python {sys.version.split()[0]}")
            uv_venv = uv and run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, ".venv")
            if not uv_venv and not run(sys.executable, "-m", "venv", "--clear", ".venv"):
                raise EnvError("could not create .venv (on Debian and Ubuntu: apt install python3-venv; or install uv)")
        room()
        say(f"[2/2] installing requirements.txt with {'uv' if uv else 'pip'}: about {DOWNLOAD} GB to download the first time, "
            f"{DISK} GB of disk")
        if not (uv and run(uv, "pip", "install", "--python", python, "-r", "requirements.txt")):
            if uv:
                say("uv could not install them, trying pip")
            has_pip = works(python, "-m", "pip", "--version") or run(python, "-m", "ensurepip")
            if not (has_pip and run(python, "-m", "pip", "install", "-r", "requirements.txt")):
                raise EnvError("installing requirements.txt failed, the reason is above; the same command continues")
        stamp().write_text(fingerprint())
        say(f"ready: {python}")


def room() -> None:
    """Says what most of the download is, before it. Raises EnvError where the disk has no room."""
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK:
        raise EnvError(f"{ROOT} has {free:.1f} GB free, .venv needs {DISK}: make room, or use a Python that has torch")
    if not works("nvidia-smi", "-L"):
        say("no GPU here, and most of it is CUDA all the same: torch's default build brings it, and torchvision does not import "
            "beside torch's CPU build")


def interpreter(*groups: str) -> str:
    """The running Python when it satisfies the requirements, else that of .venv, prepared if need be."""
    if satisfied(*groups):
        return sys.executable
    prepare()
    return str(venv_python())


# --- check ----------------------------------------------------------------------------------------------------------


def check_gpus() -> Row:
    """What torch can use. A machine without a GPU is fine; a GPU that torch cannot use is not."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")
    except OSError:
        listed = 0
    try:
        import torch
    except ImportError as error:
        return Row("GPUs", not listed, f"cannot ask torch: {error}", "python env.py")
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if found:
        return Row("GPUs", True, ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GB" for gpu in found), "")
    if listed and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        remedy = "update the driver, or install a torch built for its CUDA"
        return Row("GPUs", False, f"nvidia-smi lists {listed}, torch (CUDA {torch.version.cuda}) sees none", remedy)
    return Row("GPUs", True, "none, the CPU will do: GPUS 0", "")


def check_config(config: str, arch: str, overrides: list[str], full: bool = False, quick: bool = False) -> list[Row]:
    """What `config` needs beyond packages: weights, CLIP, data. full: open every image and label; quick: read no data."""
    from model import configure, needs_clip, system_class
    from util.errors import UserError
    from util.run import preflight
    from util.run.place import Experiment

    try:
        found = configure(config, arch, overrides)
        place, cls = Experiment.from_config_path(arch, config, found.Runtime.output), system_class(arch)
        start = preflight.Start(found, place, cls.facts, cls.task, needs_clip(arch, found))
        drawn = not found.Data.maker or Path(found.Data.data_root).is_dir()  # the demo is drawn on first use
        return preflight.inspect(start, read=drawn and not quick, full=full)
    except UserError as error:
        return [Row("config", False, str(error), f"mend {config} or the command line")]


def table(rows: list[Row], missing: str = "MISSING") -> str:
    width = max(len(row.what) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"  {'found' if row.ok else missing:<7}  {row.what:<{width}}  {row.detail}")
        if not row.ok and row.remedy:
            lines.append(f"  {'':7}  {'':{width}}  -> {row.remedy}")
    return "\n".join(lines)


def check(arguments: list[str]) -> int:
    """Print what is found and what is missing; 1 when the packages or the named config cannot run."""
    parser = argparse.ArgumentParser(prog="env.py check")
    parser.add_argument("--config", help="a YAML of config/")
    parser.add_argument("--arch", default=os.environ.get("ARCH", "PI_CLIP"))
    parser.add_argument("--full", action="store_true", help="open every image and label, not a sample")
    parser.add_argument("overrides", nargs="*", metavar="Section.key=value")
    given = parser.parse_intermixed_args(arguments)
    if given.overrides and not given.config:
        parser.error("overrides change a config: name it with --config")

    if not satisfied() and prepared() and Path(sys.prefix) != ROOT / ".venv":
        os.execv(venv_python(), [str(venv_python()), __file__, "check", *arguments])

    needed = [Row("Python", True, f"{sys.version.split()[0]} ({sys.executable})", "")]
    needed += [check_package(*item) for item in ranges().items()]
    print("packages\n" + table(needed))
    optional = [check_package(*item) for group in ("test", "prepare", "weights") for item in ranges(group).items()]
    optional += [check_package(*item)._replace(remedy="only for WeCLIP, see requirements.txt")
                 for item in ranges("weclip").items()]
    print("optional packages\n" + table(optional, missing="absent"))
    print("hardware\n" + table([check_gpus()]))
    if not all(row.ok for row in needed):
        print("weights and data\n  cannot look before the packages are there")
        return 1
    if given.config:
        rows = check_config(given.config, given.arch, given.overrides, full=given.full)
        print(f"{given.config}, {given.arch}\n" + table(rows))
        return int(not all(row.ok for row in rows))
    print("what each data set takes; only the one that you run has to be there (env.py check --config FILE looks at one)")
    for config in sorted(ROOT.glob("config/*/*_split0_resnet50.yaml")):
        name = str(config.relative_to(ROOT))
        print(f"{name}, {given.arch}\n" + table(check_config(name, given.arch, [], quick=True), missing="absent"))
    return 0


# --- command line ---------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    os.chdir(ROOT)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("prepare", [])
    if command == "check":
        return check(rest)
    if command == "test":
        # Tests use small tensors, so a process of one thread for each core is quickest. OpenMP threads that wait for each other
        # (in a training that a test starts) sleep instead of spinning: on shared cores that is 20 times faster.
        environment = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"} | os.environ
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        processes = ["-n", str(min(8, cores)), "--dist", "loadfile", "--no-loadscope-reorder"]
        return subprocess.run([interpreter("test"), "-m", "pytest", "-q", *processes, *rest], env=environment).returncode
    if command in ("prepare", "python") and not rest:
        if command == "prepare":
            prepare()
        print(venv_python() if command == "prepare" else interpreter())
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except EnvError as error:
        say(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; the same command continues")
        sys.exit(130)
