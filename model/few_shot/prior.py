"""Priors: first guesses of where the episode's class is in the query, on the feature grid.

`Method.priors` names any of them for any few-shot system. PFENet and BAM use `cosine`, HDMNet `similarity`, PI-CLIP (Sec. 3)
`vtp` and `vvp`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.backbone import BaseLearner
from model.backbone.encoder import Encoder
from model.clip import Cam, Clip, min_max, refine, softmax_grad_cam
from model.few_shot.parts import inside, max_cosine
from model.ops import resize
from model.system import Frozen
from util.data.episodes import Episode
from util.errors import UserError

ATTENTION_BLOCKS = 8  # the affinity averages the last 8 blocks


@dataclass
class Features:
    """What the frozen encoder gives for an episode batch; support maps have B*K rows (shots of an episode adjacent)."""

    query: list[Tensor]  # stages 0..4, B C h w
    query_hidden: Tensor | None  # B 512 h w, base learner before its classifier; None in a system without one
    base: Tensor | None  # B N+1 h w, base logits
    support: list[Tensor]  # stages 0..3 (0..4 when a prior is deep); of the masked image where the system masks it
    mask: Tensor  # B*K 1 S S in {0, 1}
    shot: int

    @property
    def size(self) -> torch.Size:
        """(h, w) of the grid that prototypes, priors and head share: stage 3's."""
        return self.query[3].shape[2:]


class Prior(Protocol):
    """Gives B channels h w, or B K channels h w where the head weighs the shots.

    Attributes: channels it adds to the head, and whether it needs the support's stage 4 ("deep").
    """

    name: str
    channels: int
    deep: bool

    def __call__(self, episode: Episode, features: Features) -> Tensor: ...


