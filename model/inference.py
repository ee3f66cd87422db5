"""Average the scores of several views of an image: windows, sizes, mirror images."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from model.ops import resize


def starts(side: int, crop: int, stride: int) -> Iterator[int]:
    """Yield the first pixels of the windows along a side; the last ends at the border. A side within `crop` is one window."""
    yield from range(0, side - crop, stride)
    yield max(side - crop, 0)


def slide(score: Callable[[Tensor], Tensor], image: Tensor, crop: int, stride: int, at_once: int = 4) -> Tensor:
    """Average the scores of all windows that cover a pixel, as mmsegmentation does.

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


def multi_scale(score: Callable[[Tensor], Tensor], images: Sequence[Tensor], flip: bool = True) -> tuple[Tensor, Tensor]:
    """Average scores over several sizes of the same images, and over their mirror images.

    Args:
        score: N 3 h w -> N C h' w'.
        images: B 3 h w of each size; the grid of the first one's scores is the grid of the result.
    Returns:
        the mean, B C h' w', and the scores of the first size, not mirrored.
    """
    found = []
    for x in images:
        plain, *mirrored = score(torch.cat([x, x.flip(3)]) if flip else x).float().split(len(x))
        found.append((plain, (plain + mirrored[0].flip(3)) / 2 if flip else plain))
    first = found[0][0]
    mean = sum(resize(both, first.shape[2:], corners=False) for _, both in found) / len(found)
    return mean, first
