"""PFENet (TPAMI 2020): a feature enrichment pyramid over query, prototype and prior, on a frozen ImageNet backbone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.few_shot import system
from model.few_shot.parts import PrototypeHead, classifier, double_conv, reduce_block
from model.few_shot.prior import Features, join
from model.few_shot.system import IDENTITY, Decoded, FewShot
from model.losses import segmentation_loss
from model.ops import resize
from util.data.episodes import Episode
from util.errors import UserError
from util.run.identity import Facts

PUBLISHED = (60, 30, 15, 8)  # sides of the pyramid's grids on a feature grid of 60, images of 473 pixels


class Head(PrototypeHead):
    """Everything that PFENet trains.

    Args:
        channels: of stage 2 + stage 3 together.
        priors: number of prior channels.
        scales: sides of the pyramid's square grids, finest first; None: PUBLISHED, in proportion to the feature grid.
    """

    def __init__(self, channels: int, priors: int, scales: Sequence[int] | None, width: int = 256):
        super().__init__(channels, width)
        self.scales = scales and tuple(scales)
        each = range(len(self.scales or PUBLISHED))
        self.init_merge = nn.ModuleList(reduce_block(2 * width + priors, width) for _ in each)
        self.alpha_conv = nn.ModuleList(reduce_block(2 * width, width) for _ in each[1:])
        self.beta_conv = nn.ModuleList(double_conv(width) for _ in each)
        self.inner_cls = nn.ModuleList(classifier(width) for _ in each)
        self.res1 = reduce_block(len(each) * width, width)
        self.res2 = double_conv(width)
        self.cls = classifier(width)

    def forward(self, query: Tensor, support: Tensor, mask: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            query: B C h w; support: B*K C h w; mask: B*K 1 S S; maps: see `prior.join`.
        Returns:
            logits B 2 h w, and those of each scale of the pyramid, finest first.
        """
        query, _, prototypes = self.reduced(query, support, mask)
        prototype, prior = prototypes.mean(1), join(maps)
        pyramid, inner, finer = [], [], None
        for i, side in enumerate(self.sides(query.shape[-1])):
            pooled = F.adaptive_avg_pool2d(query, side)
            x = self.init_merge[i](torch.cat([pooled, prototype.expand_as(pooled), resize(prior, (side, side))], 1))
            if finer is not None:  # inter-scale interaction, from fine to coarse
                x = x + self.alpha_conv[i - 1](torch.cat([x, resize(finer, (side, side))], 1))
            x = x + self.beta_conv[i](x)
            inner.append(self.inner_cls[i](x))
            finer = resize(x, query.shape[2:])
            pyramid.append(finer)
        x = self.res1(torch.cat(pyramid, 1))
        return self.cls(x + self.res2(x)), inner


    def sides(self, grid: int) -> Sequence[int]:
        """Sides of the pyramid's grids for a feature grid of this side."""
        return self.scales or [-(-grid * side // PUBLISHED[0]) for side in PUBLISHED]


@dataclass
class Options(system.Options):
    """PFENet's own options."""

    ppm_scales: list[int] | None = None  # sides of the pyramid's grids; None: as published, in proportion to the feature grid

    def check(self) -> None:
        if self.ppm_scales is not None and min(self.ppm_scales, default=0) < 1:
            raise UserError(f"Method.ppm_scales = {self.ppm_scales}: name at least one side, each at least 1")


class PFENet(FewShot):
    """PFENet with its own cosine prior, or any other. It has no base learner: its backbone keeps the ImageNet weights."""

    facts = Facts(identity=(*IDENTITY, "Train.shot", "Method.low_fea"), priors=("cosine",))
    Options = Options
    official = (("backbone.module.stages.", "layer"), ("head.", ""))

    def build_head(self, channels: int, priors: int) -> Head:
        return Head(channels, priors, self.options.ppm_scales)

    def decode(self, head: nn.Module, features: Features, maps: Sequence[Tensor], own: Tensor) -> Decoded:
        logits, inner = head(features.query.middle, features.support.middle, features.mask, maps)
        return Decoded(logits, inner=inner)

    def terms(self, decoded: Decoded, features: Features, episode: Episode) -> dict[str, Tensor]:
        target = episode.query_mask.long()
        inner = torch.stack([segmentation_loss(logits, target) for logits in decoded.inner])
        return {"main": segmentation_loss(decoded.final, target), "inner": inner.mean()}
