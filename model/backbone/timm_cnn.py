"""CNNs and other networks of timm: pyramids of five or four levels, and networks whose last two levels alone can be used."""

import re
from collections.abc import Mapping

import timm
import torch
from torch import Tensor

from model.backbone.encoder import Encoder, ImageEncoder, stage_features
from model.ops import Pixels, resize
from util.errors import UserError

OTHERS = ("Those that work are CNNs of four or five levels that timm can dilate, as resnet18, tf_efficientnet_lite0, "
          "convnext_tiny; docs/extending.md (An encoder) says why, and which interface to write for others")
TRIED = 65  # side of the image that a network of timm is tried with: 8 n + 1, as all sides of training


class TimmEncoder(Encoder):
    """Any timm CNN with five feature levels, or four (ConvNeXt): stage 0 is then the normalised image itself.

    Args:
        dilated: stages 3 and 4 keep stride 8; else they have strides 16 and 32, and the EfficientNet family has a `pyramid`.
    """

    def __init__(self, name: str, dilated: bool = True):
        try:
            body = timm.create_model(name, features_only=True, output_stride=8 if dilated else 32)
        except Exception as error:  # timm raises many kinds: no features, no dilation
            raise UserError(f"Method.backbone = 'timm:{name}': timm cannot build it as a pyramid ({error}). {OTHERS}") from error
        channels = tuple(body.feature_info.channels())
        if len(channels) not in (4, 5):
            raise UserError(f"Method.backbone = 'timm:{name}' has {len(channels)} feature levels, not four or five. {OTHERS}")
        first = (3,) * (5 - len(channels))
        super().__init__(first + channels, name, body.pretrained_cfg["mean"], body.pretrained_cfg["std"])
        self.body, self.first = body, len(first)
        self._try(name, dilated)

    def _try(self, name: str, dilated: bool) -> None:
        """Run one small image. Raises UserError where that fails, or its levels differ from those of `Encoder.forward`."""
        mode = self.training
        self.eval()
        try:
            with torch.no_grad():
                x = torch.linspace(-2, 2, 3 * TRIED**2).view(1, 3, TRIED, TRIED)
                maps = self.maps(x, 4)
                last = self.last_stage(maps[3])
                if not dilated and hasattr(self.body, "blocks"):
                    levels = self.levels(x)
                    self.blocks = tuple(level.shape[1] for level in levels)
        except Exception as error:  # fixed sizes, levels that end within a block: every network fails in its own way
            raise UserError(f"Method.backbone = 'timm:{name}' cannot run on {TRIED} x {TRIED} pixels "
                            f"({type(error).__name__}: {error}). {OTHERS}") from error
        finally:
            self.train(mode)
        sizes = [tuple(x.shape[-2:]) for x in maps]
        wrong = ""
        if dilated and len(set(sizes[2:])) > 1 or tuple(x.shape[1] for x in maps) != self.channels:
            wrong = f"its levels have sizes {sizes} for {TRIED} x {TRIED} pixels, but levels 2 to 4 must be of one size"
        elif last.shape != maps[4].shape or not torch.allclose(last, maps[4], rtol=1e-3, atol=1e-5):
            wrong = "its level 4 is not what follows from level 3"
        if wrong:
            raise UserError(f"Method.backbone = 'timm:{name}': {wrong}. {OTHERS}")

    def maps(self, x: Tensor, last: int) -> list[Tensor]:
        return [*[x] * self.first, *self.body(x)][: last + 1]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of the last blocks at strides 8, 16 and 32: linear, so there is no ReLU to be before."""
        return self.levels(self.normalise(images))

    def levels(self, x: Tensor) -> list[Tensor]:
        x, levels = self.body.bn1(self.body.conv_stem(x)), {}
        for block in (block for stage in self.body.blocks for block in stage):
            x = block(x)
            level = levels.setdefault(x.shape[2:], [])
            if level and level[-1].shape != x.shape:
                level.clear()  # of each grid the maps with its last number of channels
            level.append(x)
        return [torch.stack(level, 1) for level in list(levels.values())[-3:]]

    def stage_of(self, level: Tensor) -> Tensor:
        return level[:, -1]

    def last_stage(self, stage3: Tensor) -> Tensor:
        """Run stage 4: the modules after the end of level 3, to the end of level 4. timm names the last module of each level."""
        stages = getattr(self.body, "blocks", self.body)  # the EfficientNet family keeps its stages in `blocks`
        ends = [name.removeprefix("blocks.").replace(".", "_") for name in self.body.feature_info.module_name()]
        names = [name for name, _ in stages.named_children()]
        for name in names[names.index(ends[-2]) + 1 : names.index(ends[-1]) + 1]:
            stage3 = stages.get_submodule(name)(stage3)
        return stage3

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        flat = {re.sub(r"^(stem|stages)\.(\d+)\.", r"\1_\2.", key): value for key, value in state.items()}  # ConvNeXt, cut
        return {f"body.{key}": value for key, value in (state | flat).items()}


class LevelEncoder(ImageEncoder):
    """The last two levels of a hierarchical network that timm cannot dilate or cut (SAM 2's Hiera): one grid, no pyramid.

    Images are resized to multiples of the last level's stride.
    """

    def __init__(self, name: str):
        super().__init__()
        try:
            body = timm.create_model(name, features_only=True)
            self.channels, self.stride = sum(body.feature_info.channels()[-2:]), body.feature_info.reduction()[-1]
            with torch.no_grad():
                for height, width in ((2, 3), (4, 4)):
                    maps = body.eval()(torch.zeros(1, 3, height * self.stride, width * self.stride))[-2:]
                    if [(x.shape[1], *x.shape[2:]) for x in maps] != [
                        (c, height * k, width * k) for c, k in zip(body.feature_info.channels()[-2:], (2, 1), strict=True)
                    ]:
                        raise ValueError(f"maps of shapes {[tuple(x.shape) for x in maps]}")
        except Exception as error:  # fixed sizes, channels last: every network fails in its own way
            raise UserError(f"The last two levels of 'timm:{name}' are not maps of any image size ({error})") from error
        self.hub, self.body = name, body
        self.normalise = Pixels(body.pretrained_cfg["mean"], body.pretrained_cfg["std"])

    def cells(self, images: Tensor) -> Tensor:
        size = [max(round(side / self.stride), 1) * self.stride for side in images.shape[2:]]
        return stage_features(*self.body(resize(self.normalise(images), size, corners=False))[-2:])

    def translate(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = self.body.state_dict()
        renamed = {f"model.{key}": value for key, value in state.items()}  # timm wraps the whole network
        return {f"body.{key}": value for key, value in (state | renamed).items() if key in own}
