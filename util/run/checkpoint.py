"""Checkpoints: trained weights as safetensors, with the identity of their training in the metadata, and resume points.

    snapshot/best.safetensors              the choice of the selection rule so far
    snapshot/last.safetensors              end of the last finished epoch
    snapshot/resume/STEP.safetensors, .pt  weights; the rest that a resume needs: optimizer, RNG, position, best score
    snapshot/resume/STEP.json              their sha256, written last: without it the other two do not count

`python -m model.predict.share export` makes one file to share.

Every file is written beside its place and then renamed, so a killed run leaves valid files. Two resume points are kept. A
damaged one is reported, and the one before is used.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from util.errors import UserError
from util.files import atomic, load_tensors, save_json, save_tensors, written

KEYS = {  # part of a checkpoint's identity -> the config key that sets it, for messages
    "system": "ARCH", "data_set": "Train.data_set", "split": "Train.split", "shot": "Train.shot",
    "use_split_coco": "Train.use_split_coco", "backbone": "Method.backbone", "width": "Method.width", "priors": "Method.priors",
    "filter_novel": "Train.filter_novel", "crop": "Train.crop", "selection": "Train.selection", "clip_size": "CLIP.clip_size",
    "novel": "Data.folds, novel classes", "base": "Data.folds, base classes",
}  # fmt: skip

PARTS = (".safetensors", ".pt")  # files of a resume point beside its manifest
EXPORT = "export"  # metadata key of a file that has the frozen parts too (model/predict/share.py)


@dataclass
class Progress:
    """The position of a training run."""

    step: int = 0  # finished iterations
    closed: int = 0  # iterations up to the last stop whose validation and weights are done
    best: float = -1.0
    best_epoch: float = 0.0
    total: int = 0  # iterations of the whole run
    config: dict[str, Any] = field(default_factory=dict)  # the config it runs with
    sources: dict[str, str] = field(default_factory=dict)  # `util.run.identity.sources`: hashes of its data and code

    @property
    def name(self) -> str:
        """Name of a resume point. Names sort by position; those before and after a validation differ."""
        return f"{self.step:09d}{'-closed' if self.closed == self.step else ''}"

    @property
    def finished(self) -> bool:
        return 0 < self.total <= self.closed


def save_weights(path: Path, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write weights with metadata (any JSON values).

    Raises:
        UserError: the disk is full or cannot be written; the file of before is kept.
    """
    with written(path):
        save_tensors(path, state, {key: json.dumps(value) for key, value in meta.items()})


def read_meta(path: Path) -> dict[str, Any]:
    """Read the metadata of a checkpoint of ours; empty for any other safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except Exception as error:
        raise UserError(f"{path} is damaged or no checkpoint of ours ({error})") from error


def check_identity(path: Path, meta: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises UserError listing everything in which a checkpoint differs from what the config asks for."""
    wrong = [f"{KEYS.get(key, f'Method.{key}')}: the checkpoint has {meta.get(key)!r}, the config {value!r}"
             for key, value in expected.items() if key not in meta or meta[key] != value]
    if wrong:
        raise UserError(f"{path} was trained for something else, nothing was loaded.\n  " + "\n  ".join(wrong))


def check_frozen(path: Path, meta: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """Raise UserError when the frozen parts (base learner, CLIP) are not those of the checkpoint's training."""
    trained = meta.get("frozen", {})
    wrong = [name for name in trained if hashes.get(name) != trained[name]]
    if wrong:
        raise UserError(f"{path} was trained with other frozen weights: {', '.join(wrong)} differ. Use the files it was trained "
                        "with (Method.pre_weight, CLIP.clip_path), or train again")


def save_resume(folder: Path, weights: Mapping[str, Tensor], meta: Mapping[str, Any], optimizer: torch.optim.Optimizer,
                rng: list[Tensor], progress: Progress) -> None:  # fmt: skip
    """Write a resume point into folder/resume and delete all but the two newest."""
    point = folder / "resume" / progress.name
    save_weights(point.with_suffix(".safetensors"), weights, meta)
    state = {"optimizer": optimizer.state_dict(), "rng": rng, "progress": vars(progress)}
    with written(point.with_suffix(".pt")), atomic(point.with_suffix(".pt")) as temporary:
        torch.save(state, temporary)
    with written(point.with_suffix(".json")):
        save_json(point.with_suffix(".json"), {suffix: _digest(point.with_suffix(suffix)) for suffix in PARTS})
    for manifest in _manifests(folder)[:-2]:
        for suffix in (".json", *PARTS):
            manifest.with_suffix(suffix).unlink(missing_ok=True)


def load_resume(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any], list[str]] | None:
    """Load the newest valid resume point: (file of the weights, weights, state, messages about damaged points); None: no point.

    Raises:
        UserError: there are resume points, and none of them is valid.
    """
    damaged: list[str] = []
    for manifest in reversed(_manifests(folder)):
        try:
            digests = json.loads(manifest.read_text())
            if digests.keys() != {*PARTS}:
                raise ValueError(f"it names {', '.join(digests) or 'no file'}; expected {', '.join(PARTS)}")
            for suffix, digest in digests.items():
                if _digest(manifest.with_suffix(suffix)) != digest:
                    raise ValueError(f"{manifest.with_suffix(suffix).name} is not what was written")
            state = torch.load(manifest.with_suffix(".pt"), map_location="cpu", weights_only=True)
            file = manifest.with_suffix(".safetensors")
            return file, load_tensors(file), state, damaged
        except Exception as error:  # json, torch and the file system raise many kinds
            damaged.append(f"resume point {manifest} is damaged ({error})")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}. Use Train.resume=none to start over; {folder / 'best.safetensors'} stays usable")
    return None


def _manifests(folder: Path) -> list[Path]:
    """List the manifests of all resume points, oldest first."""
    return sorted((folder / "resume").glob("*.json"), key=lambda path: path.stem)


def finished(folder: Path) -> bool:
    """Return whether the run in this snapshot folder has finished."""
    found = load_resume(folder)
    return found is not None and Progress(**found[2]["progress"]).finished


def rng_state(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that dropout uses: the CPU's, and the GPU's where there is one."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_rng_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
