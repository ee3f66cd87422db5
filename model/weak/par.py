"""Pixel-adaptive refinement (PAR, from AFA, CVPR 2022; WeCLIP Sec. 3.4): class maps move along the colours of the image."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops import full, resize

DILATIONS = (1, 2, 4, 8, 12, 24)
STEPS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
OFFSETS = [(d * dy, d * dx) for d in DILATIONS for dy, dx in STEPS]  # 48 neighbours, the pixel itself is none of them
REACH = max(DILATIONS)
COLOUR, POSITION, ITERATIONS = 0.3, 0.01, 20  # w1, w2, and how often the maps move


@torch.no_grad()
def refine_by_colour(image: Tensor, maps: Tensor) -> Tensor:
    """Replace each map, 20 times, by the mean of its 48 neighbours weighted by likeness of colour. Weights sum to 1.01.

    Each iteration pads once and reads the neighbours as slices of the padded maps. Channels that are zero stay zero, so images
    with different numbers of classes share a batch.

    Args:
        image: B 3 H W, normalised; brought to the size of the maps (bilinear, corners).
        maps: B K h w.
    Returns:
        B K h w float32.
    """
    with torch.autocast(image.device.type, enabled=False):
        maps = full(maps)
        weights = neighbour_weights(resize(image.to(maps.dtype), maps.shape[2:])).unsqueeze(2).unbind(1)
        for _ in range(ITERATIONS):
            moved = torch.zeros_like(maps)
            for weight, neighbour in zip(weights, neighbours(maps), strict=True):
                moved.addcmul_(weight, neighbour)
            maps = moved
        return maps


def neighbours(x: Tensor) -> Iterator[Tensor]:
    """The 48 neighbours of every pixel of B C H W, borders replicated: views of one padded copy."""
    h, w = x.shape[2:]
    padded = F.pad(x, (REACH,) * 4, mode="replicate")
    for dy, dx in OFFSETS:
        yield padded[:, :, REACH + dy : REACH + dy + h, REACH + dx : REACH + dx + w]


def neighbour_weights(image: Tensor) -> Tensor:
    """B 3 H W -> B 48 H W: softmax over the neighbours of colour distance, plus a little of position distance.

    Both distances are in units of their unbiased standard deviation over the 48 neighbours: per pixel and channel for colour.
    """
    count = len(OFFSETS)
    mean = sum(neighbours(image)) / count
    sigma = (sum((n - mean).square() for n in neighbours(image)) / (count - 1)).sqrt()
    scale = 1 / (sigma + 1e-8) / COLOUR
    colour = torch.stack([-((n - image) * scale).square().mean(1) for n in neighbours(image)], 1)
    distance = torch.tensor([math.hypot(*offset) for offset in OFFSETS], dtype=torch.float64)
    position = (-(distance / (distance.std() + 1e-8) / COLOUR).square()).softmax(0).to(image, non_blocking=True)
    return colour.softmax(1) + POSITION * position.view(1, count, 1, 1)
