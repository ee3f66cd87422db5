"""The identity of a run's checkpoints, and hashes of everything that its numbers depend on."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from util import ROOT
from util.config import Config
from util.data.folds import ClassNames, fold_of, read_class_names
from util.data.index import Record

CODE = "code"  # of `sources`: it may change on the way, which is said


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
        clip: whether it is built on a CLIP, whatever its priors.
        trained: whether it has anything to train; else it is tested without a checkpoint.
        stages: keys of `identity` in which the run that it starts from (Train.start_from) may differ.
    """

    identity: tuple[str, ...] = ()
    before: str = ""
    priors: tuple[str, ...] = ()
    frozen: bool = True
    clip: bool = False
    trained: bool = True
    stages: tuple[str, ...] = ()


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


def start_identity(arch: str, facts: Facts, config: Config) -> dict[str, Any]:
    """What the checkpoint is for that a run may start from (Train.start_from)."""
    free = {key.split(".")[1] for key in facts.stages}
    return {key: value for key, value in identity(arch, facts, config).items() if key not in free}


def fingerprint(config: Config, records: Sequence[Record]) -> dict[str, str]:
    """Hash what must be the same in all processes of a run: code, config, and the labels as read."""
    data = hashlib.sha256(repr([(r.image, r.pixels, r.annotated) for r in records]).encode())
    free = {"Runtime": config.Runtime.precision}  # without threads and folders, which may differ between machines
    whole = hashlib.sha256(json.dumps(dataclasses.asdict(config) | free, sort_keys=True).encode())
    return {"code": code_hash(), "config": whole.hexdigest()[:12], "data": data.hexdigest()[:12]}


def sources(config: Config, records: Sequence[Record], names: ClassNames) -> dict[str, str]:
    """Hash what a run may not change on its way: the list and its order, labels, class names and texts, image files (size and
    time, size, or content: Data.same_by), and the code."""
    def short(value: Any) -> str:
        return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

    root, states = Path(config.Data.data_root), []
    for record in records:
        file = root / record.image
        if not file.is_file():
            states.append(None)
        elif config.Data.same_by == "content":
            states.append(hashlib.sha256(file.read_bytes()).hexdigest())
        else:
            found = file.stat()
            states.append((found.st_size, found.st_mtime_ns if config.Data.same_by == "time" else 0))
    return {
        "the list and its order": short([(r.image, r.label) for r in records]),
        "the labels": short([(r.height, r.width, sorted(r.pixels.items()), r.annotated) for r in records]),
        "class names and texts": short(names), f"images (Data.same_by={config.Data.same_by})": short(states), CODE: code_hash(),
    }  # fmt: skip


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
