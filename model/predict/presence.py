"""Presence: does a picture show what the supports show at all? A score 0..1 from the encoder alone; nothing is trained for it.

The mean feature of the supports' objects is compared with every cell of the query, by cosine; the mean of the best twentieth of
these is the score. The feature of a cell is that of the contrast map, `ImageEncoder.cells`: stages 3 and 4, or a patch token.
`python -m bench.presence` compares it with the probabilities of the network, which say little: a network that is trained on
queries with the object finds something in every picture.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.few_shot.system import FewShot
from util.data.episodes import Episode
from util.errors import UserError
from util.run.distributed import Context

TOP = 1 / 20  # of the cells
# Hash of the frozen part that has the encoder -> the threshold that `python -m bench.presence` chose; here of demo/photos.
THRESHOLDS = {"36b71fd92f3c874a": 0.24}


@torch.no_grad()
def presence(system: FewShot, episode: Episode, precision: str) -> float:
    """Return the presence of one episode's query, with any number of supports that have masks: 0..1."""
    with Context(episode.query.device, precision=precision).autocast():
        examples = zip(episode.support[0], episode.support_mask[0], episode.support_key[0], strict=True)
        shots = [object_feature(cells(system, image[None], key), mask) for image, mask, key in examples]
        wanted = F.normalize(torch.stack(shots).mean(0), dim=0)
        likeness = torch.einsum("chw,c->hw", cells(system, episode.query, episode.query_key[0]), wanted).flatten()
    return best_cells(likeness)


def cells(system: FewShot, image: Tensor, key: str) -> Tensor:
    """Features C h w float32 of an image 1 3 S S, kept by its key as all that depends on one image alone."""
    def compute(_: object) -> dict[str, Tensor]:
        return {"cells": system.encoder.cells(image).float()}

    return system.memo.rows("presence", [key], image.device, compute)["cells"][0]


def object_feature(features: Tensor, mask: Tensor) -> Tensor:
    """Mean feature C, of unit length, of the object: features C h w, mask H W {0, 1, 255}; cells count by their share of it."""
    share = F.adaptive_avg_pool2d((mask == 1).to(features.dtype)[None], features.shape[1:])
    return F.normalize((features * share).sum((1, 2)), dim=0)


def best_cells(likeness: Tensor) -> float:
    """Mean of the best twentieth, at least one, in 0..1."""
    return float(likeness.topk(max(1, int(TOP * len(likeness)))).values.mean().clamp(0, 1))


def threshold(system: FewShot) -> float:
    """Return the measured threshold of a system's encoder: below it a picture does not show the object.

    Raises:
        UserError: none was measured.
    """
    for digest in system.frozen_hashes().values():
        if digest in THRESHOLDS:
            return THRESHOLDS[digest]
    raise UserError("--absent-below: no threshold was measured for this network; give a number between 0 and 1 (presence in "
                    "scores.json shows what pictures with and without the object have)")
