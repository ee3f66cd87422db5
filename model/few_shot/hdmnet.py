"""HDMNet (CVPR 2023), and PI-CLIP (CVPR 2024) which is HDMNet with CLIP priors in place of its cosine prior."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.backbone import BaseLearner
from model.clip import min_max
from model.clip.load import clip_tensors
from model.few_shot.ensemble import Ensemble
from model.few_shot.matcher import Matcher
from model.few_shot.parts import binary_mask, masked_average, max_cosine, reduce_block, scene_difference
from model.few_shot.prior import Features, Prior
from model.losses import distillation_loss, segmentation_loss
from model.ops import resize
from model.system import Frozen, Prediction, System, load_exactly
from util.config import Train
from util.data.episodes import Episode
from util.errors import UserError

PRIOR_SCALE = 10.0  # of the priors in the query feature; the matcher gets them unscaled


class Head(nn.Module):
    """Everything that HDMNet trains.

    Args:
        channels: of stage 2 + stage 3 together.
        priors: number of prior channels.
    """

    def __init__(self, channels: int, priors: int, shot: int, kshot_trans_dim: int, width: int = 256, matcher_width: int = 64):
        super().__init__()
        self.down_query = reduce_block(channels, width, dropout=0.5)
        self.down_supp = reduce_block(channels, width, dropout=0.5)
        self.query_merge = reduce_block(2 * width + priors, matcher_width)
        self.supp_merge = reduce_block(2 * width, matcher_width)
        self.matcher = Matcher(priors, matcher_width)
        self.ensemble = Ensemble(shot, kshot_trans_dim, restore_order=False)

    def forward(
        self, query: Tensor, support: Tensor, mask: Tensor, priors: Tensor, base: Tensor, difference: Tensor, own: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """
        Args:
            query: B C h w, stages 3 and 2 concatenated; support: B*K C h w, the same of the masked support.
            mask: B*K 1 S S; priors: B P h w; base: B N+1 h w logits; difference: B K; own: B base ranks or None.
        Returns:
            ensemble scores B 2 h w, meta logits B 2 h w, correlation maps B h w from coarse to fine.
        """
        query_feature, support_feature = self.merge(query, support, mask, priors)
        meta, correlations = self.matcher(query_feature, support_feature, mask, priors)
        return self.ensemble(meta, base, difference, own), meta, correlations

    def merge(self, query: Tensor, support: Tensor, mask: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the matcher: query feature B 64 h w (with the mean prototype and the priors), support B*K 64 h w."""
        query, support = self.down_query(query), self.down_supp(support)
        prototype = masked_average(support, mask)  # B*K 256 1 1
        mean = prototype.unflatten(0, (len(query), -1)).mean(1)
        query = self.query_merge(torch.cat([query, mean.expand_as(query), PRIOR_SCALE * priors], 1))
        return query, self.supp_merge(torch.cat([support, prototype.expand_as(support)], 1))


