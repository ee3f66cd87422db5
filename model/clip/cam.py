"""Softmax Grad-CAM on CLIP's last block (CLIP-ES; used by PI-CLIP, WeCLIP, IMR-HSNet), batched over images and classes.

The score of a class is its probability in a softmax over candidate texts, the image being the *mean of its patch tokens*;
the map weighs the channels of `ln_1` of the last block by the gradient of that score.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.clip.affinity import min_max
from model.clip.resnet import ResNetTower
from model.clip.trunk import ClipTrunk, attend
from model.ops import full, resize


class Cam(NamedTuple):
    """One row per (image, class) pair P."""

    map: Tensor  # P h w in 0..1
    probability: Tensor  # P M, softmax over the candidates, 0 elsewhere
    attention: Tensor  # P N N, head-averaged attention of the last block
    raw: Tensor  # P h w >= 0, the map before rescaling


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
        target: P int64, column of the text of each map.
    """
    last = trunk.blocks[-1]
    with torch.autocast(tokens.device.type, enabled=False), torch.enable_grad():
        tokens = full(tokens)
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
    raw = torch.einsum("pnc,pc->pn", a.detach()[:, 1:], alpha).relu()
    cam = min_max(min_max(raw))  # twice, as published: raw maxima are ~1e-4, one pass leaves the peak at 0.999
    return Cam(cam.view(-1, *grid), probability.detach(), attention.detach(), raw.view(-1, *grid))


def resnet_grad_cam(tower: ResNetTower, activation: Tensor, texts: Tensor, candidates: Tensor, target: Tensor
                    ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same on a ResNet's last block, whose image feature is the attention pool, in fp32: weights of the channels P C and
    signed maps P 7 7.

    Args:
        activation: P C 7 7, of `ResNetTower.activation`; the rest as in `softmax_grad_cam`. The softmax's scale is 100.
    """
    with torch.autocast(activation.device.type, enabled=False), torch.enable_grad():
        a = activation.detach().float().requires_grad_()
        logits = 100 * F.normalize(tower.pool(a), dim=-1) @ texts.T
        probability = logits.masked_fill(~candidates, float("-inf")).softmax(-1)
        (gradient,) = torch.autograd.grad(probability.gather(1, target[:, None]).sum(), a)
    alpha = gradient.mean((2, 3))
    return alpha, torch.einsum("pchw,pc->phw", a.detach(), alpha)


def published_map(raw: Tensor, side: int = 224, grid: int = 50) -> Tensor:
    """Bring signed maps P h w to maps P 50 50 in 0..1 as IMR-HSNet does: via the image's side, rescaled before and after."""

    def rescaled(x: Tensor) -> Tensor:
        return min_max(x.flatten(1)).view_as(x)

    large = resize(rescaled(raw.relu())[:, None], (side, side), corners=False)[:, 0]
    return resize(rescaled(large.relu())[:, None], (grid, grid), corners=False)[:, 0]


class CamSource(Protocol):
    """Class activation maps of whole square images."""

    side: int  # of the images, in pixels

    def __call__(self, images: Tensor, texts: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
        """N 3 side side RGB 0..255, M D texts, N M bool, N int64 -> N h w in 0..1."""
        ...


class ResNetCam:
    """IMR-HSNet's own, of CLIP's RN50."""

    def __init__(self, tower: ResNetTower):
        self.tower, self.side = tower, tower.side

    def __call__(self, images: Tensor, texts: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
        activation = self.tower.activation(self.tower.normalise(images))
        return published_map(resnet_grad_cam(self.tower, activation, texts, candidates, target)[1], self.side)


class ViTCam:
    """Of CLIP's ViT, on its patch grid."""

    def __init__(self, trunk: ClipTrunk, logit_scale: Tensor):
        self.trunk, self.logit_scale = trunk, logit_scale
        self.side = trunk.patch * trunk.visual.grid_size[0]

    def __call__(self, images: Tensor, texts: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
        tokens, grid = self.trunk.embed(self.trunk.normalise(images))
        run = self.trunk.run(tokens, stop=len(self.trunk.blocks) - 1)
        return softmax_grad_cam(self.trunk, run.tokens, grid, texts, self.logit_scale, candidates, target).map
