"""Priors: first guesses of where the episode's class is in the query, on the feature grid.

`Method.priors` names any of them for any few-shot system. PFENet and BAM use `cosine`, HDMNet `similarity`, PI-CLIP (Sec. 3)
`vtp` and `vvp`. map_prior.py has training-free ones: `contrast`, INSID3's, open-vocabulary maps.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.clip import Cam, Clip, min_max, refine, softmax_grad_cam
from model.few_shot.memo import Memo
from model.few_shot.parts import inside, max_cosine
from model.ops import resize
from model.system import Frozen
from util.data.episodes import Episode, content_key
from util.errors import UserError, nearest

ATTENTION_BLOCKS = 8  # the affinity averages the last 8 blocks


@dataclass
class View:
    """Frozen features of N images; None where no prior or head needs them."""

    gram: Tensor | None = None  # N c c: Gram matrix of the low stage
    middle: Tensor | None = None  # N C h w: stages 3 and 2 concatenated; with a fixed head (testing) its reduced features
    prototype: Tensor | None = None  # N 256 1 1, and
    tokens: Tensor | None = None  # N n 64: instead of `middle`, the supports as encoded by HDMNet's fixed head
    stage4: Tensor | None = None  # N C' h' w'
    hidden: Tensor | None = None  # N 512 h' w': base learner before its classifier
    base: Tensor | None = None  # N B+1 h' w': base logits (queries)
    cells: Tensor | None = None  # N C" h w: unit features of the whole image (`ImageEncoder.cells`, `contrast.coarser`)
    masked4: Tensor | None = None  # N C' h' w': stage 4 of the masked stage 3, masked again (supports)
    level2: Tensor | None = None  # N n C h w: all blocks of a stage before their last ReLU (HSNet), in place of the middle
    level3: Tensor | None = None
    level4: Tensor | None = None

    @property
    def levels(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.level2, self.level3, self.level4


@dataclass
class Features:
    """Frozen views of an episode batch; support rows are B*K (shots of an episode adjacent)."""

    query: View
    support: View  # of the masked image where the system masks it
    mask: Tensor  # B*K 1 S S in {0, 1}
    shot: int
    memo: Memo

    @property
    def size(self) -> torch.Size:
        """(h, w) of the grid that prototypes, priors and head share: stage 3's (HSNet: level 2's)."""
        return (self.query.level2 if self.query.middle is None else self.query.middle).shape[-2:]


class Prior(Protocol):
    """A function that returns maps B channels h w, or B K channels h w where the head weighs the shots.

    Attributes: number of channels, and the parts of a `View` that it reads beyond the middle.
    """

    name: str
    channels: int
    query_needs: frozenset[str]
    support_needs: frozenset[str]

    def __call__(self, episode: Episode, features: Features) -> Tensor: ...


def join(maps: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """Join prior maps to one tensor, B P h w; those with a map for every shot (B K c h w) are merged over shots.

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
    """Prior of PFENet (Sec. 3.2) and BAM: best stage-4 cosine with the support, rescaled to 0..1 for every shot.

    The support's stage 4 is computed on its masked stage 3, and masked again.
    """

    name, channels = "cosine", 1
    query_needs, support_needs = frozenset({"stage4"}), frozenset({"masked4"})

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        best = max_cosine(features.query.stage4.repeat_interleave(features.shot, 0), features.support.masked4)
        best = resize(min_max(best.flatten(1)).view_as(best), features.size)
        return best.unflatten(0, (-1, features.shot))


class SimilarityPrior:
    """Prior of HDMNet: best cosine with the support's positions inside the mask, in the base learner's hidden map and in
    stage 4; mean over shots, not rescaled."""

    name, channels = "similarity", 2
    query_needs = support_needs = frozenset({"stage4", "hidden"})

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        query, support = features.query, features.support
        maps = [self.best(q, s, features) for q, s in ((query.hidden, support.hidden), (query.stage4, support.stage4))]
        return resize(torch.cat(maps, 1), features.size)

    @staticmethod
    def best(query: Tensor, support: Tensor, features: Features) -> Tensor:
        query = query.repeat_interleave(features.shot, 0)
        return max_cosine(query, inside(support, features.mask)).unflatten(0, (-1, features.shot)).mean(1)


