"""Tensor operations that every system uses."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: tuple[int, int] | torch.Size, corners: bool = True) -> Tensor:
    """Bilinear resize of B C h w; `corners` is torch's align_corners."""
    return x if x.shape[2:] == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=corners)
