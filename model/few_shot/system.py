"""Shared by all few-shot systems: frozen features, priors, prediction, baselines, published checkpoints.

A subclass defines the trained head (`decode`), its losses (`terms`) and the names of its published tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from model.backbone import BaseLearner
from model.backbone.encoder import Encoder, stage_features
from model.clip.load import without_clip
from model.few_shot.contrast import coarser, contrast_to, support_means
from model.few_shot.memo import Memo
from model.few_shot.parts import binary_mask, gram, scene_difference
from model.few_shot.prior import READ_TEXT, CosinePrior, Features, Prior, View, parts
from model.ops import resize
from model.system import Frozen, Prediction, System, content_hash, load_exactly
from util.cache import TensorCache
from util.config import Method
from util.data.episodes import Episode
from util.errors import UserError
from util.run.identity import code_hash
from util.score.episodes import FewShotTask


@dataclass
class Decoded:
    """Result of a head for an episode batch, on the feature grid."""

    final: Tensor  # B 2 h w
    meta: Tensor | None = None  # B 2 h w logits, the few-shot branch before the ensemble
    inner: list[Tensor] = field(default_factory=list)  # B 2 h' w' logits of PFENet's pyramid
    correlations: list[Tensor] = field(default_factory=list)  # B h w of HDMNet's levels, coarse first
    votes: Tensor | None = None  # B K 2 h w, see Prediction


IDENTITY = ("Method.priors", "Train.filter_novel", "Train.crop", "Train.selection")  # of every few-shot checkpoint


@dataclass
class Options(Method):
    """Options that every few-shot system with prototypes has."""

    low_fea: Literal["layer1", "layer2", "layer3"] = "layer2"  # stage whose Gram matrices measure scene difference
    patches: str = ""  # an encoder beside the backbone for priors that compare features, timm:NAME; "": the backbone's own stages
    patches_weight: str = "hub"  # its weights: file | hub | none


class FewShot(System):
    """A frozen backbone, training-free priors, and the trained head.

    Args:
        backbone: a frozen base learner where `facts.before` names one, else a frozen encoder.
        priors: given to the head in this order.
        options: the system's own, an `Options`.
        clip: the frozen CLIP that priors use, if any.
    """

    task = FewShotTask
    Options = Options
    masks_support: ClassVar[bool] = False  # multiply the support image by its mask before the backbone (HDMNet)
    official: ClassVar[tuple[tuple[str, str], ...]]  # prefixes: ours -> published, first match wins

    def __init__(self, backbone: Frozen, priors: Sequence[Prior], shot: int, options: Any, clip: Frozen | None = None):
        super().__init__()
        if self.uses_base_learner:
            self.base_learner = backbone
        else:
            self.backbone = backbone
        self.clip = clip
        self.priors = list(priors)
        self.shot = shot
        self.options = options
        self.memo, self.fixed_head = Memo(TensorCache(0), ""), ""
        channels = self.encoder.channels
        self.prior_names = [prior.name for prior in priors]
        self.head = self.build_head(channels[2] + channels[3], sum(p.channels for p in priors))
        if "vtp" in parts(self.prior_names):
            self.clip_patch = clip.module.visual.patch
        if "cam" in self.prior_names:
            self.clip_patch = self.priors[0].source.side
        if clip is not None and clip.module.random:
            self.mark = "[random CLIP]"
            self.warnings = ("CLIP has random weights (CLIP.clip_path=random): the priors and every score mean nothing.",)

    @property
    def uses_base_learner(self) -> bool:
        return bool(self.facts.before)

    @property
    def low_stage(self) -> int:
        """Backbone stage whose Gram matrices measure scene difference."""
        return int(self.options.low_fea[-1])

    # Defined by a subclass.

    def build_head(self, channels: int, priors: int) -> nn.Module:
        """Build the trained part, for middle features and priors of so many channels."""
        raise NotImplementedError

    def decode(self, head: nn.Module, features: Features, maps: Sequence[Tensor], own: Tensor) -> Decoded:
        """Run the head (perhaps wrapped by DDP). own: B base ranks of the episodes' classes, -1 for novel ones."""
        raise NotImplementedError

    def terms(self, decoded: Decoded, features: Features, episode: Episode) -> dict[str, Tensor]:
        """Return weighted loss terms."""
        raise NotImplementedError

    # Shared by all.

    @property
    def reads_text(self) -> bool:
        return bool(READ_TEXT & set(parts(self.prior_names)))

    @property
    def encoder(self) -> Encoder:
        return self.base_learner.module.encoder if self.uses_base_learner else self.backbone.module

    def remember(self, cache: TensorCache, fixed_head: bool) -> None:
        """See System. Only episodes with keys (evaluation) are cached."""
        device = next(self.encoder.parameters()).device.type
        made_by = [code_hash(), torch.__version__, device, *self.frozen_hashes().values()]
        made_by += [] if self.clip is None else [self.clip.module.settings]
        self.memo = Memo(cache, " ".join([*made_by, repr(self.options), str(self.masks_support), str(self.dilated)]))
        self.fixed_head = content_hash(self.trained) if fixed_head else ""

    def features(self, episode: Episode, query_needs: frozenset[str] = frozenset(), support_needs: frozenset[str] = frozenset()
                 ) -> Features:  # fmt: skip
        """Compute frozen views of query and support: the parts that the priors need, and the ones asked for."""
        mask, images = binary_mask(episode.support_mask.flatten(0, 1)), episode.support.flatten(0, 1)
        query_needs = query_needs.union(*(prior.query_needs for prior in self.priors))
        if self.uses_base_learner:
            query_needs |= {"base"}
        support_needs = support_needs.union(*(prior.support_needs for prior in self.priors))
        device = episode.query.device
        query = self.memo.rows(
            f"query {sorted(query_needs)} {self.fixed_head}", episode.query_key, device,
            lambda rows: self.view(episode.query[rows], None, query_needs),
        )  # fmt: skip
        support = self.memo.rows(
            f"support {sorted(support_needs)} {self.fixed_head}", sum(episode.support_key, []), device,
            lambda rows: self.view(images[rows], mask[rows], support_needs),
        )  # fmt: skip
        return Features(View(**query), View(**support), mask, episode.support.shape[1], self.memo)

    def view(self, images: Tensor, mask: Tensor | None, needs: frozenset[str]) -> dict[str, Tensor]:
        """Compute the parts of a `View` of N images; the deep stages run only where they are needed.

        Args:
            mask: N 1 S S of supports, None for queries.
        """
        deep = bool(needs & {"stage4", "hidden", "base", "cells"})
        stages = self.encoder(images, mask if self.masks_support else None, last=4 if deep else 3)
        middle = torch.cat([stages[3], resize(stages[2], stages[3].shape[2:])], 1)  # of one size except in VGG
        found = {"gram": gram(stages[self.low_stage])} | (self.reduce(middle, mask) if self.fixed_head else {"middle": middle})
        if "stage4" in needs:
            found["stage4"] = stages[4]
        if needs & {"hidden", "base"}:
            learner: BaseLearner = self.base_learner.module
            hidden = learner.hidden(stages[4])
            found |= {"hidden": hidden} if "hidden" in needs else {}
            found |= {"base": learner.classify(hidden)} if "base" in needs else {}
        if "masked4" in needs:
            found["masked4"] = self.masked4(stages[3], mask)
        if "cells" in needs:  # of the whole image, also where a support's is masked
            masked = self.masks_support and mask is not None
            cells = self.encoder.cells(images) if masked else stage_features(*stages[3:])
            found["cells"] = coarser(cells.float())
        return found

    def masked4(self, stage3: Tensor, mask: Tensor) -> Tensor:
        """Stage 4 of a masked stage 3, masked again; mask: N 1 S S."""
        deepest = self.encoder.last_stage(stage3 * resize(mask, stage3.shape[2:]))
        return deepest * resize(mask, deepest.shape[2:])

    def reduce(self, middle: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Reduce middle features by the fixed head (testing), as parts of a `View`: six times smaller."""
        return {"middle": (self.trained.down_query if mask is None else self.trained.down_supp)(middle)}

    def difference(self, features: Features) -> Tensor:
        """B K scene differences of query and shots."""
        return scene_difference(features.query.gram, features.support.gram.unflatten(0, (-1, features.shot)))

    def prior_maps(self, episode: Episode, features: Features) -> dict[str, Tensor]:
        return {prior.name: prior(episode, features) for prior in self.priors}

    def losses(self, batch: Episode, step: int = 0) -> dict[str, Tensor]:
        self._check(batch)
        features = self.features(batch)
        maps = self.prior_maps(batch, features)
        return self.terms(self.decode(self.head, features, list(maps.values()), batch.base_rank), features, batch)

    def run(self, batch: Episode, *needs: frozenset[str]) -> tuple[Features, dict[str, Tensor], Decoded]:
        """Run the parts of `predict`: frozen features, prior maps by name, the head's result. needs: as `features`."""
        features = self.features(batch, *needs)
        maps = self.prior_maps(batch, features)
        return features, maps, self.decode(self.trained, features, list(maps.values()), batch.base_rank)

    def stages(self, batch: Episode) -> dict[str, dict[str, Tensor]]:
        features, priors, decoded = self.run(batch)
        views = {f"{role} {name}": value for role, view in (("query", features.query), ("support", features.support))
                 for name, value in vars(view).items() if value is not None}  # fmt: skip
        matcher = {"final": decoded.final} | ({} if decoded.meta is None else {"meta": decoded.meta})
        return {"data": batch.tensors(), "features": views, "prior": priors, "matcher": matcher}

    @torch.no_grad()
    def predict(self, batch: Episode, baselines: bool = False) -> Prediction:
        self._check(batch)
        needs = ({"cells"} | CosinePrior.query_needs, {"cells"} | CosinePrior.support_needs) if baselines else ()
        features, maps, decoded = self.run(batch, *map(frozenset, needs))
        shown = {name: prior.float().flatten(1, -3).mean(1) for name, prior in maps.items()} | self.pictures(decoded)
        side = batch.query.shape[2:]
        scores = (decoded.final, decoded.meta, features.query.base)
        final, meta, base = (None if x is None else resize(x.float(), side) for x in scores)
        trivial = self.baselines(batch, features, shown) if baselines else {}
        votes = None if decoded.votes is None else decoded.votes.float()
        return Prediction(final, meta, base, maps=shown, priors=tuple(self.prior_names), baselines=trivial, votes=votes)

    def pictures(self, decoded: Decoded) -> dict[str, Tensor]:
        """Return maps B h w of the head that a report shows beside the priors."""
        return {"correlation": decoded.correlations[-1].float()} if decoded.correlations else {}

    def baselines(self, batch: Episode, features: Features, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return predictions without training: a prior, which is in 0..1, above one half; the contrast map above zero.

        The cosine one is PFENet's prior, on this system's own features; so is the contrast map.
        """
        cosine = maps.get("cosine")
        if cosine is None:
            cosine = CosinePrior()(batch, features).float().mean(1)[:, 0]
        side = batch.query_mask.shape[1:]
        found = {"cosine prior > 0.5": resize(cosine[:, None], side)[:, 0] > 0.5,
                 "contrast > 0": resize(self.contrast(batch, features)[:, None], side)[:, 0] > 0}
        if "vtp" in maps:
            found["text prior (VTP) > 0.5"] = resize(maps["vtp"][:, None], side)[:, 0] > 0.5
        return found

    def contrast(self, batch: Episode, features: Features) -> Tensor:
        """Return contrast maps, B h w: `model.few_shot.contrast` on the encoder's features of whole images."""
        masks = batch.support_mask.flatten(0, 1)
        means = [support_means(unit, mask) for unit, mask in zip(features.support.cells, masks, strict=True)]
        shots = torch.stack(means).unflatten(0, (len(batch.query), -1))
        return torch.stack([contrast_to(unit, given) for unit, given in zip(features.query.cells, shots, strict=True)])

    def encoders(self, training: bool) -> list[nn.Module]:
        return [] if self.uses_base_learner else [self.encoder]

    def load_before(self, state: Mapping[str, Tensor], name: str) -> None:
        """Load the base learner of ARCH=PSPNet, or a published one (`layerK...`, `ppm...`, `cls...`)."""
        ours = {key.replace("layer", "encoder.stages.", 1) if key.startswith("layer") else key: v for key, v in state.items()}
        load_exactly(self.base_learner.module, ours, name)

    def official_name(self, name: str) -> str | None:
        """Return the published checkpoint's key of a name in our state dict; None for CLIP and patches, which have own files."""
        if name.startswith(("clip.", "patches.")):
            return None
        ours, official = next(pair for pair in self.official if name.startswith(pair[0]))
        return official + name.removeprefix(ours)

    def _check_foreign(self, foreign: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """Check that CLIP tensors inside a checkpoint equal the CLIP in use (to fp16, as published code stores them)."""
        if self.clip is None:
            return foreign
        return without_clip(foreign, self.clip.module, name)

    def _check(self, batch: Episode) -> None:
        if batch.support.shape[1] != self.shot:
            raise UserError(f"the batch has {batch.support.shape[1]} shots, this model was built for {self.shot} (Train.shot)")
