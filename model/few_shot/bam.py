"""BAM (CVPR 2022): a meta learner over prototype and prior, corrected by the base learner."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.few_shot import system
from model.few_shot.ensemble import Ensemble
from model.few_shot.parts import PrototypeHead, classifier, double_conv, reduce_block
from model.few_shot.prior import Features, join
from model.few_shot.system import IDENTITY, Decoded, FewShot
from model.losses import segmentation_loss
from util.data.episodes import Episode
from util.errors import UserError
from util.run.identity import Facts


class ASPP(nn.Module):
    """Five looks at a map, concatenated: its mean, 1x1, and 3x3 dilated by 6, 12 and 18. B C h w -> B 5C h w."""

    def __init__(self, width: int):
        super().__init__()
        convs = [nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)]
        convs += [nn.Conv2d(width, width, 3, padding=rate, dilation=rate) for rate in (6, 12, 18)]
        self.branches = nn.ModuleList(nn.Sequential(conv, nn.ReLU()) for conv in convs)

    def forward(self, x: Tensor) -> Tensor:
        mean, *local = self.branches
        pooled = mean(x.mean((2, 3), keepdim=True)).expand_as(x)
        return torch.cat([pooled, *(branch(x) for branch in local)], 1)


class Head(PrototypeHead):
    """Everything that BAM trains in its second stage.

    Args:
        channels: of stage 2 + stage 3 together.
        priors: number of prior channels.
    """

    def __init__(self, channels: int, priors: int, shot: int, kshot_trans_dim: int, width: int = 256):
        super().__init__(channels, width)
        self.init_merge = reduce_block(2 * width + priors, width)
        self.aspp = ASPP(width)
        self.res1 = reduce_block(5 * width, width)
        self.res2 = double_conv(width)
        self.cls = classifier(width)
        self.ensemble = Ensemble(shot, kshot_trans_dim, restore_order=True)

    def forward(
        self, query: Tensor, support: Tensor, mask: Tensor, maps: Sequence[Tensor], base: Tensor, difference: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            query: B C h w; support: B*K C h w; mask: B*K 1 S S; maps: see `prior.join`.
            base: B N+1 h w logits; difference: B K; own: B base ranks.
        Returns:
            ensemble scores B 2 h w, meta logits B 2 h w.
        """
        weights = self.ensemble.shot_weights(difference)
        query, _, prototypes = self.reduced(query, support, mask)
        prototype = (prototypes * weights[..., None, None, None]).sum(1)
        x = self.init_merge(torch.cat([query, prototype.expand_as(query), join(maps, weights)], 1))
        x = self.res1(self.aspp(x))
        meta = self.cls(x + self.res2(x))
        return self.ensemble(meta, base, (difference * weights).sum(1), own), meta


@dataclass
class Options(system.Options):
    """BAM's own options."""

    kshot_trans_dim: int = 2  # hidden width of the K-shot weighting

    def check(self) -> None:
        if self.kshot_trans_dim < 1:
            raise UserError(f"Method.kshot_trans_dim = {self.kshot_trans_dim}: must be at least 1")


class BAM(FewShot):
    """BAM with its own cosine prior, or any other."""

    facts = Facts(identity=(*IDENTITY, "Train.shot", "Method.low_fea"), before="PSPNet", priors=("cosine",))
    Options = Options
    official = (
        ("base_learner.module.encoder.stages.", "layer"),
        ("base_learner.module.ppm.", "learner_base.0."),
        ("base_learner.module.cls.", "learner_base.1."),
        ("head.ensemble.", ""),
        ("head.aspp.branches.", "ASPP_meta.layer6_"),
        ("head.res1.", "res1_meta."),
        ("head.res2.", "res2_meta."),
        ("head.cls.", "cls_meta."),
        ("head.", ""),
    )

    def build_head(self, channels: int, priors: int) -> Head:
        return Head(channels, priors, self.shot, self.options.kshot_trans_dim)

    def decode(self, head: nn.Module, features: Features, maps: Sequence[Tensor], own: Tensor) -> Decoded:
        query, support, difference = features.query, features.support, self.difference(features)
        return Decoded(*head(query.middle, support.middle, features.mask, maps, query.base, difference, own))

    def terms(self, decoded: Decoded, features: Features, episode: Episode) -> dict[str, Tensor]:
        target = episode.query_mask.long()
        return {
            "main": segmentation_loss(decoded.final, target),
            "meta": segmentation_loss(decoded.meta, target),
            "base": segmentation_loss(features.query.base, episode.base_label.long()),
        }
