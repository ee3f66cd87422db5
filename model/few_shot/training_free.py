"""Few-shot systems that train nothing: a frozen encoder, and a rule. CONTRAST is a baseline; INSID3 is published (insid3.py).

They take any encoder that gives one grid of features (`ImageEncoder`): a vision transformer, or a CNN's last stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.backbone import ImageEncoder
from model.few_shot.contrast import contrast
from model.few_shot.insid3 import INSID3, SHARE
from model.few_shot.map_prior import SHARPNESS
from model.few_shot.memo import Memo
from model.ops import full, resize
from model.system import Frozen, Prediction, System
from util.cache import TensorCache
from util.config import Method, Train
from util.data.episodes import Episode
from util.errors import UserError
from util.run.identity import Facts, code_hash
from util.score.episodes import FewShotTask


class TrainingFree(System):
    """What they share: unit features of query and supports, each image once, then a rule for every episode.

    Args:
        encoder: frozen.
        shot: supports of an episode.
        side: of the square images.
        options: the system's own.
    """

    task = FewShotTask
    facts = Facts(trained=False)
    published: ClassVar[bool] = False  # see `PatchEncoder`

    def __init__(self, encoder: Frozen, shot: int, side: int, options: Any):
        super().__init__()
        self.backbone, self.shot, self.side, self.options = encoder, shot, side, options
        self.head = nn.Module()
        self.memo = Memo(TensorCache(0), "")

    def find(self, query: Tensor, supports: Tensor, masks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Apply the rule to an episode.

        Args:
            query: C h w; supports: K C h w, unit features; masks: K S S {0, 1, 255}, with an object in one of them.
        Returns:
            scores 2 H W of background and object, any size; maps H' W' by name, which a report shows.
        """
        raise NotImplementedError

    @property
    def encoder(self) -> ImageEncoder:
        return self.backbone.module

    def encoders(self, training: bool) -> list[nn.Module]:
        return [self.encoder]

    def groups(self, train: Train) -> list[dict[str, Any]]:
        return []

    def losses(self, batch: Any, step: int = 0) -> dict[str, Tensor]:
        raise UserError(f"{type(self).__name__} trains nothing: test it, `sh test.sh`")

    def remember(self, cache: TensorCache, fixed_head: bool) -> None:
        made_by = [code_hash(), torch.__version__, next(self.encoder.parameters()).device.type, *self.frozen_hashes().values()]
        self.memo = Memo(cache, " ".join(made_by))

    def cells(self, images: Tensor, keys: Sequence[str]) -> Tensor:
        """Return unit features N C h w of images N 3 S S, those with keys once; in fp32, whatever the run's precision."""

        def compute(rows: Sequence[int] | slice) -> dict[str, Tensor]:
            with torch.autocast(images.device.type, enabled=False):
                return {"cells": full(self.encoder.cells(images[rows].float()))}

        return self.memo.rows("cells", keys, images.device, compute)["cells"]

    @torch.no_grad()
    def predict(self, batch: Episode, baselines: bool = False) -> Prediction:
        if batch.support.shape[1] != self.shot:
            raise UserError(f"the batch has {batch.support.shape[1]} shots, this model was built for {self.shot} (Train.shot)")
        query = self.cells(batch.query, batch.query_key)
        supports = self.cells(batch.support.flatten(0, 1), sum(batch.support_key, [])).unflatten(0, (-1, self.shot))
        size, scores, maps = batch.query.shape[2:], [], []
        with torch.autocast(query.device.type, enabled=False):
            for q, s, mask in zip(query, supports, batch.support_mask, strict=True):
                found, shown = self.find(q, s, mask) if (mask == 1).any() else self.nothing(q)
                scores.append(resize(found[None], size, corners=False)[0])
                maps.append(shown)
        trivial = {"everything foreground": torch.ones_like(batch.query_mask, dtype=torch.bool)} if baselines else {}
        return Prediction(torch.stack(scores), maps={name: torch.stack([shown[name] for shown in maps]) for name in maps[0]},
                          baselines=trivial, logits=self.logits)  # fmt: skip

    logits: ClassVar[bool] = True  # see Prediction

    def nothing(self, query: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the result where no support has an object that is left at this side: background."""
        empty = query.new_zeros(query.shape[1:])
        return torch.stack([empty + 1, empty]), dict.fromkeys(self.shown, empty)

    shown: ClassVar[tuple[str, ...]] = ()  # names of the maps


class Contrast(TrainingFree):
    """Object where a cell is more similar to the supports' mean object than to their mean background."""

    shown = ("contrast",)

    def find(self, query: Tensor, supports: Tensor, masks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        score = contrast(query, supports, [*masks])
        return torch.stack([-score, score]) * SHARPNESS / 2, {"contrast": score}


@dataclass
class InsidOptions(Method):
    """INSID3's own options; the defaults are the published ones of ViT-L."""

    components: int | None = None  # of the positional basis; None: 500 of 1024 channels, the same share of any ViT; none of a CNN
    tau: float = 0.6  # cells more alike than this on average form a region
    alpha: float = 0.2  # regions that score higher make the mask

    def check(self) -> None:
        if self.components is not None and self.components < 0:
            raise UserError(f"Method.components = {self.components}: 0 or more, or null for {SHARE:.0%} of the channels")
        if not -1 <= self.tau <= 1:
            raise UserError(f"Method.tau = {self.tau}: a cosine, -1 to 1")


class Insid3(TrainingFree):
    """INSID3, 1- and K-shot: candidate cells, regions, a seed."""

    Options = InsidOptions
    published, logits = True, False
    shown = ("mutual", "regions")

    def __init__(self, encoder: Frozen, shot: int, side: int, options: InsidOptions):
        super().__init__(encoder, shot, side, options)
        self.rule = INSID3(self.encoder, side, options.components, options.tau, options.alpha)

    def find(self, query: Tensor, supports: Tensor, masks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.rule.find(query, supports, masks == 1)
        mutual = found.candidates.similarity.clamp(min=0) * found.candidates.backward
        return torch.stack([~found.mask, found.mask]).float(), {"mutual": mutual, "regions": found.regions.map}
