"""HSNet (ICCV 2021): cosines between all positions of query and support, at every block of the backbone, squeezed by 4-D
convolutions (conv4d.py).

Shapes: B episodes, K shots, N = B*K, n blocks of a level, c channels, (h, w) the query's grid, (k, l) the support's.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.backbone.encoder import stage_features
from model.few_shot.contrast import coarser
from model.few_shot.conv4d import CenterPivotConv4d, CorrelationConv4d, Cosines, NormReLU4d, Pair, on_query_grid, unit
from model.few_shot.prior import Features
from model.few_shot.system import IDENTITY, Decoded, FewShot
from model.losses import segmentation_loss
from model.ops import resize
from util.config import Method
from util.data.episodes import Episode
from util.errors import UserError
from util.run.identity import Facts

WIDTHS, GROUPS = (16, 64, 128), 4
SQUEEZE = {"4": ((3, 3, 3), (2, 2, 2)), "3": ((5, 3, 3), (4, 2, 2)), "2": ((5, 5, 3), (4, 4, 2))}  # level: kernels, strides


def block(widths: Sequence[int], kernels: Sequence[int], strides: Sequence[int], first: type[CenterPivotConv4d]) -> nn.Sequential:
    """[4-D convolution, group norm, ReLU] x 3, each under its published number; first: class of the first convolution."""
    layers = []
    for inputs, outputs, kernel, stride in zip(widths, widths[1:], kernels, strides, strict=False):
        conv = CenterPivotConv4d if layers else first
        layers += [conv(inputs, outputs, kernel, stride), NormReLU4d(GROUPS, outputs), nn.Identity()]
    return nn.Sequential(*layers)


class Encoder4d(nn.Module):
    """Squeezes the support side of each level to a few cells, then mixes the levels from coarse to fine.

    Args:
        blocks: maps of levels 2, 3, 4.
    """

    def __init__(self, blocks: Sequence[int]):
        super().__init__()
        wide = (WIDTHS[-1],) * 4
        for n, (level, how) in zip(reversed(blocks), SQUEEZE.items(), strict=True):
            self.add_module(f"encoder_layer{level}", block((n, *WIDTHS), *how, CorrelationConv4d))
        self.encoder_layer4to3 = block(wide, (3, 3, 3), (1, 1, 1), CenterPivotConv4d)
        self.encoder_layer3to2 = block(wide, (3, 3, 3), (1, 1, 1), CenterPivotConv4d)

    def forward(self, pairs: Iterable[Sequence[Pair]]) -> Tensor:
        """Levels 2, 3, 4 of N pairs -> N 128 h w on the grid of level 2.

        Pairs go one by one: no slower, as each is large, and no more memory than one needs.
        """
        return torch.cat([self.encode(*levels) for levels in pairs])

    def encode(self, fine: Pair, middle: Pair, coarse: Pair) -> Tensor:
        s2, s3, s4 = self.encoder_layer2(fine), self.encoder_layer3(middle), self.encoder_layer4(coarse)
        if not s2.shape[4:] == s3.shape[4:] == s4.shape[4:]:
            cells = " and ".join(f"{s.shape[4]} x {s.shape[5]}" for s in (s2, s3, s4))
            raise UserError(f"HSNet cannot mix its levels at this image side, they are squeezed to {cells} cells: change "
                            "Train.train_h and Train.val_size (VGG: not 264 to 287 nor 520 to 543)")
        mixed = self.encoder_layer4to3(s3 + on_query_grid(lambda x: resize(x, s3.shape[2:4]), s4))
        mixed = self.encoder_layer3to2(s2 + on_query_grid(lambda x: resize(x, s2.shape[2:4]), mixed))
        return mixed.mean((4, 5))


class Decoder(nn.Module):
    """N 128 h w -> background and foreground logits N 2 2h 2w."""

    def __init__(self, width: int = WIDTHS[-1]):
        super().__init__()
        conv = lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1)  # noqa: E731
        self.decoder1 = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width // 2), nn.ReLU())
        self.decoder2 = nn.Sequential(conv(width // 2, width // 2), nn.ReLU(), conv(width // 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.decoder1(x)
        return self.decoder2(resize(x, (2 * x.shape[2], 2 * x.shape[3])))


class Head(nn.Module):
    """Everything that HSNet trains."""

    def __init__(self, blocks: Sequence[int]):
        super().__init__()
        self.encoder = Encoder4d(blocks)
        self.decoder = Decoder()

    def forward(self, query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Levels 2, 3, 4: B n C h w of queries, B*K n C h w of supports; mask: B*K 1 S S. Logits B*K 2 h w at twice level 2."""
        return self.decoder(self.encoder(self.pairs(query, support, mask)))

    @staticmethod
    def pairs(query: Sequence[Tensor], support: Sequence[Tensor], mask: Tensor) -> Iterator[list[Pair]]:
        """Each support with its query, whose vectors are normalised once."""
        masks, shot = [resize(mask, level.shape[3:]) for level in support], len(mask) // len(query[0])
        for i in range(len(query[0])):
            vectors = [unit(level[i]) for level in query]
            for j in range(i * shot, (i + 1) * shot):
                yield [Cosines(q, s[j], m[j, 0]) for q, s, m in zip(vectors, support, masks, strict=True)]


