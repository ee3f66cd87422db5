"""The identity of a run's checkpoints, and hashes of everything that its numbers depend on."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from util.config import Config
from util.data.folds import fold_of, read_class_names
from util.data.index import Record
from util.files import ROOT


@dataclass(frozen=True)
class Facts:
    """What the programs must know about a system (`System.facts`).

    Attributes:
        identity: config keys that tell its checkpoints apart, beyond data set, fold and network; "Method.priors" stands for the
            priors in effect.
        before: ARCH of the run that must come first; its checkpoint is frozen inside this system. "": it starts from ImageNet
            weights.
        priors: its priors unless Method.priors names others.
        frozen: whether it has frozen parts besides CLIP, which its checkpoints leave to their own files.
    """

    identity: tuple[str, ...] = ()
    before: str = ""
    priors: tuple[str, ...] = ()
    frozen: bool = True


def identity(arch: str, facts: Facts, config: Config) -> dict[str, Any]:
    """Return the identity of a checkpoint: system, data set, fold, network, own keys; see util.run.checkpoint.check_identity."""
    train = config.Train
    found = {
        "system": arch, "data_set": train.data_set, "split": train.split,
        "use_split_coco": train.use_split_coco if train.data_set == "coco" else None,
        "backbone": config.Method.backbone, "width": config.Method.width,
    }  # fmt: skip
    if config.Data.folds:  # your own data set: the files may have changed since
        names, fold = read_class_names(config.Data.class_names).names, fold_of(config)
        found |= {"novel": [names[c - 1] for c in fold.novel], "base": [names[c - 1] for c in fold.base]}
    for key in facts.identity:
        section, name = key.split(".")
        found[name] = getattr(getattr(config, section), name)
    if "priors" in found and found["priors"] is None:
        found["priors"] = list(facts.priors)
    return found


def fingerprint(config: Config, records: Sequence[Record]) -> dict[str, str]:
    """Hash what must be the same in all processes of a run: code, config, and the labels as read."""
    data = hashlib.sha256(repr([(r.image, r.pixels, r.annotated) for r in records]).encode())
    free = {"Runtime": config.Runtime.precision}  # without threads and folders, which may differ between machines
    whole = hashlib.sha256(json.dumps(dataclasses.asdict(config) | free, sort_keys=True).encode())
    return {"code": code_hash(), "config": whole.hexdigest()[:12], "data": data.hexdigest()[:12]}


def code_hash() -> str:
    """Hash all of our Python files, 12 digits."""
    code = hashlib.sha256()
    for file in sorted(f for pattern in ("*.py", "model/**/*.py", "util/**/*.py", "demo/**/*.py") for f in ROOT.glob(pattern)):
        code.update(file.read_bytes())
    return code.hexdigest()[:12]


def environment(device: torch.device) -> dict:
    """Return versions and hardware."""
    packages = {name: version(name) for name in ("torch", "timm", "open_clip_torch", "numpy")}
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **packages, "hardware": hardware}
