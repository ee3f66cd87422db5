"""The base learner: PSPNet over an encoder, trained on the base classes of a fold, then frozen (BAM Sec. 4.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone.encoder import Encoder
from model.ops import Dropout


class PyramidPooling(nn.Module):
    """PSPNet's pooling at several bin counts, concatenated behind the input: B C h w -> B 2C h w (for four bins)."""

    def __init__(self, channels: int, bins: Sequence[int] = (1, 2, 3, 6)):
        super().__init__()
        reduced = channels // len(bins)
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(b), nn.Conv2d(channels, reduced, 1, bias=False), nn.BatchNorm2d(reduced), nn.ReLU()
            )
            for b in bins
        )  # fmt: skip
        self.out_channels = channels + reduced * len(bins)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        return torch.cat([x] + [F.interpolate(f(x), size, mode="bilinear", align_corners=True) for f in self.features], 1)


class BaseLearner(nn.Module):
    """Encoder, pyramid pooling and classifier over background + base classes.

    Args:
        encoder: five stages.
        classes: number of base classes + 1.
        width: channels of the classifier's hidden map (512 in the papers).
    """

    def __init__(self, encoder: Encoder, classes: int, width: int = 512):
        super().__init__()
        self.encoder = encoder
        self.ppm = PyramidPooling(encoder.channels[4])
        self.cls = nn.Sequential(
            nn.Conv2d(self.ppm.out_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            Dropout(0.1, channels=True), nn.Conv2d(width, classes, 1),
        )  # fmt: skip

    def hidden(self, stage4: Tensor) -> Tensor:
        """The map after the classifier's first conv + BN, before its ReLU ("feat_5"): B width h w."""
        return self.cls[1](self.cls[0](self.ppm(stage4)))

    def classify(self, hidden: Tensor) -> Tensor:
        """feat_5 -> base logits B classes h w."""
        return self.cls[4](self.cls[3](F.relu(hidden)))

    def forward(self, images: Tensor) -> Tensor:
        """B 3 S S RGB 0..255 -> base logits B classes h w at the stride of the encoder."""
        return self.classify(self.hidden(self.encoder(images)[4]))
