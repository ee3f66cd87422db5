"""Image encoders: what all of them are, what a pyramid is, and two pyramids, ResNet with deep or plain stem and VGG-16.

    ImageEncoder    every encoder: `cells`, unit features of an image on one grid
    Encoder         also a pyramid: the maps of stages 0..4; stride 8 by default

`model.backbone.door.build_encoder` builds all. An encoder normalises its own input (its statistics are buffers).
"""

from collections.abc import Mapping
from typing import ClassVar

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from model.ops import Pixels, resize
from util.errors import UserError

Statistic = tuple[float, float, float]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def stage_features(stage3: Tensor, stage4: Tensor) -> Tensor:
    """Unit features of a CNN on the grid of stage 3: each stage to unit length, both with equal weight. B (C3 + C4) h w."""
    stages = (stage3, resize(stage4, stage3.shape[2:], corners=False))
    return torch.cat([F.normalize(stage, dim=1) for stage in stages], 1) / 2**0.5


class ImageEncoder(nn.Module):
    """What every encoder is: the features of an image on one grid. A system says which kind it needs (`System.needs`).

    Attributes:
        hub: the timm model whose weights fit.
        reads: what it is, in an error.
    """

    hub: str
    reads: ClassVar[str] = "one grid of features"

    def cells(self, images: Tensor) -> Tensor:
        """Return the unit features of each cell: B 3 H W RGB 0..255 -> B C h w, C of length 1."""
        raise NotImplementedError

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename published weights to our names; surplus keys may stay."""
        raise NotImplementedError

    def load_weights(self, state: Mapping[str, Tensor], name: str) -> None:
        """Load published weights (a classifier's head is left out).

        Raises:
            UserError: a tensor of the encoder is missing or has another shape (another patch size or grid).
        """
        found, own = self.translate(state), self.state_dict()
        wanted = [key for key in own if not key.endswith("num_batches_tracked")]
        missing = [key for key in wanted if key not in found]
        wrong = [f"{key} {tuple(found[key].shape)} instead of {tuple(own[key].shape)}" for key in wanted
                 if key in found and found[key].shape != own[key].shape]  # fmt: skip
        if missing or wrong:
            raise UserError(f"Method.backbone_weight: {name} does not fit this backbone, {self.hub}: {len(missing)} tensors "
                            f"missing ({', '.join(missing[:3])}), {len(wrong)} of another shape ({', '.join(wrong[:3])})")
        self.load_state_dict(own | {key: found[key] for key in wanted})


class Encoder(ImageEncoder):
    """Base class of pyramids. Subclasses define `maps` (normalised image -> stage maps) and `translate`.

    Attributes:
        channels: output channels of stages 0..4.
        hub: the timm model whose ImageNet weights fit.
        blocks: how many maps each level of `pyramid` has; None where there is no `pyramid`.
    """

    reads: ClassVar[str] = "a pyramid of maps"
    blocks: tuple[int, int, int] | None = None

    def __init__(self, channels: tuple[int, ...], hub: str, mean: Statistic = IMAGENET_MEAN, std: Statistic = IMAGENET_STD):
        super().__init__()
        self.channels = channels
        self.hub = hub
        self.normalise = Pixels(mean, std)

    def forward(self, images: Tensor, mask: Tensor | None = None, last: int = 4) -> list[Tensor]:
        """Run stages 0..last.

        Args:
            images: B 3 S S RGB 0..255.
            mask: optional B 1 S S in {0, 1}, multiplied onto the *normalised* image (HDMNet's masked support).
        Returns:
            maps of stages 0..last; stages 2..4 have stride 8 (VGG: stage 2 stride 8, stages 3 and 4 stride 16).
        """
        x = self.normalise(images)
        return self.maps(x if mask is None else x * mask, last)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return the inputs of every block's last ReLU (HSNet), levels fine to coarse: B 3 S S RGB 0..255 -> 3 x B n C h w."""
        raise NotImplementedError

    def stage_of(self, level: Tensor) -> Tensor:
        """Return the stage map that a level of `pyramid` ends with: B n C h w -> B C h w."""
        return level[:, -1].relu()

    def cells(self, images: Tensor) -> Tensor:
        return stage_features(*self(images)[3:])

    def maps(self, x: Tensor, last: int) -> list[Tensor]:
        raise NotImplementedError

    def last_stage(self, stage3: Tensor) -> Tensor:
        """Return stage 4 of a (masked) stage-3 map."""
        raise NotImplementedError


class _Staged(Encoder):
    """An encoder of stages that run one after the other, up to the last one asked for."""

    def __init__(self, stages: list[nn.Module], channels: tuple[int, ...], hub: str):
        super().__init__(channels, hub)
        self.stages = nn.ModuleList(stages)

    def maps(self, x: Tensor, last: int) -> list[Tensor]:
        out = []
        for stage in self.stages[: last + 1]:
            x = stage(x)
            out.append(x)
        return out

    def last_stage(self, stage3: Tensor) -> Tensor:
        return self.stages[4](stage3)

    def torchvision_name(self, name: str) -> str:
        """Return torchvision's name of a tensor in our state dict."""
        raise NotImplementedError


class ResNetEncoder(_Staged):
    """ResNet-50/101.

    Args:
        depth: 50 or 101.
        deep: semseg's deep stem (3x3/2, 3x3, 3x3) instead of torchvision's plain one (7x7/2).
        dilated: stage 3 by 2 and stage 4 by 4, so that both keep stride 8; else they have strides 16 and 32. Every 3x3 of a
            dilated stage has the full rate, also in the first block (unlike timm's own rule).
    """

    def __init__(self, depth: int, width: int, deep: bool, dilated: bool):
        depths = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth]
        channels = tuple(width * 2**i for i in range(4))
        stem = {"stem_type": "deep", "stem_width": width} if deep else {}
        net = ResNet(Bottleneck, depths, channels=channels, zero_init_last=False, **stem)
        for stage, rate in ((net.layer3, 2), (net.layer4, 4)) if dilated else ():
            for block in stage:
                block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (rate, rate), (rate, rate)
                if block.downsample is not None:
                    block.downsample[0].stride = (1, 1)
        stem = nn.Sequential(*(net.conv1 if deep else [net.conv1]), net.bn1, net.act1, net.maxpool)
        super().__init__([stem, net.layer1, net.layer2, net.layer3, net.layer4],
                         (net.bn1.num_features, *(4 * c for c in channels)),
                         hub=f"resnet{depth}s.gluon_in1k" if deep else f"resnet{depth}.tv_in1k")  # fmt: skip
        self.blocks = depths[1:]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        x, levels = self.maps(self.normalise(images), last=1)[1], []
        for stage in self.stages[2:]:
            level = []
            for block in stage:
                level.append(before_relu(block, x))
                x = level[-1].relu()
            levels.append(torch.stack(level, 1))
        return levels

    def torchvision_name(self, name: str) -> str:
        for ours, theirs in (("stages.0.0.", "conv1."), ("stages.0.1.", "bn1."), ("stages.", "layer")):
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if "conv1.0.weight" in state:  # timm
            stem = {f"conv1.{i}": f"0.{i}" for i in (0, 1, 3, 4, 6)} | {"bn1": "0.7"}
        else:  # semseg's resnet50_v2.pth
            stem = {"conv1": "0.0", "bn1": "0.1", "conv2": "0.3", "bn2": "0.4", "conv3": "0.6", "bn3": "0.7"}
        found = {}
        for key, value in state.items():
            module, _, leaf = key.rpartition(".")
            found[f"stages.{stem[module]}.{leaf}" if module in stem else key.replace("layer", "stages.", 1)] = value
        return found


def before_relu(block: Bottleneck, x: Tensor) -> Tensor:
    """Return a bottleneck's residual sum, without its last ReLU."""
    shortcut = x if block.downsample is None else block.downsample(x)
    x = block.act1(block.bn1(block.conv1(x)))
    x = block.act2(block.bn2(block.conv2(x)))
    return block.bn3(block.conv3(x)) + shortcut


class VGGEncoder(_Staged):
    """VGG-16, with or without batch norm, cut after each pooling layer; stage 4 ends before the last one."""

    SPLITS = {"vgg16_bn": ((0, 7), (7, 14), (14, 24), (24, 34), (34, 43)),
              "vgg16": ((0, 5), (5, 10), (10, 17), (17, 24), (24, 30))}  # fmt: skip
    blocks = (3, 3, 1)

    def __init__(self, name: str):
        layers = timm.create_model(name, num_classes=0).features
        self.splits = self.SPLITS[name]
        super().__init__([layers[start:stop] for start, stop in self.splits], (64, 128, 256, 512, 512), f"{name}.tv_in1k")
        for stage in range(5):  # slicing keeps timm's numbers: count from 0 in each stage
            self.stages[stage] = nn.Sequential(*self.stages[stage])

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return the inputs of the ReLUs of the last two stages, and the last pooling's output."""
        x, levels = self.maps(self.normalise(images), last=2)[2], []
        for stage in self.stages[3:]:
            level = []
            for layer in stage:
                if isinstance(layer, nn.ReLU):
                    level.append(x)
                    x = x.relu()  # not in place, as the layer would
                else:
                    x = layer(x)
            levels.append(torch.stack(level, 1))
        return [*levels, F.max_pool2d(x, 2)[:, None]]

    def torchvision_name(self, name: str) -> str:
        _, stage, layer, leaf = name.split(".")
        return f"features.{self.splits[int(stage)][0] + int(layer)}.{leaf}"

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        place = {i: f"stages.{s}.{i - start}" for s, (start, stop) in enumerate(self.splits) for i in range(start, stop)}
        found = {}
        for key, value in state.items():
            part = key.split(".")
            if part[0] == "features" and int(part[1]) in place:
                found[f"{place[int(part[1])]}.{part[2]}"] = value
        return found
