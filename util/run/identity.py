"""What a run is: what its checkpoints are for, and hashes of everything that its numbers depend on."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version

import torch

from util.config import VOTING, Config
from util.data.folds import fold_of, read_class_names
from util.data.index import Record
from util.files import ROOT


def identity(arch: str, config: Config, priors: list[str] | None = None) -> dict:
    """What a checkpoint is for; see util.run.checkpoint.IDENTITY."""
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
    code = hashlib.sha256()
    for file in sorted(f for pattern in ("*.py", "model/**/*.py", "util/**/*.py", "demo/**/*.py") for f in ROOT.glob(pattern)):
        code.update(file.read_bytes())
    return code.hexdigest()[:12]


def environment(device: torch.device) -> dict:
    """Versions and hardware."""
    packages = {name: version(name) for name in ("torch", "timm", "open_clip_torch", "numpy")}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **packages, "hardware": hardware}
