"""Contrast map: similarity to the supports' object minus similarity to their background, so positive where the
object is more similar. Nothing is trained.

A cell's feature is that of `ImageEncoder.cells`: a patch token (ViT), or stages 3 and 4 side by side (CNN).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from util.errors import UserError

CELLS = 32  # along a side, at most, of what is kept of an image


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
    if not any((mask == 1).any() for mask in masks):
        raise UserError("contrast: no support has a foreground pixel")
    return contrast_to(target, torch.stack([support_means(support, mask) for support, mask in zip(supports, masks, strict=True)]))


def support_means(support: Tensor, mask: Tensor) -> Tensor:
    """Return the mean features of a support's object and background, 2 C; zeros where it has no object.

    support: C h w of unit length; mask: as in `contrast`.
    """
    sides = []
    for value in (1, 0):
        share = F.adaptive_avg_pool2d((mask == value).to(support.dtype)[None], support.shape[1:])[0]
        sides.append((support * share).sum((1, 2)) / share.sum().clamp(min=torch.finfo(share.dtype).tiny))
    return torch.stack(sides) * (mask == 1).any()


def contrast_to(target: Tensor, means: Tensor) -> Tensor:
    """Return the contrast map h w of a target C h w from the means of K supports, K 2 C."""
    likeness = torch.einsum("chw,sc->shw", target, F.normalize(means.mean(0), dim=1))
    return likeness[0] - likeness[1]


def coarser(unit: Tensor) -> Tensor:
    """Return unit features (..., C, h, w) on a grid of at most `CELLS` a side, so that a cache can keep them."""
    size = [min(side, CELLS) for side in unit.shape[-2:]]
    return unit if size == [*unit.shape[-2:]] else F.normalize(F.adaptive_avg_pool2d(unit, size), dim=-3)
