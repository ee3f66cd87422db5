"""Contrast map: similarity to the supports' object minus similarity to their background, so positive where the
object is more similar. Nothing is trained.

A cell's feature is that of `ImageEncoder.cells`: a patch token (ViT), or stages 3 and 4 side by side (CNN).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from util.errors import UserError


def contrast(target: Tensor, supports: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Cosine to the mean support foreground minus cosine to the mean support background.

    Args:
        target: C h w; supports: K C h w, of unit length.
        masks: K annotations H W of any size: 1 object, 0 background, anything else (255) counts as neither. A support without
            an object is left out.
    Returns:
        h w in -2..2.
    Raises:
        UserError: no support has an object.
    """
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])  # mean features of object and background, C each
    for support, mask in zip(supports, masks, strict=True):
        if not (mask == 1).any():
            continue
        for means, value in zip(sides, (1, 0), strict=True):
            share = F.adaptive_avg_pool2d((mask == value).to(support.dtype)[None], support.shape[1:])[0]
            means.append((support * share).sum((1, 2)) / share.sum().clamp(min=torch.finfo(share.dtype).tiny))
    if not sides[0]:
        raise UserError("contrast: no support has a foreground pixel")
    likeness = [torch.einsum("chw,c->hw", target, F.normalize(torch.stack(means).mean(0), dim=0)) for means in sides]
    return likeness[0] - likeness[1]
