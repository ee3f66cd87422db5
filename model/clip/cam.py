"""Softmax Grad-CAM on CLIP's last block (CLIP-ES; used by PI-CLIP, WeCLIP), batched over images and classes.

The score of a class is its probability in a softmax over candidate texts, the image being the *mean of its patch tokens*;
the map weighs the channels of `ln_1` of the last block by the gradient of that score.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.clip.affinity import min_max
from model.clip.trunk import ClipTrunk, attend


class Cam(NamedTuple):
    """One row per (image, class) pair P."""

    map: Tensor  # P h w in 0..1
    probability: Tensor  # P M, softmax over the candidates, 0 elsewhere
    attention: Tensor  # P N N, head-averaged attention of the last block


def softmax_grad_cam(
    trunk: ClipTrunk,
    tokens: Tensor,
    grid: tuple[int, int],
    texts: Tensor,
    logit_scale: Tensor,
    candidates: Tensor,
    target: Tensor,
) -> Cam:
    """Class activation maps of one target text per row; all in fp32, autograd only through the last block.

    Args:
        tokens: P N C, input of the last block. For several classes of an image repeat its row.
        grid: (h, w) with h * w = N - 1.
        texts: M D, L2-normalised text bank.
        logit_scale: scalar, log of the softmax scale.
        candidates: P M bool, the texts that compete in each row; must contain the target.
        target: P int64, column of the text whose map is wanted.
    """
    last = trunk.blocks[-1]
    with torch.autocast(tokens.device.type, enabled=False), torch.enable_grad():
        tokens = tokens.float()
        a = last.ln_1(tokens).detach().requires_grad_()
        out, attention = attend(last, a, want_map=True)
        z = tokens + out
        z = z + last.mlp(last.ln_2(z))
        # The mean commutes with the projection: pool first, project one vector instead of N.
        image = F.normalize(trunk.post_norm(z)[:, 1:].mean(1) @ trunk.visual.proj, dim=-1)
        logits = logit_scale.exp() * image @ texts.T
        probability = logits.masked_fill(~candidates, float("-inf")).softmax(-1)
        score = probability.gather(1, target[:, None]).sum()  # rows are independent, so one backward serves all
        (gradient,) = torch.autograd.grad(score, a)
    alpha = gradient[:, 1:].mean(1)  # P C
    cam = torch.einsum("pnc,pc->pn", a.detach()[:, 1:], alpha).relu()
    cam = min_max(min_max(cam))  # twice, as published: raw maxima are ~1e-4, one pass leaves the peak at 0.999
    return Cam(cam.view(-1, *grid), probability.detach(), attention.detach())
