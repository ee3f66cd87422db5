"""A WeCLIP small enough for a test, on random weights, and batches for it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.clip.load import clip_from_state
from model.system import Frozen
from model.weak import weclip
from model.weak.maps import Bank
from model.weak.weclip import WeCLIP
from tests.make.systems import small_clip

CLASSES = 6


@dataclass
class Images:
    """Stand-in for the batch of dense systems."""

    image: Tensor
    present: Tensor
    valid: Tensor
    name: list[str]
    label: Tensor | None = None

    def rows(self, rows: slice) -> "Images":
        return Images(self.image[rows], self.present[rows], self.valid[rows], self.name[rows], self.label[rows])


def clip() -> Frozen:
    """Sharp attention, so that blocks differ; texts near each other, so that no softmax saturates."""
    state = small_clip().state_dict()
    for name in state:
        if name.startswith("visual.") and name.endswith("in_proj_weight"):
            state[name] *= 4
    return Frozen(clip_from_state(state))


def bank() -> Bank:
    rows = torch.randn(CLASSES + 4, 32, generator=torch.Generator().manual_seed(2))
    rows = F.normalize(rows + 2 * torch.ones(32), dim=1)
    return Bank(rows[:CLASSES], rows[CLASSES:])


def system(**options) -> WeCLIP:
    frozen = clip()
    torch.manual_seed(4)
    return WeCLIP(frozen, bank(), weclip.Options(**{"layers": 3, "rfm_layers": 3, "static_steps": 10} | options))


def batch(labels: tuple[tuple[int, ...], ...] = ((0, 3), (), (2, 4, 5), (1,)), size: tuple[int, int] = (64, 80)) -> Images:
    generator = torch.Generator().manual_seed(7)
    coarse, noise = (torch.rand(len(labels), 3, *hw, generator=generator) for hw in ((4, 5), size))
    image = 255 * F.interpolate(coarse, size, mode="nearest") * (0.9 + 0.1 * noise)
    present = torch.zeros(len(labels), CLASSES, dtype=torch.bool)
    for row, ids in zip(present, labels, strict=True):
        row[list(ids)] = True
    valid = torch.tensor([0, size[0], 0, size[1]]).repeat(len(labels), 1)
    unknown = torch.full((len(labels), *size), 255, dtype=torch.uint8)
    return Images(image, present, valid, [f"image {i}" for i in range(len(labels))], unknown)
