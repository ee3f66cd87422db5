"""Where a run lives and what it needs: folders, provenance, and the weights that come before it."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from util.checkpoint import read_meta
from util.config import VOTING, Config, config_of, parse_yaml
from util.data.folds import fold_of, read_class_names
from util.data.index import Record
from util.errors import UserError

CACHE = Path("exp/.cache")
ROOT = Path(__file__).parents[1]  # of the repository


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
        """config/DATASET/DATASET_EXP_NET.yaml names data set, experiment and network."""
        path = Path(path)
        data_set = path.parent.name
        rest = path.stem.removeprefix(f"{data_set}_")
        exp, _, net = rest.partition("_")
        if rest == path.stem or not net:
            raise UserError(f"config file {path}: expected the name config/DATASET/DATASET_EXP_NET.yaml")
        return cls(arch, data_set, exp, net, Path(root))

    @classmethod
    def of_checkpoint(cls, path: Path, arch: str, config: Config) -> "Experiment":
        """The run that a checkpoint lies in, ROOT/DATASET/ARCH/EXP/NET/snapshot/FILE; by the config's names when elsewhere."""
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

    def of(self, arch: str) -> "Experiment":
        """The same fold and network with another system."""
        return Experiment(arch, self.data_set, self.exp, self.net, self.root)

    @property
    def command(self) -> str:
        """What a user types for it, without `train.sh` or `test.sh`."""
        return f"{self.exp} {self.data_set}"


def recorded_config(path: Path, overrides: list[str] | None = None) -> Config:
    """The config that a checkpoint of ours was trained with: from its metadata, or of the run that it lies in.

    Relative paths in it that lead nowhere from here are taken from the repository.

    Raises:
        UserError: there is none, or an override is wrong.
    """
    meta = read_meta(path)
    content, source = meta.get("config"), path
    if content is None:
        source = path.parent.parent / "config.yaml"
        if not source.is_file():
            raise UserError(f"{path} does not tell its config, and there is no {source}. Keep a checkpoint of before this was "
                            "recorded in the folder of its run, or export it there: `python -m util.checkpoint export`")
        content = parse_yaml(source.read_text(encoding="utf-8"), str(source))
    config = config_of(content, str(source), overrides)
    config.Train.selection = meta.get("selection", config.Train.selection)  # best or last, of one run
    for section, key in ((config.CLIP, "clip_path"), (config.Method, "backbone_weight"), (config.Method, "pre_weight"),
                         (config.Data, "class_names"), (config.Data, "folds")):  # fmt: skip
        name = getattr(section, key)
        if name and not Path(name).exists() and (ROOT / name).exists():
            setattr(section, key, str(ROOT / name))
    return config


def base_learner_file(config: Config, place: Experiment) -> Path:
    """Where the frozen base learner of a few-shot system comes from (`Method.pre_weight`)."""
    return place.of("PSPNet").best if config.Method.pre_weight == "auto" else Path(config.Method.pre_weight)


def missing_base_learner(config: Config, place: Experiment) -> str:
    """What to do when that file is not there."""
    return (f"Method.pre_weight = {config.Method.pre_weight}: no base learner at {base_learner_file(config, place)}. "
            f"Train it with `ARCH=PSPNet NET={place.net} sh train.sh {place.command} GPUS`, or point Method.pre_weight to "
            "a published one")


def identity(arch: str, config: Config, priors: list[str] | None = None) -> dict:
    """What a checkpoint is for; see util.checkpoint.IDENTITY."""
    train, method = config.Train, config.Method
    coco = train.use_split_coco if train.data_set == "coco" else None
    shared = {"system": arch, "data_set": train.data_set, "split": train.split, "use_split_coco": coco,
              "backbone": method.backbone, "width": method.width}
    if config.Data.folds:  # your own data set: the files may have changed since
        names, fold = read_class_names(config.Data.class_names).names, fold_of(config)
        shared |= {"novel": [names[c - 1] for c in fold.novel], "base": [names[c - 1] for c in fold.base]}
    if arch == "PSPNet":
        return shared
    shot = None if arch in VOTING else train.shot
    if arch == "IMR_HSNet":
        shared |= {"stages": method.stages, "mask_mode": method.mask_mode, "clip_size": config.CLIP.clip_size}
    return shared | {"shot": shot, "priors": priors, "filter_novel": train.filter_novel, "crop": train.crop,
                     "selection": train.selection, "low_fea": method.low_fea}


def fingerprint(config: Config, records: Sequence[Record]) -> dict[str, str]:
    """Short hashes of what has to be the same in all processes of a run: code, config, and the labels as they were read."""
    data = hashlib.sha256(repr([(r.image, r.pixels, r.annotated) for r in records]).encode())
    free = {"Runtime": config.Runtime.precision}  # threads, folders: each machine's own affair
    whole = hashlib.sha256(json.dumps(dataclasses.asdict(config) | free, sort_keys=True).encode())
    return {"code": code_hash(), "config": whole.hexdigest()[:12], "data": data.hexdigest()[:12]}


def code_hash() -> str:
    """Short hash of all of our Python files."""
    root, code = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(f for pattern in ("*.py", "model/**/*.py", "util/**/*.py", "demo/**/*.py") for f in root.glob(pattern)):
        code.update(file.read_bytes())
    return code.hexdigest()[:12]


def environment(device: torch.device) -> dict:
    """Versions and hardware."""
    packages = {name: version(name) for name in ("torch", "timm", "open_clip_torch", "numpy")}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **packages, "hardware": hardware}
