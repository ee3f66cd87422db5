"""HSNet (ICCV 2021): cosines between all positions of query and support, at every block of the backbone, squeezed by 4-D
convolutions.

Shapes: B episodes, K shots, N = B*K, n blocks of a level, c channels, (h, w) the query's grid, (k, l) the support's.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.few_shot.prior import Features
from model.few_shot.system import IDENTITY, Decoded, FewShot
from model.losses import segmentation_loss
from model.ops import full, resize
from model.system import NoOptions
from util.data.episodes import Episode
from util.errors import UserError
from util.run.identity import Facts

WIDTHS, GROUPS = (16, 64, 128), 4
SQUEEZE = {"4": ((3, 3, 3), (2, 2, 2)), "3": ((5, 3, 3), (4, 2, 2)), "2": ((5, 5, 3), (4, 4, 2))}  # level: kernels, strides


def correlation(query: Tensor, support: Tensor) -> Tensor:
    """Cosines, negative ones set to 0: N n C h w and N n C k l -> N n h w k l. The 1e-5 is added to the norms, as published."""

    def unit(x: Tensor) -> Tensor:
        x = full(x).flatten(3)
        return x / (x.norm(dim=2, keepdim=True) + 1e-5)

    cosines = unit(query).transpose(2, 3) @ unit(support)  # N n hw kl
    return cosines.clamp(min=0).unflatten(3, support.shape[3:]).unflatten(2, query.shape[3:])


def masked(level: Tensor, mask: Tensor) -> Tensor:
    """A level N n C h w times a mask N 1 S S, resized to it."""
    return level * resize(mask, level.shape[3:])[:, None]


class CenterPivotConv4d(nn.Module):
    """A 4-D convolution with a sparse kernel: the sum of a 2-D one over the query's grid and one over the support's.

    Both read N c h w k l and give N c' h w k' l', where k' = ceil(k / stride).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)

    def forward(self, x_NchwKL: Tensor) -> Tensor:
        x = x_NchwKL
        on_query = on_query_grid(self.conv1, x[..., :: self.stride, :: self.stride])
        y = self.conv2(x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))  # Nhw c k l
        return on_query + y.unflatten(0, (len(x), *x.shape[2:4])).permute(0, 3, 1, 2, 4, 5)


def on_query_grid(layer, x_NchwKL: Tensor) -> Tensor:
    """Applies a 2-D layer to the query's grid at every position of the support: N c h w k l -> N c' h' w' k l."""
    x = x_NchwKL
    y = layer(x.permute(0, 4, 5, 1, 2, 3).flatten(0, 2))  # Nkl c h w
    return y.unflatten(0, (len(x), *x.shape[4:])).permute(0, 3, 4, 5, 1, 2)


def block(widths: Sequence[int], kernels: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    """[4-D convolution, group norm, ReLU] x 3."""
    layers = []
    for inputs, outputs, kernel, stride in zip(widths, widths[1:], kernels, strides, strict=False):
        layers += [CenterPivotConv4d(inputs, outputs, kernel, stride), nn.GroupNorm(GROUPS, outputs), nn.ReLU()]
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
            self.add_module(f"encoder_layer{level}", block((n, *WIDTHS), *how))
        self.encoder_layer4to3 = block(wide, (3, 3, 3), (1, 1, 1))
        self.encoder_layer3to2 = block(wide, (3, 3, 3), (1, 1, 1))

    def forward(self, correlations: Sequence[Tensor]) -> Tensor:
        """N n h w k l of levels 2, 3, 4 -> N 128 h w on the grid of level 2."""
        fine, middle, coarse = correlations
        s2, s3, s4 = self.encoder_layer2(fine), self.encoder_layer3(middle), self.encoder_layer4(coarse)
        if not s2.shape[4:] == s3.shape[4:] == s4.shape[4:]:
            cells = " and ".join(f"{s.shape[4]} x {s.shape[5]}" for s in (s2, s3, s4))
            raise UserError(f"HSNet cannot mix its levels at this image side, they are squeezed to {cells} cells: change "
                            "Train.train_h and Train.val_size (VGG: not 264 to 287 nor 520 to 543)")
        mixed = self.encoder_layer4to3(on_query_grid(lambda x: resize(x, s3.shape[2:4]), s4) + s3)
        mixed = self.encoder_layer3to2(on_query_grid(lambda x: resize(x, s2.shape[2:4]), mixed) + s2)
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
        """Levels 2, 3, 4, each N n C h w; mask: N 1 S S of the support. Logits N 2 h w at twice level 2."""
        pairs = zip(query, support, strict=True)
        return self.decoder(self.encoder([correlation(q, masked(s, mask)) for q, s in pairs]))


def vote_scores(votes: Tensor) -> Tensor:
    """Turn logits B K 2 h w of each shot into B 2 h w whose argmax is the vote; one shot keeps its own."""
    if votes.shape[1] == 1:
        return votes[:, 0]
    count = votes.argmax(2).sum(1).float()
    return torch.stack([count.amax((1, 2), keepdim=True).clamp(min=1).expand_as(count) / 2 - 0.25, count], 1)


class HSNet(FewShot):
    """HSNet, trained with one shot; several shots vote. Its backbone keeps the ImageNet weights and its strides."""

    facts = Facts(identity=IDENTITY)  # without Train.shot: a checkpoint works with any number of shots
    Options = NoOptions
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
                            "resnet101, vgg16 or vgg16_bn")

    def view(self, images: Tensor, mask: Tensor | None, needs: frozenset[str]) -> dict[str, Tensor]:
        fine, middle, coarse = self.encoder.pyramid(images)
        found = {"level2": fine, "level3": middle, "level4": coarse}
        if "stage4" in needs:
            found["stage4"] = coarse[:, -1].relu()
        if "masked4" in needs:
            found["masked4"] = self.masked4(middle[:, -1].relu(), mask)
        return found

    def decode(self, head: nn.Module, features: Features, maps: Sequence[Tensor], own: Tensor) -> Decoded:
        query = [level.repeat_interleave(features.shot, 0) for level in features.query.levels]
        votes = head(query, features.support.levels, features.mask).unflatten(0, (-1, features.shot))
        return Decoded(vote_scores(votes), votes=votes)

    def terms(self, decoded: Decoded, features: Features, episode: Episode) -> dict[str, Tensor]:
        target = (episode.query_mask == 1).long()  # unlabelled pixels are background, as published
        return {"main": segmentation_loss(decoded.votes.flatten(0, 1), target.repeat_interleave(features.shot, 0))}

    def official_name(self, name: str) -> str | None:
        if name.startswith("backbone."):
            return "backbone." + self.encoder.torchvision_name(name.removeprefix("backbone.module."))
        return super().official_name(name)

    def _check_foreign(self, foreign: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        return super()._check_foreign({key: value for key, value in foreign.items() if not key.startswith(self.unused)}, name)
