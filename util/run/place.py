"""The place of a run: its folders, its recorded config, and the checkpoint of the run before it."""

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from util import ROOT
from util.config import Config, Method, config_of
from util.errors import UserError
from util.layers import names_of
from util.run.checkpoint import read_meta
from util.yaml_text import parse_yaml

WAIT = 5  # seconds
TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")  # what util.files.atomic writes before it renames


@dataclass(frozen=True)
class Experiment:
    """One system on one fold: exp/DATASET/ARCH/EXP/NET/{snapshot,result}/."""

    arch: str
    data_set: str
    exp: str
    net: str
    root: Path = Path("exp")

    @classmethod
    def from_config_path(cls, arch: str, path: str | Path, root: str) -> "Experiment":
        """Take data set, experiment and network from the name config/DATASET/DATASET_EXP_NET.yaml."""
        data_set, exp, net = names_of(path)
        return cls(arch, data_set, exp, net, Path(root))

    @classmethod
    def of_checkpoint(cls, path: Path, arch: str, config: Config) -> "Experiment":
        """Return the run of a checkpoint ROOT/DATASET/ARCH/EXP/NET/snapshot/FILE; elsewhere the run of the config's names."""
        parts = path.resolve().parts
        if parts[-5:-4] == (arch,) and parts[-2] == "snapshot":
            return cls(arch, parts[-6], parts[-4], parts[-3], Path(*parts[:-6]))
        return cls(arch, config.Train.data_set, f"split{config.Train.split}", config.Method.backbone, Path(config.Runtime.output))

    @property
    def folder(self) -> Path:
        return self.root / self.data_set / self.arch / self.exp / self.net

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshot"

    @property
    def result(self) -> Path:
        return self.folder / "result"

    @property
    def best(self) -> Path:
        return self.snapshot / "best.safetensors"

    @property
    def last(self) -> Path:
        return self.snapshot / "last.safetensors"

    def home(self, named: str) -> "Experiment":
        """Return the run of the tested weights: that which Test_Finetune.trained_on names, else this one."""
        data_set, exp, net = named.split("/") if named else (self.data_set, self.exp, self.net)
        return replace(self, data_set=data_set, exp=exp, net=net)

    def of(self, arch: str) -> "Experiment":
        """Return the same fold and network with another system."""
        return Experiment(arch, self.data_set, self.exp, self.net, self.root)

    @property
    def command(self) -> str:
        """Return the arguments of `train.sh` and `test.sh` for it."""
        return f"{self.exp} {self.data_set}"


def recorded_config(path: Path, overrides: list[str] | None = None, options: type[Method] = Method) -> Config:
    """The config that a checkpoint of ours was trained with: from its metadata, or of the run that it lies in.

    Relative paths that do not exist from here are taken from the repository.

    Args:
        options: dataclass of the system's own options.
    Raises:
        UserError: no config is recorded, or an override is wrong.
    """
    meta = read_meta(path)
    content, source = meta.get("config"), path
    if content is None:
        source = path.parent.parent / "config.yaml"
        if not source.is_file():
            raise UserError(f"{path} does not tell its config, and there is no {source}. Keep a checkpoint of before this was "
                            "recorded in the folder of its run, or export it there: `python -m model.predict.share export`")
        content = parse_yaml(source.read_text(encoding="utf-8"), str(source))
    config = config_of(content, str(source), overrides, options)
    config.Train.selection = meta.get("selection", config.Train.selection)  # best or last, of one run
    for section, key in ((config.CLIP, "clip_path"), (config.Method, "backbone_weight"), (config.Method, "pre_weight"),
                         (config.Data, "class_names"), (config.Data, "folds")):  # fmt: skip
        name = getattr(section, key)
        if name and not Path(name).exists() and (ROOT / name).exists():
            setattr(section, key, str(ROOT / name))
    return config


def before_file(config: Config, place: Experiment, before: str) -> Path:
    """Return the checkpoint of the run that must come first (`Method.pre_weight`; auto: that run of this fold and network)."""
    return place.of(before).best if config.Method.pre_weight == "auto" else Path(config.Method.pre_weight)


def missing_before(config: Config, place: Experiment, before: str) -> str:
    """Say what to do when that file does not exist."""
    return (f"Method.pre_weight = {config.Method.pre_weight}: no base learner at {before_file(config, place, before)}. "
            f"Train it with `ARCH={before} NET={place.net} sh train.sh {place.command} GPUS`, or point Method.pre_weight to "
            "a published one")


@contextlib.contextmanager
def owned(folder: Path, main: bool = True) -> Iterator[None]:
    """Own a run's folder: a second run in it ends with an error that names the owner. A crash frees it.

    Temporary files that a killed run left behind are removed.

    Args:
        main: only the main process owns; the others pass.
    Raises:
        UserError: another run is at work there.
    """
    if not main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".owner").open("a+") as lock:
        for attempt in range(WAIT + 1):  # the processes of a run that was killed need a moment to end
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: workers do not inherit it
                break
            except OSError:
                if attempt < WAIT:
                    time.sleep(1)
                    continue
                lock.seek(0)
                owner = lock.read().strip() or "unknown owner"
                raise UserError(f"a run is at work in {folder}: {owner}. Wait for it, stop it, or use Runtime.output=FOLDER for "
                                "another one") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        for file in (path for part in (folder, folder / "snapshot", folder / "snapshot/resume") for path in part.glob(".*")):
            if TEMPORARY.fullmatch(file.name):
                file.unlink(missing_ok=True)
        yield


def start_file(config: Config, place: Experiment) -> Path | None:
    """The checkpoint that the trained part starts from (`Train.start_from`); None: from fresh weights."""
    named = config.Train.start_from
    if not named or named.endswith(".safetensors"):
        return Path(named) if named else None
    exp, slash, stem = named.partition("/")
    if not (exp and slash and stem) or "/" in stem:
        raise UserError(f"Train.start_from = {named}: write EXP/STEP (or EXP/last), or name a .safetensors file")
    return replace(place, exp=exp).snapshot / f"{stem}.safetensors"


def missing_start(config: Config, place: Experiment) -> str:
    """What to do when that file is not there."""
    named, file = config.Train.start_from, start_file(config, place)
    exp, _, stem = named.partition("/")
    remedy = "name another one"
    if file != Path(named):
        kept = f" It must keep that step: Train.keep=[{stem}]." if stem.isdigit() else ""
        remedy = f"train it first: `ARCH={place.arch} NET={place.net} sh train.sh {exp} {place.data_set} GPUS`.{kept}"
    return f"Train.start_from = {named}: no weights at {file}; {remedy}"
