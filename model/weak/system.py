"""What WeCLIP and CLIP-ES share: the frozen CLIP, its texts, and what they say of wrong input."""

from typing import ClassVar

import torch
from torch import Tensor

from model.clip import Clip
from model.system import Frozen, System
from model.weak.maps import Bank, MapOptions, Pairs
from util.errors import UserError
from util.score.weak import WeakTask


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

    def pairs(self, present: Tensor, device: torch.device) -> Pairs:
        """Raises UserError where the labels are not of this model's classes."""
        if present.shape[1] != self.classes:
            raise UserError(f"image-level labels of {present.shape[1]} classes, but this model has {self.classes}: the class "
                            "list of the data and that of the model differ")
        return Pairs.of(present, device)