class HDMNet(System):
    """A frozen base learner, training-free priors, and the trained head.

    Args:
        base_learner: frozen here.
        priors: merged into the matcher in this order.
        low_stage: stage whose Gram matrices measure scene difference.
        distil_weight, base_weight: weights of the auxiliary losses.
        clip: the frozen CLIP that priors use, if any.
    """

    default_priors = ("cosine",)

    def __init__(
        self, base_learner: Frozen, priors: Sequence[Prior], shot: int, *, low_stage: int = 2, kshot_trans_dim: int = 2,
        distil_weight: float = 1.0, base_weight: float = 1.0, clip: Frozen | None = None,
    ):  # fmt: skip
        super().__init__()
        self.base_learner = base_learner
        self.clip = clip
        self.priors = list(priors)
        self.shot = shot
        self.low_stage = low_stage
        self.distil_weight, self.base_weight = distil_weight, base_weight
        channels = base_learner.module.encoder.channels
        self.head = Head(channels[2] + channels[3], sum(p.channels for p in priors), shot, kshot_trans_dim)
        self.prior_names = [prior.name for prior in priors]
        if "vtp" in self.prior_names:
            self.clip_patch = clip.module.visual.patch
        if clip is not None and clip.module.random:
            self.mark = "[random CLIP]"
            self.warnings = ("CLIP has random weights (CLIP.clip_path=random): the priors and every score mean nothing.",)

    def features(self, episode: Episode) -> Features:
        """Frozen features of query and masked support; the support's stage 4 only where a prior asks for it."""
        learner: BaseLearner = self.base_learner.module
        mask = binary_mask(episode.support_mask.flatten(0, 1))
        query = learner.encoder(episode.query)
        hidden = learner.hidden(query[4])
        last = 4 if any(prior.deep for prior in self.priors) else 3
        support = learner.encoder(episode.support.flatten(0, 1), mask, last=last)
        return Features(query, hidden, learner.classify(hidden), support, mask, episode.support.shape[1])

    def prior_maps(self, episode: Episode, features: Features) -> dict[str, Tensor]:
        return {prior.name: prior(episode, features) for prior in self.priors}

    def run_head(
        self, head: nn.Module, features: Features, priors: Tensor, own: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See `Head.forward`."""
        size = features.size
        # Stage 2 has the size of stage 3 but in VGG.
        query, support = (torch.cat([maps[3], resize(maps[2], size)], 1) for maps in (features.query, features.support))
        low = features.support[self.low_stage].unflatten(0, (-1, features.shot))
        difference = scene_difference(features.query[self.low_stage], low)
        return head(query, support, features.mask, priors, features.base, difference, own)

    def losses(self, batch: Episode) -> dict[str, Tensor]:
        self._check(batch)
        features = self.features(batch)
        priors = torch.cat(list(self.prior_maps(batch, features).values()), 1)
        final, meta, correlations = self.run_head(self.head, features, priors, batch.base_rank)
        target = batch.query_mask.long()
        return {
            "main": segmentation_loss(final, target) + segmentation_loss(meta, target),
            "distil": self.distil_weight * distillation_loss(correlations, batch.query_mask == 1),
            "base": self.base_weight * segmentation_loss(features.base, batch.base_label.long()),
        }

    @torch.no_grad()
    def predict(self, batch: Episode, baselines: bool = False) -> Prediction:
        self._check(batch)
        features = self.features(batch)
        maps = self.prior_maps(batch, features)
        final, meta, correlations = self.run_head(self.trained, features, torch.cat(list(maps.values()), 1), own=None)
        side = batch.query.shape[2:]
        shown = {name: prior.float().mean(1) for name, prior in maps.items()}
        return Prediction(
            resize(final.float(), side), resize(meta.float(), side), resize(features.base.float(), side),
            shown | {"correlation": correlations[-1].float()}, self.baselines(batch, features, shown) if baselines else {},
        )  # fmt: skip

    def baselines(self, batch: Episode, features: Features, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predictions that cost no training: everything is foreground; a prior, rescaled to 0..1, above one half.

        The cosine one is PFENet's measure, best stage-4 cosine with the support inside its mask, shots averaged.
        """
        stage4 = self.base_learner.module.encoder(batch.support.flatten(0, 1))[4]
        cosine = max_cosine(features.query[4].repeat_interleave(features.shot, 0), stage4, features.mask)
        cosine = min_max(cosine.float().flatten(1)).view_as(cosine).unflatten(0, (-1, features.shot)).mean(1)
        side = batch.query_mask.shape[1:]
        found = {"everything foreground": torch.ones_like(batch.query_mask, dtype=torch.bool),
                 "cosine prior > 0.5": resize(cosine, side)[:, 0] > 0.5}
        if "vtp" in maps:
            found["text prior (VTP) > 0.5"] = resize(maps["vtp"][:, None], side)[:, 0] > 0.5
        return found

    def optimizer(self, train: Train) -> torch.optim.Optimizer:
        """AdamW; ten times the rate outside the matcher; `kshot_rw` keeps its initial value, as published."""
        head: Head = self.trained
        rest = [head.down_query, head.down_supp, head.query_merge, head.supp_merge]
        rest += [head.ensemble.gram_merge, head.ensemble.cls_merge]
        groups = [
            {"params": list(head.matcher.parameters()), "lr": train.base_lr},
            {"params": [p for module in rest for p in module.parameters()], "lr": 10 * train.base_lr},
        ]
        return torch.optim.AdamW(groups, weight_decay=train.weight_decay)

    def load_base_learner(self, state: dict[str, Tensor], name: str) -> None:
        """Loads what ARCH=PSPNet trained, or a published base-learner checkpoint (`layerK...`, `ppm...`, `cls...`)."""
        learner = self.base_learner.module
        load_exactly(learner, {ours_from_pspnet(key): value for key, value in state.items()}, name)

    def official_name(self, name: str) -> str | None:
        return official_name(name)

    def _check_foreign(self, foreign: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """CLIP tensors inside a checkpoint must equal the CLIP in use (to fp16, in which published code keeps them)."""
        if self.clip is None:
            return foreign
        own = clip_tensors(self.clip.module)
        rest, differing = {}, []
        for key, value in foreign.items():
            bare = next((k for k in suffixes(key) if k in own), None)
            if bare is None:
                rest[key] = value
            elif value.shape != own[bare].shape or not torch.equal(value.half(), own[bare].half()):
                differing.append(key)
        if differing:
            raise UserError(f"{name} was trained with another CLIP than CLIP.clip_path gives: {len(differing)} tensors differ "
                            f"({', '.join(differing[:3])}); nothing was loaded")
        return rest

    def _check(self, batch: Episode) -> None:
        if batch.support.shape[1] != self.shot:
            raise UserError(f"the batch has {batch.support.shape[1]} shots, this model was built for {self.shot} (Train.shot)")


class PICLIP(HDMNet):
    """HDMNet decoding PI-CLIP's text and visual priors."""

    default_priors = ("vtp", "vvp")


_OFFICIAL = (
    # ours -> published, first match wins, applied to the front of the name
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
_LEVEL_PART = {
    "embed": "down_sample_layers.{i}.0", "blocks.0": "down_sample_layers.{i}.1", "blocks.1": "down_sample_layers.{i}.2",
    "norm": "down_sample_layers.{i}.3", "match": "match_layers.{i}.0", "merge": "match_layers.{i}.1", "parse": "parse_layers.{i}",
}  # fmt: skip


def official_name(name: str) -> str | None:
    """Name in our state dict -> key in HDMNet's / PI-CLIP's published checkpoints; None for CLIP, which comes by its own file."""
    if name.startswith("clip."):
        return None
    ours, official = next(pair for pair in _OFFICIAL if name.startswith(pair[0]))
    rest = name.removeprefix(ours)
    if ours != "head.matcher.levels.":
        return official + rest
    i, _, rest = rest.partition(".")
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
    return official + _LEVEL_PART[part].format(i=i) + rest


def ours_from_pspnet(key: str) -> str:
    """Base-learner key, published (`layerK...`) or ours (`encoder...`) -> ours."""
    return f"encoder.stages.{key.removeprefix('layer')}" if key.startswith("layer") else key


def suffixes(key: str) -> list[str]:
    """a.b.c -> [a.b.c, b.c, c]: a published checkpoint keeps CLIP under some attribute name."""
    parts = key.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
