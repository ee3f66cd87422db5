"""HDMNet (CVPR 2023), and PI-CLIP (CVPR 2024): HDMNet with CLIP's priors instead of its similarity prior."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.few_shot import bam
from model.few_shot.ensemble import Ensemble
from model.few_shot.matcher import Matcher
from model.few_shot.parts import PrototypeHead, masked_average, reduce_block
from model.few_shot.prior import Features, join
from model.few_shot.system import IDENTITY, Decoded, FewShot
from model.losses import distillation_loss, segmentation_loss
from util.config import Train
from util.data.episodes import Episode
from util.run.identity import Facts

PRIOR_SCALE = 10.0  # of the priors in the query feature; the matcher gets them unscaled


@dataclass
class Encoded:
    """Result of a fixed head for N supports alone."""

    prototype: Tensor  # N 256 1 1
    tokens: Tensor  # N n 64: of the matcher's levels, one after the other


class Head(PrototypeHead):
    """Everything that HDMNet trains.

    Args:
        channels: of stage 2 + stage 3 together.
        priors: number of prior channels.
    """

    def __init__(self, channels: int, priors: int, shot: int, kshot_trans_dim: int, width: int = 256, matcher_width: int = 64):
        super().__init__(channels, width)
        self.query_merge = reduce_block(2 * width + priors, matcher_width)
        self.supp_merge = reduce_block(2 * width, matcher_width)
        self.matcher = Matcher(priors, matcher_width)
        self.ensemble = Ensemble(shot, kshot_trans_dim, restore_order=False)

    def forward(
        self, query: Tensor, support: Tensor | Encoded, mask: Tensor, maps: Sequence[Tensor], base: Tensor, difference: Tensor,
        own: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """
        Args:
            query: B C h w, stages 3 and 2 concatenated; support: B*K C h w, the same of the masked support; or query reduced and
                support encoded before (testing).
            mask: B*K 1 S S; maps: see `prior.join`; base: B N+1 h w logits; difference: B K; own: B base ranks.
        Returns:
            ensemble scores B 2 h w, meta logits B 2 h w, correlation maps B h w from coarse to fine.
        """
        priors = join(maps)
        if isinstance(support, Encoded):
            levels = self.matcher.encode(self.query_feature(query, support.prototype.unflatten(0, (len(query), -1)), priors))
            tokens = support.tokens.split([h * w for _, (h, w) in levels], 1)
            meta, correlations = self.matcher.match(levels, tokens, mask, priors)
        else:
            meta, correlations = self.matcher(*self.merge(query, support, mask, priors), mask, priors)
        difference = (self.ensemble.shot_weights(difference) * difference).sum(1)
        return self.ensemble(meta, base, difference, own), meta, correlations

    def merge(self, query: Tensor, support: Tensor, mask: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the matcher: query feature B 64 h w (with the mean prototype and the priors), support B*K 64 h w."""
        query, support, prototypes = self.reduced(query, support, mask)
        return self.query_feature(query, prototypes, priors), self.support_feature(support, prototypes.flatten(0, 1))

    def query_feature(self, query: Tensor, prototypes: Tensor, priors: Tensor) -> Tensor:
        return self.query_merge(torch.cat([query, prototypes.mean(1).expand_as(query), PRIOR_SCALE * priors], 1))

    def support_feature(self, support: Tensor, prototype: Tensor) -> Tensor:
        return self.supp_merge(torch.cat([support, prototype.expand_as(support)], 1))

    def encode_support(self, support: Tensor, mask: Tensor) -> Encoded:
        """Compute everything that depends on the support alone. support: N C h w, from the backbone; mask: N 1 S S."""
        support = self.down_supp(support)
        prototype = masked_average(support, mask)
        levels = self.matcher.encode(self.support_feature(support, prototype))
        return Encoded(prototype, torch.cat([tokens for tokens, _ in levels], 1))


@dataclass
class Options(bam.Options):
    """HDMNet's own options."""

    aux_weight1: float = 1.0  # weight of the distillation between matcher levels


