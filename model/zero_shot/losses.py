"""Losses and targets of CLIP-RC and ZegCLIP, in fp32 whatever the autocast (CLIP-RC, Sec. 3.5)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.ops import full, processes

ALPHA, GAMMA = 0.25, 2  # of the focal loss
IGNORE = 255


def focal_and_dice(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both over independent sigmoids, divided by the number of (image, present class) pairs, at least one.

    Focal: mean over pixels, sum over images and classes. Ignored pixels are negatives of every class, as published. Dice: of the
    present classes only, ignored pixels count as not of the class. With several processes the pairs are those of all, so that
    the average of the gradients is that of one process with the whole batch.

    Args:
        logits: B C h w.
        target: B h w int64, 0..C-1 or 255.
    """
    logits, (B, C) = full(logits), logits.shape[:2]
    logits, target = logits.flatten(2), target.flatten(1)
    labelled = target != IGNORE
    index = target.where(labelled, 0)

    # Of all class maps only the labelled pixels' own are positive: gather those instead of a one-hot tensor.
    own = logits.gather(1, index[:, None])[:, 0]  # B hw
    negative = lambda z: (1 - ALPHA) * z.sigmoid() ** GAMMA * F.softplus(z)  # noqa: E731
    positive = ALPHA * (-own).sigmoid() ** GAMMA * F.softplus(-own)
    focal = negative(logits).mean(2).sum() + ((positive - negative(own)) * labelled).mean(1).sum()

    per_class = lambda x: x.new_zeros(B, C).scatter_add(1, index, x * labelled)  # noqa: E731
    area, hit = per_class(torch.ones_like(own)), per_class(own.sigmoid())
    dice = 1 - (2 * hit + 1) / (logits.sigmoid().sum(2) + area + 1)
    present = area > 0

    pairs, (_, world) = present.sum(), processes()
    if world > 1:
        dist.all_reduce(pairs)
    pairs = (pairs / world).clamp(min=1)
    return focal / pairs, (dice * present).sum() / pairs


def pseudo_labels(logits: Tensor, target: Tensor, where: Tensor, unseen: Tensor) -> Tensor:
    """Gives pixels the unseen class of the largest score: self-training, without threshold, of the same forward pass.

    The scores are sigmoids, not logits: in fp32 they tie at 1 from logit 17 on, and the first class wins, as published.

    Args:
        logits: B C h w.
        target: B h w int64, returned with new labels where `where` (B h w bool) says so.
        unseen: U int64, classes.
    """
    scores = full(logits.detach())[:, unseen].sigmoid()
    return torch.where(where, unseen[scores.argmax(1)], target)
