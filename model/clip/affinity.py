"""Box masks and attention affinity, which spread a class activation map over its object (CLIP-ES, PI-CLIP Sec. 3.2).

Everything is batched, stays on the device, and applies affinities as products with the map: no n x n x class tensor.
n = h*w patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def min_max(x: Tensor, eps: float = 1e-7) -> Tensor:
    """Rescales each row (last dimension) to [0, 1]: subtract the minimum, then divide by maximum + eps."""
    x = x - x.amin(-1, keepdim=True)
    return x / (x.amax(-1, keepdim=True) + eps)


def components(above: Tensor) -> Tensor:
    """Label the 8-connected components of a bool map B h w: B (h*w) int64, 0 outside, equal within a component and different
    between two.

    Each round hooks the label of a cell on the largest label around it, then follows one link. Spirals and combs need about
    log2(h*w) rounds, other maps fewer; twice as many run always, so that the device need not report whether it is done.
    """
    B, h, w = above.shape
    own = torch.arange(1, h * w + 1, device=above.device).view(1, h, w)
    label = F.pad((own * above).flatten(1), (1, 0))  # entry 0 is the outside, and links to itself
    for _ in range(2 * (h * w).bit_length()):
        around = F.max_pool2d(label[:, 1:].view(B, h, w).float(), 3, stride=1, padding=1) * above
        around = F.pad(around.long().flatten(1), (1, 0))
        label = label.scatter_reduce(1, label, around, "amax")
        label = torch.maximum(label, around)
        label = label.gather(1, label)
    return label[:, 1:]


def box_mask(cam: Tensor, threshold: float = 0.4) -> Tensor:
    """Union of the bounding boxes of the 8-connected components of a thresholded map.

    The map is taken at 8 bits and compared with `int(threshold * maximum)`, strictly. Box ends are exclusive and clipped
    to size - 1 as in the published code, so the last row and column never belong to a mask; a map without a component
    gives an empty mask.

    Args:
        cam: B h w in 0..1.
    Returns:
        B h w bool.
    """
    B, h, w = cam.shape
    level = (255 * cam).trunc().double()
    above = level > (threshold * level.amax((1, 2), keepdim=True)).trunc()

    label = components(above)

    def extent(coordinate: Tensor, reduce: str, start: int) -> Tensor:
        """Smallest or largest coordinate of each component, B (h*w + 1)."""
        out = torch.full((B, h * w + 1), start, device=cam.device)
        return out.scatter_reduce(1, label, coordinate.flatten().expand(B, -1), reduce)

    y, x = torch.meshgrid(torch.arange(h, device=cam.device), torch.arange(w, device=cam.device), indexing="ij")
    top, left = extent(y, "amin", h), extent(x, "amin", w)
    bottom = (extent(y, "amax", -1) + 1).clamp(max=h - 1)
    right = (extent(x, "amax", -1) + 1).clamp(max=w - 1)
    valid = (bottom > top) & (right > left)
    valid[:, 0] = False

    # Union of boxes by a 2-D difference array: +1 and -1 at the corners, then two running sums.
    corners = torch.zeros(B, (h + 1) * (w + 1), dtype=torch.int64, device=cam.device)
    for row, column, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        at = torch.where(valid, row * (w + 1) + column, 0)
        corners.scatter_add_(1, at, sign * valid.long())
    covered = corners.view(B, h + 1, w + 1).cumsum(1).cumsum(2)
    return covered[:, :h, :w] > 0


def normalise_affinity(affinity: Tensor, rounds: int = 1) -> Tensor:
    """B n n attention -> transition matrix: `rounds` times divide by the column sums, then by the row sums.

    A patch without any attention (sharp attention underflows) has a column of zeros, and keeps it.
    """
    tiny = torch.finfo(affinity.dtype).tiny
    for _ in range(rounds):
        affinity = affinity / affinity.sum(-2, keepdim=True).clamp(min=tiny)
        affinity = affinity / affinity.sum(-1, keepdim=True).clamp(min=tiny)
    return affinity


def symmetric(transition: Tensor) -> Tensor:
    """CLIP-ES's relations: mean of T and its transpose, B n n."""
    return (transition + transition.transpose(-2, -1)) / 2


def high_order(transition: Tensor) -> Tensor:
    """PI-CLIP's high-order relations: elementwise max of T and T T^t, B n n."""
    return torch.maximum(transition, transition @ transition.transpose(-2, -1))


def propagate(transition: Tensor, source: Tensor, power: int = 2) -> Tensor:
    """T^power v as matrix-vector products: transition B n n, source B n K -> B n K."""
    for _ in range(power):
        source = transition @ source
    return source


def refine(cam: Tensor, attention: Tensor) -> Tensor:
    """Refined prior of PI-CLIP (Sec. 3.2): the map, restricted to its boxes, spread by high-order attention relations.

    Args:
        cam: B h w in 0..1.
        attention: B n n, patch-to-patch attention averaged over heads and blocks (class token dropped).
    Returns:
        B h w in 0..1; all zero where the box mask is empty.
    """
    transition = high_order(normalise_affinity(attention.float()))
    source = (cam * box_mask(cam)).flatten(1)[..., None]  # masking T's columns is masking the source
    return min_max(propagate(transition, source)[..., 0]).view_as(cam)
