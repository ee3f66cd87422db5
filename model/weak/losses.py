"""Losses of WeCLIP (Sec. 3.5), in fp32 whatever the autocast.

Sums are divided by counts over the batches of all processes, so that the average of the gradients is that of one process with
the whole batch. A set without members gives zero, where the published code gives NaN.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.ops import full, processes, resize

IGNORE = 255


def balanced_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Half the mean cross entropy of background pixels plus half that of foreground pixels.

    Args:
        logits: B C h w, brought to the label's size (bilinear, half-pixel centres).
        label: B H W, 0 background, 255 ignored.
    """
    loss = F.cross_entropy(resize(full(logits), label.shape[1:], corners=False), label.long(), ignore_index=IGNORE,
                           reduction="none")  # fmt: skip
    background, foreground = label == 0, (label > 0) & (label != IGNORE)
    counts, world = _counts(background, foreground)
    sums = torch.stack([(loss * part).sum() for part in (background, foreground)])
    return 0.5 * world * (sums / counts.clamp(min=1)).sum()


def pair_labels(label: Tensor, patch: int, grid: tuple[int, int], radius: int) -> Tensor:
    """Pairs of patches: 1 of one class (background too), 0 of two, 255 where one is ignored or farther than `radius` away.

    A patch has the label of its top-left pixel; the distance is Chebyshev's on the grid, and `radius` itself is near.

    Args:
        label: B H W with H // patch, W // patch = grid.
    Returns:
        B n n uint8.
    """
    h, w = grid
    cells = label[:, ::patch, ::patch][:, :h, :w].flatten(1)
    y, x = torch.meshgrid(torch.arange(h, device=label.device), torch.arange(w, device=label.device), indexing="ij")
    y, x = y.flatten(), x.flatten()
    far = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs()) > radius
    ignored = cells == IGNORE
    equal = (cells[:, :, None] == cells[:, None]).to(torch.uint8)
    return equal.masked_fill(far | ignored[:, :, None] | ignored[:, None], IGNORE)


def affinity_loss(affinity: Tensor, pairs: Tensor) -> Tensor:
    """Pulls the affinity of equal pairs to 1 and of different ones to 0, each kind with half the weight.

    Args:
        affinity: B n n in 0..1.
        pairs: B n n of `pair_labels`.
    """
    equal, different = pairs == 1, pairs == 0
    counts, world = _counts(equal, different)
    sums = torch.stack([((1 - affinity) * equal).sum(), (affinity * different).sum()])
    return 0.5 * world * (sums / (counts + 1)).sum()


def _counts(*parts: Tensor) -> tuple[Tensor, int]:
    """(members of each bool tensor over all processes, number of processes)."""
    counts, (_, world) = torch.stack([part.sum() for part in parts]), processes()
    if world > 1:
        dist.all_reduce(counts)
    return counts, world
