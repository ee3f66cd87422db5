"""BAM's ensemble: the base learner suppresses base classes in the meta prediction, weighted by scene difference."""

import torch
from torch import Tensor, nn

from model.ops import resize


class KShotWeights(nn.Sequential):
    """Weights of K shots from their scene differences: sorted ascending, two 1x1 convolutions, softmax (BAM Sec. 4.4).

    Args:
        restore_order: BAM gives each shot the weight computed for its own rank. HDMNet and PI-CLIP were published with the
            weight of the r-th smallest difference going to shot r; their checkpoints need that.
    """

    def __init__(self, shot: int, hidden: int, restore_order: bool):
        super().__init__(nn.Conv2d(shot, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, shot, 1))
        self.restore_order = restore_order

    def forward(self, difference: Tensor) -> Tensor:
        """B K scene differences -> B K weights that sum to one."""
        ascending, order = difference.sort(1)
        weights = super().forward(ascending[..., None, None])[..., 0, 0]
        if self.restore_order:
            weights = weights.gather(1, order.argsort(1))
        return weights.softmax(1)


class Ensemble(nn.Module):
    """Merges meta and base predictions (BAM Eqs. 8-9).

    Args:
        shot: K.
        kshot_trans_dim: hidden width of the K-shot weighting.
        restore_order: see `KShotWeights`.
    """

    def __init__(self, shot: int, kshot_trans_dim: int = 2, restore_order: bool = False):
        super().__init__()
        self.gram_merge = nn.Conv2d(2, 1, 1, bias=False)
        self.cls_merge = nn.Conv2d(2, 1, 1, bias=False)
        for conv in (self.gram_merge, self.cls_merge):
            conv.weight.data = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        self.kshot_rw = KShotWeights(shot, kshot_trans_dim, restore_order) if shot > 1 else None

    def shot_weights(self, difference: Tensor) -> Tensor:
        """B K scene differences -> B K weights that sum to one."""
        return torch.ones_like(difference) if self.kshot_rw is None else self.kshot_rw(difference)

    def forward(self, meta: Tensor, base: Tensor, difference: Tensor, own: Tensor) -> Tensor:
        """
        Args:
            meta: B 2 h w logits; base: B N+1 h' w' logits; difference: B, weighted over the shots.
            own: B base rank of the episode's class, whose base channel is left out; -1 for a novel class.
        Returns:
            B 2 h w scores (they mix probabilities and are used as logits, as published).
        """
        meta, base = meta.softmax(1), base.softmax(1)
        ranks = torch.arange(base.shape[1] - 1, device=base.device)
        others = (ranks != own[:, None])[..., None, None]  # B N 1 1
        known = (base[:, 1:] * others).sum(1, keepdim=True)
        difference = difference.view(-1, 1, 1, 1).expand_as(meta[:, :1])
        background = self.gram_merge(torch.cat([meta[:, :1], difference], 1))
        foreground = self.gram_merge(torch.cat([meta[:, 1:], difference], 1))
        background = self.cls_merge(torch.cat([background, resize(known, meta.shape[2:])], 1))
        return torch.cat([background, foreground], 1)
