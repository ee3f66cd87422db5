"""Training-free maps as priors: `contrast`, INSID3's `mutual` and `regions`, and open-vocabulary maps of the class's name.

All are one map per query in 0..1, without a backward pass. Those that compare images read unit features (`ImageEncoder.cells`) of
the decoder's own backbone, or of a patch encoder beside it (Method.patches). Names joined by "+" are one map, their mean.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.backbone import ImageEncoder
from model.clip import Clip
from model.clip import dense as D
from model.few_shot.contrast import coarser, contrast
from model.few_shot.insid3 import INSID3
from model.few_shot.prior import Features, Prior, join
from model.ops import full, resize
from util.data.episodes import Episode, content_key
from util.errors import UserError

SHARPNESS = 10.0  # of the contrast's sigmoid: a difference of cosines of 0.1 becomes 0.73
SCALE = 40.0  # of cosines before the softmax, as SCLIP, NACLIP and ProxyCLIP have it by default
SIDE = 16  # patches along a side that CLIP sees, at most: 256 pixels of ViT-B/16 (published windows: 224), a third of VTP's time
# Names of classes -> background words that are the same thing or a part of it, besides the name itself.
SAME = {"diningtable": ("desk",), "dining table": ("desk",), "table": ("desk",), "house": ("building",), "shelves": ("shelf",),
        "cabinet": ("wardrobe", "shelf"), "sidewalk": ("road",), "ground": ("sands",), "sand": ("sands",), "stairs": ("stair",),
        "water": ("sea", "river"), "bedclothes": ("bed",), "light": ("lamp",), "track": ("rail",)}  # fmt: skip


class CellPrior:
    """A prior that compares unit features of query and supports.

    Args:
        name: contrast | mutual | regions.
        encoder: of the features; `INSID3` removes the positional part that it finds in a black image.
        own: whether it is the decoder's backbone, whose features are computed anyway.
    """

    channels = 1

    def __init__(self, name: str, encoder: ImageEncoder, own: bool):
        self.name, self.encoder, self.own = name, encoder, own
        self.query_needs = self.support_needs = frozenset({"cells"}) if own else frozenset()
        self.insid3: INSID3 | None = None  # of the side of the first episode

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        if self.own:
            query, support = features.query.cells, features.support.cells
        else:
            query, support = (self.cells(*some, features) for some in (
                (episode.query, episode.query_key), (episode.support.flatten(0, 1), sum(episode.support_key, []))))  # fmt: skip
        support = full(support).unflatten(0, (-1, features.shot))
        maps = [self.map(*each) for each in zip(full(query), support, episode.support_mask, strict=True)]
        return resize(torch.stack(maps)[:, None], features.size, corners=False)

    def cells(self, images: Tensor, keys: Sequence[str], features: Features) -> Tensor:
        def compute(rows: Sequence[int] | slice) -> dict[str, Tensor]:
            return {"cells": self.encoder.cells(images[rows])}

        return features.memo.rows(f"cells {self.encoder.hub}", keys, images.device, compute)["cells"]

    def map(self, query: Tensor, supports: Tensor, masks: Tensor) -> Tensor:
        """C h w, K C h w and K S S {0, 1, 255} -> h w in 0..1. Where no support has an object (a crop of training): 0."""
        if not (masks == 1).any():
            return query.new_zeros(query.shape[1:])
        if self.name == "contrast":
            return (SHARPNESS * contrast(query, supports, [*masks])).sigmoid()
        query, *supports = (coarser(x) for x in (query, *supports))
        supports = torch.stack(supports)
        patch = getattr(self.encoder, "patch", None)
        side = query.shape[1] * patch[0] if patch else masks.shape[-1]  # a black image that gives as many cells
        if self.insid3 is None or self.insid3.side != side:
            self.insid3 = INSID3(self.encoder, side, None)
        found = self.insid3.find(query, supports, masks == 1)
        if self.name == "regions":
            return found.regions.map.clamp(0, 1)
        return found.candidates.similarity.clamp(0, 1) * found.candidates.backward


class TextMapPrior:
    """The class's probability among competing words: an open-vocabulary map (`model.clip.dense`) of the query.

    The words that compete are known without the annotation: 26 words of backgrounds, and what the vocabulary names. Of them the
    class's own name and what `SAME` lists are left out.

    Args:
        name: of `model.clip.dense.VARIANTS`.
        encoder: patch encoder of ProxyCLIP.
        names: texts of all classes for CLIP; they may be replaced later (`use`).
        vocabulary: CLIP.vocabulary: target (backgrounds alone compete), base+target or all.
        base: 1-based base classes of the fold.
        cache: folder for text banks.
    Raises:
        UserError: a vocabulary that reads the annotation, or no patch encoder where one is needed.
    """

    channels = 1
    query_needs = support_needs = frozenset()

    def __init__(self, name: str, clip: Clip, encoder: ImageEncoder | None, names: Sequence[str], vocabulary: str,
                 base: Sequence[int], cache: Path | None = None):  # fmt: skip
        if vocabulary == "present":
            raise UserError(f"Method.priors: {name} does not read the query's annotation: choose CLIP.vocabulary=target, "
                            "base+target or all")
        variant = D.VARIANTS[name]
        if variant.attention == "proxy" and encoder is None:
            raise UserError(f"Method.priors: {name} needs a patch encoder beside the CLIP: "
                            "Method.patches=timm:vit_base_patch8_224.dino (published), with Method.patches_weight")
        self.name, self.clip, self.vocabulary, self.cache = name, clip, vocabulary, cache
        self.maps = D.DenseClip(clip.visual, variant, encoder.cells if variant.attention == "proxy" else None)
        self.rows: dict[str, Tensor] = {}  # of words
        self.use(names, base)
        if names:
            _ = self.bank  # a word that this CLIP does not know is said before any work

    def use(self, names: Sequence[str], base: Sequence[int] = ()) -> None:
        """Use other classes from now on; base: those of them that the training labels."""
        self.names = tuple(names)
        self.words = (*self.names, *D.known_words(self.clip.text, D.BACKGROUND))
        self.base = range(len(self.names)) if self.vocabulary == "all" else [c - 1 for c in base]

    @property
    def bank(self) -> Tensor:
        """A row for every word, words D; each is made once."""
        new = [word for word in dict.fromkeys(self.words) if word not in self.rows]
        if new:
            made = D.prompt_bank(self.clip.text, new, D.prompts_of(self.clip.text), self.cache)
            self.rows |= dict(zip(new, made, strict=True))
        return torch.stack([self.rows[word] for word in self.words]).to(self.clip.visual.visual.proj.device)

    def competing(self, cls: int) -> list[int]:
        """Return the words that compete with class `cls` (0-based), itself first.

        Raises:
            UserError: the class has no name, or nothing competes with it.
        """
        if cls >= len(self.names):
            raise UserError(f"Method.priors: {self.name} has no text of class {cls + 1}: there are {len(self.names)} "
                            "(Data.class_names)")
        own = self.names[cls].casefold()
        classes = [c for c in self.base if self.vocabulary != "target" and c != cls]
        others = [i for i in range(len(self.names), len(self.words)) if self.words[i] not in (own, *SAME.get(own, ()))]
        if not classes + others:
            raise UserError(f"Method.priors: nothing competes with {own!r} under CLIP.vocabulary={self.vocabulary}, as this CLIP "
                            "knows no background word: choose base+target or all")
        return [cls, *classes, *others]

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        competing, bank = [self.competing(cls - 1) for cls in episode.cls.tolist()], self.bank

        def compute(rows: Sequence[int] | slice) -> dict[str, Tensor]:
            return {"cosines": self.cosines(episode.query[rows])}

        part = f"{self.name} {content_key(bank.cpu().numpy())}"
        found = features.memo.rows(part, episode.query_key, episode.query.device, compute)["cosines"]
        maps = [(SCALE * cosines[words]).softmax(0)[0] for cosines, words in zip(found, competing, strict=True)]
        return resize(torch.stack(maps)[:, None], features.size, corners=False)

    def cosines(self, images: Tensor) -> Tensor:
        """B 3 S S RGB 0..255 -> B words h w, fp32; the whole image at once, `SIDE` patches at most."""
        trunk = self.clip.visual
        unit = max(trunk.patch, self.maps.variant.multiple)
        side = max(min(round(images.shape[-1] / unit), SIDE * trunk.patch // unit), 1) * unit
        small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return self.maps.grid_logits(D.normalise(small, trunk.pixels["clip"]), self.bank).float()


class JoinedPrior:
    """Several priors as one map: their mean."""

    channels = 1

    def __init__(self, parts: Sequence[Prior]):
        self.parts = list(parts)
        self.name = "+".join(part.name for part in parts)
        self.query_needs = frozenset().union(*(part.query_needs for part in parts))
        self.support_needs = frozenset().union(*(part.support_needs for part in parts))

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        maps = [join([part(episode, features)]).mean(1, keepdim=True) for part in self.parts]
        return torch.stack(maps).mean(0)


def parts_of(priors: Sequence[Prior]) -> list[Prior]:
    """Return the priors with those inside joined ones in their place."""
    return [part for prior in priors for part in getattr(prior, "parts", [prior])]