def join(maps: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """Prior maps as one tensor, B P h w; those with a map for every shot (B K c h w) are summed over shots.

    Args:
        weights: B K, of the shots; None: their mean.
    """
    merged = []
    for prior in maps:
        if prior.dim() == 5:
            prior = prior.mean(1) if weights is None else (prior * weights[..., None, None, None]).sum(1)
        merged.append(prior)
    return torch.cat(merged, 1)


class CosinePrior:
    """PFENet's (Sec. 3.2), BAM's too: best stage-4 cosine with the support, rescaled to 0..1 for every shot.

    The support's stage 4 is computed on its masked stage 3, and masked again.
    """

    name, channels, deep = "cosine", 1, False

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        stage3 = features.support[3]
        stage4 = self.encoder.last_stage(stage3 * resize(features.mask, stage3.shape[2:]))
        stage4 = stage4 * resize(features.mask, stage4.shape[2:])
        best = max_cosine(features.query[4].repeat_interleave(features.shot, 0), stage4)
        best = resize(min_max(best.flatten(1)).view_as(best), features.size)
        return best.unflatten(0, (-1, features.shot))


class SimilarityPrior:
    """HDMNet's: best cosine with the support's masked-in positions in the base learner's hidden map and in stage 4;
    mean over shots, not rescaled."""

    name, channels, deep = "similarity", 2, True

    def __init__(self, base_learner: Frozen):
        self.base_learner: BaseLearner = base_learner.module

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        stage4 = features.support[4]
        maps = [
            self.best(query, support, features)
            for query, support in ((features.query_hidden, self.base_learner.hidden(stage4)), (features.query[4], stage4))
        ]
        return resize(torch.cat(maps, 1), features.size)

    @staticmethod
    def best(query: Tensor, support: Tensor, features: Features) -> Tensor:
        query = query.repeat_interleave(features.shot, 0)
        return max_cosine(query, inside(support, features.mask)).unflatten(0, (-1, features.shot)).mean(1)


class VisualPrior:
    """VVP: the same measure on raw tokens of CLIP's last two blocks, last block first; one channel per block and shot.

    CLIP sees *ImageNet*-normalised images here, and the support after masking: as published (PI-CLIP Sec. 3.3).
    """

    name, deep = "vvp", False

    def __init__(self, clip: Frozen, shot: int):
        self.clip: Clip = clip.module
        self.channels = 2 * shot

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        trunk, shot = self.clip.visual, features.shot
        support = trunk.normalise(episode.support.flatten(0, 1), "imagenet") * features.mask
        images = torch.cat([trunk.normalise(episode.query, "imagenet"), support])
        tokens, grid = trunk.embed(images)
        last = len(trunk.blocks) - 1
        hidden = trunk.run(tokens, keep_hidden=(last - 1, last)).hidden
        B = len(episode.query)
        maps = []
        for block in (last, last - 1):
            patches = hidden[block][:, 1:].float().transpose(1, 2).unflatten(2, grid)
            query = patches[:B].repeat_interleave(shot, 0)
            maps.append(max_cosine(query, inside(patches[B:], features.mask)).view(B, shot, *grid))
        return resize(torch.cat(maps, 1), features.size)


class TextPrior:
    """VTP: Grad-CAM of the class text, refined by high-order attention relations; one map, given twice (PI-CLIP Sec. 3.2).

    Args:
        bank: 2C D, rows "a photo of c." then "a photo without c.".
        vocabulary: which classes' texts compete in the softmax. `present` reads the query's annotation, as published;
            `target`, `base+target` and `all` do not.
        base: 1-based base classes of the fold.
    """

    name, channels, deep = "vtp", 2, False

    def __init__(self, clip: Frozen, bank: Tensor, vocabulary: str, base: Sequence[int]):
        self.clip: Clip = clip.module
        self.bank = bank
        self.vocabulary = vocabulary
        self.base = torch.tensor(base) - 1

    def candidates(self, episode: Episode) -> Tensor:
        """B 2C bool: the texts that compete; the target always does."""
        if self.vocabulary == "present":
            classes = episode.present.clone()
        else:
            classes = torch.full_like(episode.present, self.vocabulary == "all")
        if self.vocabulary == "base+target":
            classes[:, self.base] = True
        classes.scatter_(1, episode.cls[:, None] - 1, True)
        return classes.repeat(1, 2)

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        maps = [resize(prior[None, None], features.size) for prior in self.at_annotation_size(episode)]
        return torch.cat(maps).expand(-1, 2, -1, -1)

    def at_annotation_size(self, episode: Episode) -> list[Tensor]:
        """The refined prior of each query, H0 W0 in 0..1 (its largest value may fall short of 1 after resizing)."""
        by_size: dict[torch.Size, list[int]] = defaultdict(list)
        for i, image in enumerate(episode.clip_query):
            by_size[image.shape].append(i)
        priors: dict[int, Tensor] = {}
        for rows in by_size.values():
            images = torch.stack([episode.clip_query[i] for i in rows])
            for i, prior in zip(rows, self.refined(images, self.candidates(episode)[rows], episode.cls[rows] - 1), strict=True):
                size = tuple(episode.annotation_hw[i].tolist())
                priors[i] = resize(prior[None, None], size, corners=False)[0, 0]
        return [priors[i] for i in range(len(priors))]

    def refined(self, images: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
        """B 3 H W uint8 images of one size -> B h w maps on the patch grid."""
        cam, attention = self.cam(images, candidates, target)
        return refine(cam.map, attention)

    def cam(self, images: Tensor, candidates: Tensor, target: Tensor) -> tuple[Cam, Tensor]:
        """Grad-CAM of the target texts, and the patch-to-patch attention B n n averaged over the last blocks."""
        trunk = self.clip.visual
        tokens, grid = trunk.embed(trunk.normalise(images))
        last = len(trunk.blocks) - 1
        run = trunk.run(tokens, stop=last, keep_attention=range(last + 1 - ATTENTION_BLOCKS, last))
        self.bank = self.bank.to(images.device)
        cam = softmax_grad_cam(trunk, run.tokens, grid, self.bank, self.clip.logit_scale, candidates, target)
        attention = (sum(run.attention.values()) + cam.attention) / ATTENTION_BLOCKS
        return cam, attention[:, 1:, 1:]


PRIORS = ("cosine", "similarity", "vtp", "vvp")


def check_priors(names: Sequence[str], base_learner: bool) -> None:
    """Raises UserError for an unknown or repeated prior, or one that asks for a base learner where there is none."""
    for name in names:
        if name not in PRIORS:
            raise UserError(f"Method.priors: unknown prior {name!r}; there are {', '.join(PRIORS)}")
    if len(set(names)) < len(names) or not names:
        raise UserError(f"Method.priors = {list(names)}: name at least one prior, each once")
    if "similarity" in names and not base_learner:
        raise UserError("Method.priors: `similarity` compares features of a base learner, and this system has none; use `cosine`")
