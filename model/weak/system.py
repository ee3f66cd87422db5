"""What WeCLIP and CLIP-ES share: the frozen CLIP, its texts, and what they say of wrong input."""

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from model.clip import Clip
from model.ops import processes
from model.system import Frozen, System
from model.weak.maps import Bank, MapOptions, Pairs
from util.data.transforms import IGNORE
from util.errors import UserError
from util.score.metrics import intersection_union
from util.score.weak import WeakTask

RANGE = 50  # steps whose pseudo labels one value is of


class Weak(System):
    """A system that knows of an image which classes it shows, and not where.

    A batch has: image B 3 H W RGB 0..255; present B C bool (its image-level labels, read where maps are made of them; best left
    on the CPU, see `Pairs.of`); valid B 4 int (y0 y1 x0 x1, the part of a crop that shows the image), read in training.

    Args:
        clip: frozen CLIP with a ViT image tower.
        bank: text rows of every class and of the background, `text_bank`.
    """

    task = WeakTask
    Options: ClassVar[type[MapOptions]]

    def __init__(self, clip: Frozen, bank: Bank, options: MapOptions):
        super().__init__()
        self.clip, self.options = clip, options
        self.register_buffer("foreground", bank.foreground, persistent=False)
        self.register_buffer("background", bank.background, persistent=False)
        self.register_buffer("counted", torch.zeros(2 + len(bank.foreground), 1 + len(bank.foreground), dtype=torch.int64),
                             persistent=False)  # fmt: skip
        self.steps = 0  # that are counted
        if clip.module.random:
            self.mark = "[random CLIP]"
            self.warnings = ("CLIP has random weights (CLIP.clip_path=random): the maps and every score mean nothing.",)

    @property
    def vision(self) -> Clip:
        return self.clip.module

    @property
    def bank(self) -> Bank:
        return Bank(self.foreground, self.background)

    @property
    def classes(self) -> int:
        """Foreground classes."""
        return len(self.foreground)

    def normalise(self, images: Tensor) -> Tensor:
        """B 3 H W RGB 0..255 -> what CLIP sees."""
        return self.vision.visual.normalise(images, self.options.statistics)

    def count(self, label: Tensor, truth: Tensor | None) -> None:
        """Count the pixels of label maps B H W against masks B H W, 255 or None where there is none; see `measured`. Nothing
        waits for the device."""
        if truth is None:
            return
        known, side = (truth != IGNORE) & (label != IGNORE), self.counted.shape[1]
        index = torch.where(known, truth.long() * side + label.long(), side * side)  # all others into a row of their own
        self.counted.view(-1).index_add_(0, index.flatten(), torch.ones_like(index.flatten()))
        self.steps += 1

    def measured(self) -> dict[str, float]:
        if self.steps < RANGE:
            return {}
        state = self.counted[:-1].clone()
        self.counted.zero_()
        self.steps = 0
        if processes()[1] > 1:
            dist.all_reduce(state)
        counts = intersection_union(state).double()
        found = counts[:, 1] > 0
        return {"pseudo_label_miou": float((counts[found, 0] / counts[found, 1]).mean())} if found.any() else {}

    def pairs(self, present: Tensor, device: torch.device) -> Pairs:
        """Raises UserError where the labels are not of this model's classes."""
        if present.shape[1] != self.classes:
            raise UserError(f"image-level labels of {present.shape[1]} classes, but this model has {self.classes}: the class "
                            "list of the data and that of the model differ")
        return Pairs.of(present, device)
