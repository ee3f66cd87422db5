"""From attention maps to a transition matrix (CLIP-ES Sec. 3.3), and WeCLIP's filter of attention maps (RFM, Sec. 3.4).

Shapes: B images, l blocks, n = h*w patches, K class slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.clip import normalise_affinity, propagate, symmetric
from model.ops import full


def patch_part(attention: Sequence[Tensor]) -> Tensor:
    """Attention maps of l blocks, each B 1+n 1+n, without the class token: B l n n. Rows no longer sum to one."""
    return full(torch.stack([a[:, 1:, 1:] for a in attention], 1))


def layer_scores(attention: Tensor, affinity: Tensor, absolute: bool) -> Tensor:
    """How far the attention of each block is from the decoder's affinity, summed over all pairs in float64: B l.

    With `absolute`, as the paper has it, sum |A - S|. The published code sums A - S: there the affinity is the same in every
    score of an image and cancels in the comparison, so the blocks are kept whose attention between patches is large.

    Args:
        attention: B l n n.
        affinity: B n n in 0..1.
    """
    if absolute:
        return torch.stack([(affinity - a).abs().sum((1, 2), dtype=torch.float64) for a in attention.unbind(1)], 1)
    mass = attention.sum((2, 3), dtype=torch.float64)
    return affinity.sum((1, 2), dtype=torch.float64)[:, None] - mass


def filtered(attention: Tensor, affinity: Tensor, absolute: bool) -> tuple[Tensor, Tensor]:
    """RFM: mean attention over the blocks whose score is at most the image's mean score, times the affinity.

    Args: as `layer_scores`.
    Returns:
        (B n n, blocks kept: B l bool).
    """
    scores = layer_scores(attention, affinity, absolute)
    keep = scores <= scores.mean(1, keepdim=True)
    weight = keep.to(attention.dtype) / (keep.sum(1, keepdim=True) + 1e-5)
    return torch.einsum("blij,bl->bij", attention, weight) * affinity, keep


def transition_matrix(attention: Tensor) -> Tensor:
    """B n n -> transition matrix T in float64: three rounds of column and row normalisation, then symmetrised.

    In float32 the rounding of two products shows in labels, since min-max divides by the small span of a spread map.
    """
    return symmetric(normalise_affinity(attention.double(), rounds=3))


def spread(transition: Tensor, cam: Tensor, box: Tensor) -> Tensor:
    """T^2, its columns restricted to the box mask, applied to each map: B K h w -> B K h w, without min-max.

    Masking the columns of a matrix is masking what it is applied to, so two products with the masked maps do it.
    """
    source = (cam * box).flatten(2).transpose(1, 2).to(transition.dtype)
    return propagate(transition, source).transpose(1, 2).unflatten(2, cam.shape[2:]).to(cam.dtype)
