"""CLIP-ES (CVPR 2023): pseudo labels from image-level labels and CLIP alone. Nothing is trained."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.system import Frozen, Prediction
from model.weak.maps import Bank, MapOptions, class_scores, refined_maps, see, with_background
from model.weak.system import Weak
from util.config import Train
from util.errors import UserError
from util.run.identity import Facts
from util.score import crf


@dataclass
class Options(MapOptions):
    """The published ones; on COCO box=0.7."""

    power: float = 1.0  # the background is (1 - largest map) ** power; published: the better of 1 and 2

    def check(self) -> None:
        super().check()
        if self.power <= 0:
            raise UserError(f"Method.power = {self.power}: the exponent of the background is positive")


class CLIPES(Weak):
    """CLIP-ES. `predict` reads the image-level labels: its scores are labels to train on, never a result to compare with that of
    a system that has to find out which classes are there."""

    facts = Facts(frozen=False, clip=True, trained=False)
    Options = Options
    options: Options

    def __init__(self, clip: Frozen, bank: Bank, options: Options):
        super().__init__(clip, bank, options)
        self.head = nn.Module()

    def groups(self, train: Train) -> list[dict[str, Any]]:
        return []

    def losses(self, batch: Any, step: int = 0) -> dict[str, Tensor]:
        raise UserError("CLIP_ES trains nothing: test it, or write its label maps")

    @torch.no_grad()
    def predict(self, batch: Any, baselines: bool = False) -> Prediction:
        """Scores of the refined maps at the image's size, 0 for classes that are not among the image's labels.

        `variants` has "CAM": the maps before attention spreads them.
        """
        size = batch.image.shape[2:]
        pairs = self.pairs(batch.present, batch.image.device)
        images = self.normalise(whole_patches(batch.image, self.vision.visual.patch))
        o = self.options
        maps = refined_maps(self.vision, self.bank, see(self.vision.visual, images, o.layers), pairs, o.box, o.layers)
        refined, cam = (class_scores(with_background(m, size, o.power), pairs, self.classes) for m in (maps.spread, maps.cam))
        return Prediction(refined, variants={"CAM": cam}, crf=crf.CLIP_ES, logits=False)


def whole_patches(images: Tensor, patch: int) -> Tensor:
    """B 3 H W RGB 0..255 with both sides raised to a multiple of the patch: bicubic as Pillow's, whole grey levels."""
    size = [-(-side // patch) * patch for side in images.shape[2:]]
    if size == list(images.shape[2:]):
        return images
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).round().clamp(0, 255)