class VisualPrior:
    """VVP: the same measure on raw tokens of CLIP's last two blocks, last block first; one channel per block and shot.

    CLIP sees *ImageNet*-normalised images here, and the support after masking: as published (PI-CLIP Sec. 3.3).
    """

    name = "vvp"
    query_needs = support_needs = frozenset()

    def __init__(self, clip: Frozen, shot: int):
        self.clip: Clip = clip.module
        self.channels = 2 * shot

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        memo, shot, device = features.memo, features.shot, episode.query.device
        images = episode.support.flatten(0, 1)
        query = memo.rows("vvp query", episode.query_key, device, lambda rows: self.tokens(episode.query[rows]))
        support = memo.rows("vvp support", sum(episode.support_key, []), device,
                            lambda rows: self.tokens(images[rows], features.mask[rows]))  # fmt: skip
        maps = [
            max_cosine(query[block].repeat_interleave(shot, 0), support[block]).unflatten(0, (-1, shot))[:, :, 0]
            for block in ("last", "before")
        ]
        return resize(torch.cat(maps, 1), features.size)

    def tokens(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return patch tokens of the last block and the one before, N C h w, of images N 3 S S RGB 0..255; with a mask
        N 1 S S those of the masked image, zero outside."""
        trunk = self.clip.visual
        images = trunk.normalise(images, "imagenet")
        tokens, grid = trunk.embed(images if mask is None else images * mask)
        last = len(trunk.blocks) - 1
        hidden = trunk.run(tokens, keep_hidden=(last - 1, last)).hidden
        maps = {name: hidden[block][:, 1:].float().transpose(1, 2).unflatten(2, grid)
                for name, block in (("last", last), ("before", last - 1))}
        return maps if mask is None else {name: inside(x, mask) for name, x in maps.items()}


class TextPrior:
    """VTP: Grad-CAM of the class text, refined by high-order attention relations; one map, given twice (PI-CLIP Sec. 3.2).

    Args:
        bank: 2C D, rows "a photo of c." then "a photo without c.".
        vocabulary: which classes' texts compete in the softmax. `present` reads the query's annotation, as published;
            `target`, `base+target` and `all` do not.
        base: 1-based base classes of the fold.
    """

    name, channels = "vtp", 2
    query_needs = support_needs = frozenset()

    def __init__(self, clip: Frozen, bank: Tensor, vocabulary: str, base: Sequence[int]):
        self.clip: Clip = clip.module
        self.vocabulary = vocabulary
        self.base = torch.tensor(base) - 1
        self.use(bank)

    def use(self, bank: Tensor) -> None:
        """Use other texts from now on."""
        self.bank = bank
        self.bank_key = content_key(bank.cpu().numpy())

    def candidates(self, episode: Episode) -> Tensor:
        """Return the competing texts, B 2C bool; the target is always one."""
        if self.vocabulary == "present":
            classes = episode.present.clone()
        else:
            classes = torch.full_like(episode.present, self.vocabulary == "all")
        if self.vocabulary == "base+target":
            classes[:, self.base] = True
        classes.scatter_(1, episode.cls[:, None] - 1, True)
        return classes.repeat(1, 2)

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        candidates = self.candidates(episode)
        keys = [f"{image} {size} {cls} {''.join(map(str, row))}" for image, size, cls, row in zip(
            episode.query_key, episode.annotation_hw.tolist(), episode.cls.tolist(), candidates.int().tolist(), strict=True
        )] if episode.query_key else []  # fmt: skip

        def compute(rows: Sequence[int] | slice) -> dict[str, Tensor]:
            maps = self.at_annotation_size(episode, range(len(episode))[rows] if isinstance(rows, slice) else rows)
            return {"map": torch.cat([resize(prior[None, None], features.size) for prior in maps])}

        found = features.memo.rows(f"vtp {self.bank_key} {tuple(features.size)}", keys, episode.query.device, compute)
        return found["map"].expand(-1, 2, -1, -1)

    def at_annotation_size(self, episode: Episode, rows: Sequence[int]) -> list[Tensor]:
        """Return the refined prior of some queries, H0 W0 in 0..1 (the maximum may be below 1 after resizing)."""
        candidates = self.candidates(episode)
        by_size: dict[torch.Size, list[int]] = defaultdict(list)
        for i in rows:
            by_size[episode.clip_query[i].shape].append(i)
        priors: dict[int, Tensor] = {}
        for same in by_size.values():
            images = torch.stack([episode.clip_query[i] for i in same])
            for i, prior in zip(same, self.refined(images, candidates[same], episode.cls[same] - 1), strict=True):
                size = tuple(episode.annotation_hw[i].tolist())
                priors[i] = resize(prior[None, None], size, corners=False)[0, 0]
        return [priors[i] for i in rows]

    def refined(self, images: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
        """Return maps on the patch grid, B h w, of B 3 H W uint8 images of one size."""
        cam, attention = self.cam(images, candidates, target)
        return refine(cam.map, attention)

    def cam(self, images: Tensor, candidates: Tensor, target: Tensor) -> tuple[Cam, Tensor]:
        """Return Grad-CAM of the target texts, and the patch-to-patch attention B n n averaged over the last blocks."""
        trunk = self.clip.visual
        tokens, grid = trunk.embed(trunk.normalise(images))
        last = len(trunk.blocks) - 1
        run = trunk.run(tokens, stop=last, keep_attention=range(last + 1 - ATTENTION_BLOCKS, last))
        self.bank = self.bank.to(images.device)
        cam = softmax_grad_cam(trunk, run.tokens, grid, self.bank, self.clip.logit_scale, candidates, target)
        attention = (sum(run.attention.values()) + cam.attention) / ATTENTION_BLOCKS
        return cam, attention[:, 1:, 1:]


CELL_PRIORS = ("contrast", "mutual", "regions")  # map_prior.py
TEXT_MAPS = ("naclip", "sclip", "clearclip", "maskclip", "proxyclip")
PRIORS = ("cosine", "similarity", "vtp", "vvp", *CELL_PRIORS, *TEXT_MAPS)
READ_TEXT = {"vtp", "cam", *TEXT_MAPS}


def parts(names: Sequence[str]) -> list[str]:
    """Return names of priors with those of joined ones, A+B, in their place."""
    return [part for name in names for part in name.split("+")]


def check_priors(names: Sequence[str], base_learner: bool) -> None:
    """Raise UserError for an unknown or repeated prior, or one that needs a base learner where there is none."""
    for name in parts(names):
        if name not in PRIORS:
            near = nearest(name, PRIORS)
            hint = f"did you mean {near}? " if near else ""
            raise UserError(f"Method.priors: unknown prior {name!r}; {hint}There are {', '.join(PRIORS)}, and several joined: "
                            "contrast+naclip")
    if len(set(names)) < len(names) or not names or any(len(set(n.split("+"))) < len(n.split("+")) for n in names):
        raise UserError(f"Method.priors = {list(names)}: name at least one prior, each once")
    if "similarity" in parts(names) and not base_learner:
        raise UserError("Method.priors: `similarity` compares features of a base learner, and this system has none; use `cosine`")
