"""Small operations shared by few-shot systems. Shapes: B episodes, K shots, C channels, h w feature grid, S image side."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import Dropout, resize


def binary_mask(label: Tensor) -> Tensor:
    """Label (..., S, S) in {0, 1, 255} -> (..., 1, S, S) float, 1 where the label is 1; 255 counts as background."""
    return (label == 1).float().unsqueeze(-3)


def masked_average(features: Tensor, mask: Tensor) -> Tensor:
    """Prototype: mask-weighted mean of a map.

    Args:
        features: B C h w.
        mask: B 1 S S, resized bilinearly to h w.
    Returns:
        B C 1 1.
    """
    mask = resize(mask, features.shape[2:])
    return (features * mask).sum((2, 3), keepdim=True) / (mask.sum((2, 3), keepdim=True) + 5e-4)


def inside(features: Tensor, mask: Tensor) -> Tensor:
    """B C h w with positions outside the mask (B 1 S S in {0, 1}, nearest-resized) set to zero."""
    return features * F.interpolate(mask, features.shape[2:], mode="nearest")


def max_cosine(query: Tensor, support: Tensor, eps: float = 1e-7) -> Tensor:
    """Training-free prior: best cosine of every query position with any support position (PFENet Sec. 3.2).

    The caller masks the support; its zeroed positions stay in the maximum with score 0. On the CPU they are not multiplied:
    each row of the batch keeps its own positions and one zero.

    Args:
        query, support: B C h w; their grids may differ.
    Returns:
        B 1 h w.
    """
    B, _, h, w = query.shape
    q, s = query.flatten(2), support.flatten(2)  # B C n
    if s.device.type == "cpu":
        best = torch.cat([_best_cosine(qi[None], _drop_zeros(si)[None], eps) for qi, si in zip(q, s, strict=True)])
    else:
        best = _best_cosine(q, s, eps)
    return best.view(B, 1, h, w)


def _best_cosine(q: Tensor, s: Tensor, eps: float) -> Tensor:
    """B C n, B C m -> B n."""
    return ((q.transpose(1, 2) @ s) / (q.norm(dim=1)[:, :, None] * s.norm(dim=1)[:, None] + eps)).amax(2)


def _drop_zeros(s: Tensor) -> Tensor:
    """Keep the columns of C m that are not zero, and one zero column if there is any: C m'."""
    keep = s.any(0)
    if not keep.all():
        keep[keep.int().argmin()] = True
    return s[:, keep]


def gram(features: Tensor) -> Tensor:
    """Gram matrix of a map's channels divided by the outer product of their norms: B C h w -> B C C."""
    rows = features.flatten(2)
    norm = rows.norm(dim=2, keepdim=True)
    return (rows @ rows.transpose(1, 2)) / (norm @ norm.transpose(1, 2) + 1e-7)


def scene_difference(query: Tensor, support: Tensor) -> Tensor:
    """Return the difference of scenes in style: Frobenius distance of Gram matrices over that of an all-ones matrix (BAM Eq. 6).

    Args:
        query: B C C; support: B K C C; see `gram`.
    Returns:
        B K.
    """
    return (query[:, None] - support).norm(dim=(2, 3)) / query.shape[-1]


def reduce_block(channels: int, width: int, dropout: float = 0.0) -> nn.Sequential:
    """1x1 convolution without bias, ReLU, optional dropout of channels."""
    layers = [nn.Conv2d(channels, width, 1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, Dropout(dropout, channels=True)) if dropout else nn.Sequential(*layers)


def double_conv(width: int) -> nn.Sequential:
    """Two 3x3 convolutions without bias, each with ReLU: the residual block of PFENet and BAM."""
    conv = lambda: nn.Conv2d(width, width, 3, padding=1, bias=False)  # noqa: E731
    return nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU())


def classifier(width: int) -> nn.Sequential:
    """PFENet's and BAM's: width -> background and foreground logits."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.ReLU(), Dropout(0.1, channels=True), nn.Conv2d(width, 2, 1)
    )


class PrototypeHead(nn.Module):
    """First part of every head: reduces middle features to `width`, and averages the support's inside its mask."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.channels = channels
        self.down_query = reduce_block(channels, width, dropout=0.5)
        self.down_supp = reduce_block(channels, width, dropout=0.5)

    def reduced(self, query: Tensor, support: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            query: B C h w; support: B*K C h w, both from the backbone, or reduced before; mask: B*K 1 S S.
        Returns:
            query B width h w, support B*K width h w, prototypes B K width 1 1.
        """
        if query.shape[1] == self.channels:
            query, support = self.down_query(query), self.down_supp(support)
        return query, support, masked_average(support, mask).unflatten(0, (len(query), -1))
