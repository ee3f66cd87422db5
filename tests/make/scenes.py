"""Scenes of the demo world, untrained checkpoints on them, predictions at file size."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo import world
from model import build_system, configure, load_frozen, system_class
from util.config import Config
from util.data.episodes import mask_table
from util.data.folds import fold_of, read_class_names
from util.data.transforms import Placed, read_label
from util.run.checkpoint import save_weights
from util.run.identity import identity
from util.run.place import Experiment

ROOT = Path(__file__).parents[2]
CONFIG = "config/demo/demo_split0_resnet50.yaml"
NUMBERS = range(5001, 5101)
STAR = 1  # class


def draw(root: Path) -> Path:
    """100 scenes of the demo world in VOC's layout, and their list."""
    for folder in ("JPEGImages", "SegmentationClassAug", "Annotations"):
        (root / folder).mkdir()
    for number in NUMBERS:
        world.write(root, number)
    (root / "list.txt").write_text(world.list_lines(NUMBERS))
    return root


def make(root: Path, arch: str, *overrides: str) -> tuple[Config, Path]:
    """An untrained system's checkpoint as train.py writes it, with its base learner; its config and file."""
    few = ["Train.val_size=65", f"Runtime.output={root}/exp", *overrides]
    for name in ("PSPNet", arch):
        config = configure(CONFIG, name, few)
        place = Experiment.from_config_path(name, CONFIG, config.Runtime.output)
        torch.manual_seed(5)
        system = build_system(name, config, fold_of(config), read_class_names(config.Data.class_names))
        load_frozen(system, config, place, training=True)
        with torch.no_grad():
            for parameter in system.trained.parameters() if name == arch else ():
                parameter.mul_(1.5)  # scores that differ, and masks that are neither empty nor full
            if hasattr(system.trained, "ensemble"):
                system.trained.ensemble.cls_merge.weight.fill_(1)  # so far the base learner has no say
        meta = identity(name, system.facts, config) | {"frozen": system.frozen_hashes()}
        save_weights(place.best, system.trained_state(), meta | {"config": asdict(config)})
    return config, place.best


def make_dense(root: Path, arch: str, name: str, *overrides: str) -> tuple[Config, Path]:
    """An untrained dense system's checkpoint on the demo, as train.py writes it; its config and file. name: demo_NAME.yaml."""
    file = f"config/demo/demo_{name}.yaml"
    config = configure(file, arch, [f"Runtime.output={root}/exp", *overrides])
    place = Experiment.from_config_path(arch, file, config.Runtime.output)
    fold, names = system_class(arch).task.folds(config), read_class_names(config.Data.class_names)
    torch.manual_seed(5)
    system = build_system(arch, config, fold, names)
    with torch.no_grad():
        for parameter in system.trained.parameters():
            parameter.mul_(1.5)  # labels that differ
    meta = identity(arch, system.facts, config) | {"frozen": system.frozen_hashes(), "selection": "last"}
    save_weights(place.best, system.trained_state(), meta | {"config": asdict(config)})
    return config, place.best


def placed(hw: Sequence[int], squash: bool) -> Placed:
    """Where a squashed or letterboxed image lies."""
    return Placed(tuple(hw), tuple(hw) if squash else (max(hw), max(hw)))


def restore(scores: Tensor, hw: Sequence[int], squash: bool) -> Tensor:
    """Scores of a squashed or letterboxed image at file size."""
    return placed(hw, squash).restore(scores)


def photo(scenes: Path, number: int) -> Path:
    return scenes / f"JPEGImages/{world.stem(number)}.jpg"


def palette_mask(path: Path, cls: int) -> Image.Image:
    """What evaluation makes of a label, {0, 1, 255 = does not count}, with a palette."""
    image = Image.fromarray(mask_table(cls)[read_label(path)], "P")
    image.putpalette(world.palette())
    return image


def star(scenes: Path, *, of: int = 2) -> tuple[list[Path], list[np.ndarray]]:
    """Scenes that show a star, with its mask."""
    labels = {n: read_label(scenes / f"SegmentationClassAug/{world.stem(n)}.png") == STAR for n in NUMBERS}
    shown = [n for n, mask in labels.items() if mask.sum() > 400][:of]
    return [photo(scenes, n) for n in shown], [labels[n] for n in shown]


def upright(rng: np.random.Generator, hw: tuple[int, int] = (40, 60)) -> np.ndarray:
    return cv2.resize(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8), hw[::-1], interpolation=cv2.INTER_NEAREST)
