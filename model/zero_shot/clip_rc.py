"""CLIP-RC (CVPR 2024): ZegCLIP with region tokens, a decoder of two streams and a recovery loss.

Scores depend on the vocabulary: patches attend to the tokens of all classes, so a class added or left out moves every score.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from model.clip import ClipTrunk
from model.ops import full, resize
from model.zero_shot import zegclip
from model.zero_shot.decoder import Layers, RecoveryDecoder
from model.zero_shot.tower import Views

REGIONS = 4  # side of the grid of region tokens


@dataclass
class Options(zegclip.Options):
    """ZegCLIP's, and the weight of the recovery loss: VOC 2 (full: 0), COCO-Stuff 50 (full: 1)."""

    recovery: float = 2.0


class Head(zegclip.Head):
    """Everything that CLIP-RC trains; the recovery decoder only where its loss has a weight."""

    def build_decoder(self, width: int, options: Options) -> None:
        self.lateral_proj = nn.Linear(3 * width, width)
        self.decoder_q, self.decoder_v = (Layers(width, options.dropout, zegclip.DEPTH) for _ in range(2))
        self.recovery = RecoveryDecoder(width, options.dropout) if options.recovery else None

    def aligned(self) -> tuple[list[Tensor], Tensor]:
        return [self.q_proj.weight.chunk(2, 1)[1], self.lateral_proj.weight.chunk(3, 1)[2]], self.decoder_v.layers[-1].norm3.bias

    def forward(self, trunk: ClipTrunk, images: Tensor, texts: Tensor) -> zegclip.Scored:
        views = self.prompts(trunk, images, REGIONS)
        grid = views.patches.shape[2:]
        # Region alignment (Sec. 3.3): each region, with the whole image, meets each class.
        anchors = views.regions.flatten(2).transpose(1, 2) + views.whole[:, None]
        product = anchors[:, :, None] * texts  # B regions C D
        classes, patches = self.describe(product, texts).flatten(1, 2), self.merge(views)
        for of_classes, of_patches in zip(self.decoder_q.layers, self.decoder_v.layers, strict=True):
            classes, patches = of_classes(classes, patches), of_patches(patches, classes)  # both from the old pair
        # The mean over regions of all products is the product of the mean.
        logits = classes.unflatten(1, product.shape[1:3]).mean(1) @ patches.transpose(1, 2)
        extra = self.recover(classes, patches, product, texts, views) if self.training and self.recovery is not None else {}
        return zegclip.Scored(logits.unflatten(2, grid), extra)

    def merge(self, views: Views) -> Tensor:
        """Projects [regions at the patches | whole | patches] to B hw D, each part before it is repeated."""
        of_regions, of_whole, of_patches = self.lateral_proj.weight.chunk(3, 1)
        regions = F.conv2d(views.regions, of_regions[..., None, None])
        merged = resize(regions, views.patches.shape[2:], corners=False) + F.conv2d(views.patches, of_patches[..., None, None])
        return merged.flatten(2).transpose(1, 2) + F.linear(views.whole, of_whole, self.lateral_proj.bias)[:, None]

    def recover(self, classes: Tensor, patches: Tensor, product: Tensor, texts: Tensor, views: Views) -> dict[str, Tensor]:
        """Mean distances to the descriptors before their projection and to CLIP's patch features, which are fixed targets."""
        found, found_patches = (full(x) for x in self.recovery(classes, patches))
        found_product, found_text = found.unflatten(1, product.shape[1:3]).chunk(2, -1)
        product, of_patches = full(product.detach()), full(views.patches.detach().flatten(2).transpose(1, 2))
        of_classes = ((found_product - product).abs().mean() + (found_text - full(texts)).abs().mean()) / 2
        return {"recovery_classes": of_classes, "recovery_patches": (found_patches - of_patches).abs().mean()}


class CLIP_RC(zegclip.ZegCLIP):
    """The system; arguments as ZegCLIP's."""

    Options: ClassVar[type] = Options
    Head: ClassVar[type[nn.Module]] = Head
    official = (("head.prompts.", "backbone."), ("head.recovery.", "decode_head.recovery_decoder."), ("head.", "decode_head."))

    def weigh(self, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.options.recovery * value for name, value in extra.items()}

    def _dead(self, key: str) -> bool:
        without = self.trained.recovery is None and key.startswith("decode_head.recovery_decoder.")
        return ".self_attn." in key or ".norm1." in key or without
