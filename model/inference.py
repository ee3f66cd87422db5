"""From windows to scores of whole images."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def starts(side: int, crop: int, stride: int) -> Iterator[int]:
    """First pixels of the windows along a side; the last one ends at the border. A side within `crop` is one window."""
    yield from range(0, side - crop, stride)
    yield max(side - crop, 0)


def slide(score: Callable[[Tensor], Tensor], image: Tensor, crop: int, stride: int, at_once: int = 4) -> Tensor:
    """Averages the scores of all windows that cover a pixel, as mmsegmentation does.

    Args:
        score: N 3 h w -> N C h w, of up to `at_once` * B windows of one size; side `crop`, or the image's where it is narrower.
        image: B 3 H W.
    Returns:
        B C H W.
    """
    if not 0 < stride <= crop:
        raise ValueError(f"stride {stride} does not fit windows of {crop}")
    B, _, H, W = image.shape
    h, w = min(crop, H), min(crop, W)
    corners = [(y, x) for y in starts(H, crop, stride) for x in starts(W, crop, stride)]
    total, count = None, image.new_zeros(H, W)
    for i in range(0, len(corners), at_once):
        some = corners[i : i + at_once]
        scores = score(torch.cat([image[..., y : y + h, x : x + w] for y, x in some]))
        if total is None:
            total = scores.new_zeros(B, scores.shape[1], H, W)
        for (y, x), window in zip(some, scores.split(B), strict=True):
            total[..., y : y + h, x : x + w] += window
            count[y : y + h, x : x + w] += 1
    return total / count
