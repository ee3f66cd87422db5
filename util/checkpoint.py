"""Checkpoints: trained weights as safetensors with what they were trained for in the metadata, plus a resume state.

    snapshot/best.safetensors    best validation score so far
    snapshot/last.safetensors    end of the last finished epoch
    snapshot/last.state.pt       what a resume needs besides: optimizer, RNG, epoch, best score

Every file is written beside its place and renamed, so an interrupted run leaves valid ones. `last.state.pt` moves last
and names the hash of the weights it belongs to.
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
from util.files import atomic, load_tensors, save_tensors

# What must agree between a checkpoint and the config it is used with, and the key that sets it.
IDENTITY = {
    "system": "ARCH", "data_set": "Train.data_set", "split": "Train.split", "shot": "Train.shot",
    "use_split_coco": "Train.use_split_coco", "backbone": "Method.backbone", "width": "Method.width", "priors": "Method.priors",
    "filter_novel": "Train.filter_novel", "crop": "Train.crop", "selection": "Train.selection",
}  # fmt: skip


@dataclass
class Progress:
    """Where a training run stands."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished iterations
    best: float = -1.0
    best_epoch: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)  # the config it runs with


def save_weights(path: Path, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Weights with metadata (any JSON values)."""
    save_tensors(path, state, {key: json.dumps(value) for key, value in meta.items()})


def read_meta(path: Path) -> dict[str, Any]:
    """Metadata of a checkpoint of ours; empty for a safetensors file from elsewhere."""
    try:
        with safe_open(path, "pt") as file:
            return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except Exception as error:
        raise UserError(f"{path} is damaged or no checkpoint of ours ({error})") from error


def check_identity(path: Path, meta: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises UserError listing everything in which a checkpoint differs from what the config asks for."""
    wrong = [f"{IDENTITY[key]}: the checkpoint has {meta.get(key)!r}, the config {expected[key]!r}"
             for key in IDENTITY if key in expected and meta.get(key) != expected[key]]
    if wrong:
        raise UserError(f"{path} was trained for something else, nothing was loaded.\n  " + "\n  ".join(wrong))


def check_frozen(path: Path, meta: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """Raises UserError when the frozen parts (base learner, CLIP) are not the ones the checkpoint was trained with."""
    trained = meta.get("frozen", {})
    wrong = [name for name in trained if hashes.get(name) != trained[name]]
    if wrong:
        raise UserError(f"{path} was trained with other frozen weights: {', '.join(wrong)} differ. Use the files it was trained "
                        "with (Method.pre_weight, CLIP.clip_path), or train again")


def save_resume(folder: Path, weights: Mapping[str, Tensor], meta: Mapping[str, Any], optimizer: torch.optim.Optimizer,
                rng: list[Tensor], progress: Progress) -> None:  # fmt: skip
    """Writes last.safetensors, then last.state.pt which refers to it."""
    save_weights(folder / "last.safetensors", weights, meta)
    state = {
        "weights": _digest(folder / "last.safetensors"),
        "optimizer": optimizer.state_dict(), "rng": rng, "progress": vars(progress),
    }  # fmt: skip
    with atomic(folder / "last.state.pt") as temporary:
        torch.save(state, temporary)


def load_resume(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(weights, state) of the last finished epoch, or None for a fresh start.

    Raises:
        UserError: the two files are damaged or belong to different epochs.
    """
    weights, state = folder / "last.safetensors", folder / "last.state.pt"
    if not state.is_file():
        return None
    try:
        content = torch.load(state, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on damaged files
        raise UserError(f"{state} is damaged ({error}); delete it to start over") from error
    if not weights.is_file() or content["weights"] != _digest(weights):
        raise UserError(f"{weights} does not belong to {state.name} (an interrupted write?); delete both to start over, "
                        f"{folder / 'best.safetensors'} stays usable")
    return load_tensors(weights), content


def finished(folder: Path) -> bool:
    """Whether the run in this snapshot folder went through its last epoch."""
    found = load_resume(folder)
    return found is not None and found[1]["progress"]["epoch"] >= found[1]["progress"]["config"]["Train"]["epochs"]


def rng_state(device: torch.device) -> list[Tensor]:
    """Generator states that dropout draws from: the CPU's, and the GPU's where there is one."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_rng_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
