"""Untrained checkpoints and a few scenes of the demo world, for the tests of what works on them."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from demo import world
from model import build_system, load_backbone
from util.config import Config, load_config
from util.data.episodes import mask_table
from util.data.folds import fold_of, read_class_names
from util.data.transforms import read_label
from util.run.checkpoint import save_weights
from util.run.identity import identity
from util.run.place import Experiment

ROOT = Path(__file__).parents[1]
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
    few = ["Train.val_size=65", f"Runtime.output={root}/exp", "Method.ppm_scales=[9,5,2]", *overrides]
    for name in ("PSPNet", arch):
        config = load_config(CONFIG, name, few)
        place = Experiment.from_config_path(name, CONFIG, config.Runtime.output)
        torch.manual_seed(5)
        system = build_system(name, config, fold_of(config), read_class_names(config.Data.class_names))
        load_backbone(system, config, place)
        with torch.no_grad():
            for parameter in system.trained.parameters() if name == arch else ():
                parameter.mul_(1.5)  # scores that differ, and masks that are neither empty nor full
            if hasattr(system.trained, "ensemble"):
                system.trained.ensemble.cls_merge.weight.fill_(1)  # so far the base learner has no say
        meta = identity(name, config, system.prior_names) | {"frozen": system.frozen_hashes()}
        save_weights(place.best, system.trained_state(), meta | {"config": asdict(config)})
    return config, place.best


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
