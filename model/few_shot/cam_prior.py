"""IMR-HSNet's input instead of masks: CLIP's activation map of the episode's class, in the query and in the supports."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.clip import CamSource
from model.few_shot.prior import Features
from model.ops import resize
from util.data.episodes import Episode, content_key
from util.errors import UserError

TEMPLATE = "a photo of a {}"  # as published, of the bare class names


class CamPrior:
    """Class activation maps, resized to the feature grid.

    Args:
        bank: C D, one row of TEMPLATE for every class, base and novel.
        vocabulary: which classes compete, CLIP.vocabulary; published: `all`.
        base: 1-based base classes of the fold.
        view: CLIP.clip_size, the part of an image that CLIP sees; it is part of the key of cached maps.
    """

    name, channels = "cam", 1
    query_needs = support_needs = frozenset()

    def __init__(self, source: CamSource, bank: Tensor, vocabulary: str, base: Sequence[int], view: str = "whole"):
        if vocabulary not in ("all", "base+target"):
            raise UserError(
                f"CLIP.vocabulary = {vocabulary}: a class activation map needs classes that compete with the target, "
                "known without the annotation: choose all (as published) or base+target"
            )
        if not len(bank):
            raise UserError(
                "IMR-HSNet's class activation maps need the names of all classes, in training as in prediction; "
                "use test.py with the data set's lists"
            )
        self.source, self.bank, self.vocabulary = source, bank, vocabulary
        self.base = torch.tensor(base) - 1
        self.kept_as = f"cam {content_key(bank.cpu().numpy())} {vocabulary} {view}"

    def __call__(self, episode: Episode, features: Features) -> Tensor:
        """B 1 h w of the queries."""
        return self.maps(episode.clip_query, episode.cls, episode.query_key, features)

    def of_supports(self, episode: Episode, features: Features) -> Tensor:
        """B K 1 h w."""
        images = [shot for shots in episode.clip_support for shot in shots]
        found = self.maps(images, episode.cls.repeat_interleave(features.shot), sum(episode.support_key, []), features)
        return found.unflatten(0, (-1, features.shot))

    def maps(self, images: Sequence[Tensor], cls: Tensor, keys: Sequence[str], features: Features) -> Tensor:
        """N 1 h w of images 3 side side and their classes."""
        size, device = features.size, cls.device
        self.bank = self.bank.to(device)

        def compute(rows: Sequence[int] | slice) -> dict[str, Tensor]:
            target = cls[rows] - 1
            stack = torch.stack(images[rows] if isinstance(rows, slice) else [images[i] for i in rows])
            found = self.source(stack, self.bank, self.candidates(target), target)
            return {"map": resize(found[:, None], size)}

        keys = [f"{key} {c}" for key, c in zip(keys, cls.tolist(), strict=True)] if keys else []
        return features.memo.rows(f"{self.kept_as} {tuple(size)}", keys, device, compute)["map"]

    def candidates(self, target: Tensor) -> Tensor:
        """N C bool."""
        classes = torch.full((len(target), len(self.bank)), self.vocabulary == "all", device=target.device)
        classes[:, self.base.to(target.device)] = True
        return classes.scatter(1, target[:, None], True)
