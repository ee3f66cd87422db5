"""Episodes of PASCAL's sizes to measure with: made up, or of real images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from util.cache import CACHE
from util.data.episodes import Episode, EpisodeDataset, EpisodeList, collate
from util.data.folds import fold, read_class_names
from util.data.index import build_index, scan
from util.data.transforms import ValTransform

SIDE, HEIGHT, WIDTH = 473, 375, 500


def real_episodes(root: Path, batch: int, shot: int = 1) -> Episode:
    """Episodes over the novel classes of fold 0, from a VOC folder that has the images of lists/pascal_mini."""
    names, data = read_class_names("lists/pascal/classes.txt"), fold("pascal", 0)
    index = build_index(scan(root, "lists/pascal_mini/val.txt", names, CACHE), data.novel, False, 2048)
    source = EpisodeDataset(EpisodeList(index, shot, seed=321), data, root, ValTransform(SIDE, squash=True), num_classes=20,
                            clip_size="original", patch=16, evaluation=True)  # fmt: skip
    return collate([source[i] for i in range(batch)])


def box() -> torch.Tensor:
    """A sixth of the image, as PASCAL's objects cover on average."""
    mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    mask[100:293, 150:343] = 1
    return mask


def diamond(side: int) -> torch.Tensor:
    """17 % of the image in a bounding box of 34 %: both are the means over VOC 2012's objects."""
    along = torch.arange(side) - side / 2
    return (along[:, None].abs() + along.abs() < 0.2915 * side).to(torch.uint8)


def episodes(batch: int, shot: int = 1, mask: torch.Tensor | None = None) -> Episode:
    """Random episodes with an object, by default `box`, whose side is the images'."""
    generator = torch.Generator().manual_seed(0)
    mask = (box() if mask is None else mask).expand(batch, -1, -1)
    side = mask.shape[1]

    def image(*shape: int) -> torch.Tensor:
        return (255 * torch.rand(shape, generator=generator)).round()

    present = torch.zeros(batch, 20, dtype=torch.bool)
    present[:, [6, 14]] = True
    return Episode(
        image(batch, 3, side, side), mask, image(batch, shot, 3, side, side), mask[:, None].repeat(1, shot, 1, 1), mask,
        torch.full((batch,), 7), torch.ones(batch, dtype=torch.int64), present, [image(3, 384, 512).byte()] * batch,
        torch.tensor([[HEIGHT, WIDTH]] * batch), torch.arange(batch), [], [], [""] * batch, [[""] * shot] * batch,
    )  # fmt: skip


class GivenCam:
    """Given maps in place of CLIP's."""

    name, channels = "cam", 1
    query_needs = support_needs = frozenset()
    source = SimpleNamespace(side=224)

    def __init__(self, query: np.ndarray, support: np.ndarray):
        self.query, self.support = torch.from_numpy(query)[:, None], torch.from_numpy(support)[:, :, None]

    def __call__(self, episode: Episode, features: Any) -> Tensor:
        return self.query

    def of_supports(self, episode: Episode, features: Any) -> Tensor:
        return self.support
