"""Losses shared by systems; all in fp32, in any autocast."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.ops import full, processes, resize


def segmentation_loss(logits: Tensor, target: Tensor, foreground: float = 1) -> Tensor:
    """Mean cross entropy over the labelled pixels; 0 where every pixel is ignored.

    With several processes the mean is over the pixels of all: each gives its sum over the average count, so that the
    average of the gradients is that of one process with the whole batch.

    Args:
        logits: B C h w, brought to the target's size (bilinear, corners).
        target: B S S int64, 255 is ignored.
        foreground: how often a pixel of a class other than 0 counts.
    """
    logits, (_, world) = resize(full(logits), target.shape[1:]), processes()
    weight, known = logits.new_full(logits.shape[1:2], foreground), target != 255
    weight[0] = 1
    loss = F.cross_entropy(logits, target, weight, ignore_index=255, reduction="sum")
    count = known.sum() + (foreground - 1) * (known & (target > 0)).sum()
    if world > 1:
        dist.all_reduce(count)
    return loss * world / count.clamp(min=1)


def distillation_loss(correlations: Sequence[Tensor], target: Tensor) -> Tensor:
    """HDMNet's correlation distillation (Sec. 3.3): the mask teaches the coarsest level, each level the next finer one.

    Args:
        correlations: B h w per level, coarse first.
        target: B S S bool, the query mask.
    """
    teacher = torch.where(target, 1.0, -1e9)
    terms = []
    for student in correlations:
        student = full(student)
        t = resize(teacher[:, None], student.shape[1:], corners=False).flatten(1).softmax(1)
        s = student.flatten(1).softmax(1)
        terms.append((t * ((t + 1e-12).log() - (s + 1e-12).log())).sum(1).mean())
        teacher = student.detach()
    return torch.stack(terms).mean()
