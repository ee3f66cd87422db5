"""Tensor operations that every system uses."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: tuple[int, int] | torch.Size, corners: bool = True) -> Tensor:
    """Bilinear resize of B C h w; `corners` is torch's align_corners."""
    return x if x.shape[2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=corners)


def nominal_positions(table: Tensor, side: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Resample a positional table to another patch grid, as the code of DINO v1 does (and SCLIP, NACLIP, ClearCLIP after it).

    Bicubic, no antialias, with the *nominal* factors (h + 0.1) / side, which shift every sampling point a little.

    Args:
        table: n C, row-major, n = side[0] * side[1].
        grid: (h, w).
    Returns:
        h*w C; the table itself on its own grid.
    """
    if tuple(grid) == tuple(side):
        return table
    factors = tuple((new + 0.1) / old for new, old in zip(grid, side, strict=True))
    patches = table.T.reshape(1, -1, *side)
    return F.interpolate(patches, scale_factor=factors, mode="bicubic", align_corners=False).flatten(2)[0].T


def full(x: Tensor) -> Tensor:
    """Return at least fp32, in any autocast."""
    return x if x.dtype == torch.float64 else x.float()


class Pixels(nn.Module):
    """Normalises images with the statistics that an encoder was trained with; no other place in the house does.

    Args:
        mean, std: of RGB in 0..1 units.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """... 3 H W RGB 0..255 of any type -> float."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def undo(self, normalised: Tensor) -> Tensor:
        """The way back to 0..255."""
        return normalised * self.std + self.mean


def processes() -> tuple[int, int]:
    """Return (rank, number of processes) of a data-parallel training; (0, 1) otherwise."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Dropout(nn.Module):
    """Dropout that does not depend on how a global batch is spread over processes.

    All processes have the same random state: each draws the mask of the global batch and applies its own rows. The first
    axis has to be ordered by episode.

    Args:
        p: probability of a zero.
        channels: drop whole channels of B C h w (Dropout2d).
    """

    def __init__(self, p: float, channels: bool = False):
        super().__init__()
        self.p, self.channels = p, channels

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        rank, world = processes()
        shape = (x.shape[1], *(1 for _ in x.shape[2:])) if self.channels else x.shape[1:]
        keep = torch.rand(world * len(x), *shape, device=x.device) >= self.p
        return x * keep[rank * len(x) : (rank + 1) * len(x)] / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, channels={self.channels}"