def vote_scores(votes: Tensor) -> Tensor:
    """Turn logits B K 2 h w of each shot into B 2 h w whose argmax is the vote; one shot keeps its own."""
    if votes.shape[1] == 1:
        return votes[:, 0]
    count = votes.argmax(2).sum(1).float()
    return torch.stack([count.amax((1, 2), keepdim=True).clamp(min=1).expand_as(count) / 2 - 0.25, count], 1)


@dataclass
class Options(Method):
    """HSNet's own options."""

    foreground_weight: float = 1  # of a foreground pixel in the loss; 1 as published, more where things are small (demo)

    def check(self) -> None:
        if not 0 < self.foreground_weight < math.inf:
            raise UserError(f"Method.foreground_weight = {self.foreground_weight}: must be a positive number")


class HSNet(FewShot):
    """HSNet, trained with one shot; several shots vote. Its backbone keeps the ImageNet weights and its strides."""

    facts = Facts(identity=IDENTITY)  # without Train.shot: a checkpoint works with any number of shots
    Options = Options
    dilated = False
    optimizer_name = "adam"  # its rate is constant where Train.power is 0, as published
    official = (("head.encoder.", "hpn_learner."), ("head.decoder.", "hpn_learner."))

    unused: ClassVar[tuple[str, ...]] = ("backbone.fc.", "backbone.classifier.")  # parts of published checkpoints

    def build_head(self, channels: int, priors: int) -> nn.Module:
        if self.priors:
            raise UserError(f"Method.priors = {[prior.name for prior in self.priors]}: HSNet takes no priors, leave it out")
        self.check_backbone()
        return Head(self.encoder.blocks)

    def check_backbone(self) -> None:
        if self.encoder.blocks is None:
            raise UserError(f"Method.backbone: HSNet cannot use {self.encoder.hub!r}, it reads every block of a resnet50, "
                            "resnet101, vgg16, vgg16_bn or an EfficientNet of timm (timm:tf_efficientnet_lite0)")

    def view(self, images: Tensor, mask: Tensor | None, needs: frozenset[str]) -> dict[str, Tensor]:
        fine, middle, coarse = self.encoder.pyramid(images)
        found = {"level2": fine, "level3": middle, "level4": coarse}
        if "stage4" in needs:
            found["stage4"] = self.encoder.stage_of(coarse)
        if "cells" in needs:
            found["cells"] = coarser(stage_features(self.encoder.stage_of(middle), self.encoder.stage_of(coarse)).float())
        if "masked4" in needs:
            found["masked4"] = self.masked4(self.encoder.stage_of(middle), mask)
        return found

    def decode(self, head: nn.Module, features: Features, maps: Sequence[Tensor], own: Tensor) -> Decoded:
        votes = head(features.query.levels, features.support.levels, features.mask).unflatten(0, (-1, features.shot))
        return Decoded(vote_scores(votes), votes=votes)

    def terms(self, decoded: Decoded, features: Features, episode: Episode) -> dict[str, Tensor]:
        target = (episode.query_mask == 1).long()  # unlabelled pixels are background, as published
        target = target.repeat_interleave(features.shot, 0)
        return {"main": segmentation_loss(decoded.votes.flatten(0, 1), target, self.options.foreground_weight)}

    def official_name(self, name: str) -> str | None:
        if name.startswith("backbone."):
            return "backbone." + self.encoder.torchvision_name(name.removeprefix("backbone.module."))
        return super().official_name(name)

    def _check_foreign(self, foreign: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        return super()._check_foreign({key: value for key, value in foreign.items() if not key.startswith(self.unused)}, name)