class HDMNet(FewShot):
    """HDMNet with its own similarity prior, or any other."""

    facts = Facts(identity=(*IDENTITY, "Train.shot", "Method.low_fea"), before="PSPNet", priors=("similarity",))
    Options = Options
    optimizer_name = "adamw"
    masks_support = True
    official = (
        ("base_learner.module.encoder.stages.", "layer"),
        ("base_learner.module.ppm.", "ppm."),
        ("base_learner.module.cls.0.", "cls.0."),
        ("base_learner.module.cls.1.", "cls.1."),
        ("base_learner.module.cls.4.", "base_learnear.2."),
        ("head.ensemble.", ""),
        ("head.matcher.head.", "transformer.mix_transformer.cls."),
        ("head.matcher.levels.", "transformer.mix_transformer."),
        ("head.", ""),
    )

    def build_head(self, channels: int, priors: int) -> Head:
        return Head(channels, priors, self.shot, self.options.kshot_trans_dim)

    def decode(self, head: nn.Module, features: Features, maps: Sequence[Tensor], own: Tensor) -> Decoded:
        query, support, difference = features.query, features.support, self.difference(features)
        given = support.middle if support.tokens is None else Encoded(support.prototype, support.tokens)
        final, meta, correlations = head(query.middle, given, features.mask, maps, query.base, difference, own)
        return Decoded(final, meta, correlations=correlations)

    def reduce(self, middle: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return super().reduce(middle, mask) if mask is None else vars(self.trained.encode_support(middle, mask))

    def terms(self, decoded: Decoded, features: Features, episode: Episode) -> dict[str, Tensor]:
        target = episode.query_mask.long()
        return {
            "main": segmentation_loss(decoded.final, target) + segmentation_loss(decoded.meta, target),
            "distil": self.options.aux_weight1 * distillation_loss(decoded.correlations, episode.query_mask == 1),
            "base": segmentation_loss(features.query.base, episode.base_label.long()),
        }

    def groups(self, train: Train) -> list[dict[str, Any]]:
        """Ten times the rate outside the matcher; `kshot_rw` keeps its initial value, as published."""
        head: Head = self.trained
        rest = [head.down_query, head.down_supp, head.query_merge, head.supp_merge]
        rest += [head.ensemble.gram_merge, head.ensemble.cls_merge]
        return [
            {"params": list(head.matcher.parameters()), "lr": train.base_lr},
            {"params": [p for module in rest for p in module.parameters()], "lr": 10 * train.base_lr},
        ]

    def official_name(self, name: str) -> str | None:
        levels = "head.matcher.levels."
        return super().official_name(levels + matcher_name(name.removeprefix(levels)) if name.startswith(levels) else name)


class PICLIP(HDMNet):
    """HDMNet decoding PI-CLIP's text and visual priors."""

    facts = replace(HDMNet.facts, priors=("vtp", "vvp"))


_LEVEL_PART = {
    "embed": "down_sample_layers.{i}.0", "blocks.0": "down_sample_layers.{i}.1", "blocks.1": "down_sample_layers.{i}.2",
    "norm": "down_sample_layers.{i}.3", "match": "match_layers.{i}.0", "merge": "match_layers.{i}.1", "parse": "parse_layers.{i}",
}  # fmt: skip


def matcher_name(name: str) -> str:
    """LEVEL.PART.REST of our matcher -> the published name below `mix_transformer`."""
    i, _, rest = name.partition(".")
    part = next(p for p in _LEVEL_PART if rest.startswith(p + "."))
    rest = rest.removeprefix(part)
    if part.startswith("blocks") or part == "match":
        module, _, leaf = rest[1:].partition(".")
        if part == "match" and module in "qkvo":
            rest = f".attn.attn.linear_{module}.{leaf}"
        elif module == "attn" and leaf[0] in "qkvo" and leaf[1] == ".":
            rest = f".attn.attn.linear_{leaf}"
        elif module == "ffn":
            rest = f".ffn.layers.{leaf}"
    return _LEVEL_PART[part].format(i=i) + rest
