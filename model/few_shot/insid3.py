"""INSID3 (CVPR 2026, arXiv 2603.28480): in-context segmentation with one frozen DINOv3 and nothing trained.

Cells of the target that look like the supports' object are *candidates*; the target's own features fall into *regions* by
average linkage; regions that hold candidates, resemble the prototype and belong to the best region (the seed) make the mask.
Where images are compared, the positional part of the features is removed ("debiased").

Shapes: K supports, C channels, h x w cells, N = h*w, M regions, S x S pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.backbone import ImageEncoder
from model.ops import resize
from util.errors import UserError

SHARE = 500 / 1024  # of the channels, the published positional basis

# ---- positions


def debias_projector(black: Tensor, components: int) -> Tensor:
    """Return the projector onto positional features, from a black image: P = B B^T of the first left singular vectors, C C.

    Args:
        black: C h w, unit features of a black image.
        components: how many singular vectors; fewer than min(C, N - 1), beyond which all or arbitrary directions are taken.
    Raises:
        UserError: too many or too few components.
    """
    C, N = black.shape[0], black[0].numel()
    if not 0 < components < min(C, N - 1):
        raise UserError(f"INSID3: {components} components of {C} channels on {N} cells: choose 1 to {min(C, N - 1) - 1}, with "
                        "more nothing but noise is left")  # fmt: skip
    centred = black.flatten(1).double()
    centred = centred - centred.mean(1, keepdim=True)
    vectors = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -components:]
    return (vectors @ vectors.T).to(black.dtype)


def debias(unit: Tensor, projector: Tensor) -> Tensor:
    """B C h w unit features without their positional part, unit length again."""
    x = unit.flatten(2)
    return F.normalize(x - projector @ x, dim=1).view_as(unit)


# ---- supports


def grid_mask(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Binary mask S S -> h w bool, at least one cell: centres of cells, else their first pixels, else the mean place.

    Raises:
        UserError: an empty mask.
    """
    if not mask.any():
        raise UserError("INSID3: a support without a foreground pixel")
    pixels = mask.float()[None, None]
    for cells in (resize(pixels, grid, corners=False) > 0.5, F.interpolate(pixels, grid, mode="nearest") > 0):
        if cells.any():
            return cells[0, 0]
    size = mask.shape[1] // grid[1]
    row, column = (mask.nonzero().double().mean(0) / size).long().tolist()
    cells = torch.zeros(grid, dtype=torch.bool, device=mask.device)
    cells[min(row, grid[0] - 1), min(column, grid[1] - 1)] = True
    return cells


def shot_prototypes(supports: Tensor, masks: Tensor) -> Tensor:
    """Mean debiased feature of each support's foreground, K C, not normalised: tight objects weigh more.

    Args:
        supports: K C h w, debiased; masks: K h w bool.
    """
    weights = masks.flatten(1).to(supports.dtype)
    return (supports.flatten(2) @ weights[..., None])[..., 0] / weights.sum(1, keepdim=True)


# ---- candidates


@dataclass(frozen=True)
class Candidates:
    """Which cells of the target look like the object."""

    similarity: Tensor  # h w, to the prototype
    nearest: Tensor  # K h w int64, flat index of the most similar cell of each support
    votes: Tensor  # h w int64, supports whose nearest cell is foreground
    forward: Tensor  # h w bool, similar to the prototype
    backward: Tensor  # h w bool, enough votes

    @property
    def cells(self) -> Tensor:
        return self.forward & self.backward


def find_candidates(target: Tensor, supports: Tensor, masks: Tensor, prototype: Tensor) -> Candidates:
    """Cells with a positive similarity to the prototype whose nearest cell is foreground in at least half of the supports.

    Where no similarity is positive, those above the 0.9 quantile are taken.

    Args:
        target: C h w; supports: K C h w, both debiased; masks: K h w bool; prototype: C.
    """
    similarity = torch.einsum("chw,c->hw", target, prototype)
    forward = similarity > 0
    if not forward.any():
        forward = similarity > torch.quantile(similarity.flatten(), 0.9)
    cells = target.flatten(1).T
    nearest = torch.stack([(cells @ support.flatten(1)).argmax(1) for support in supports])
    votes = masks.flatten(1).gather(1, nearest).sum(0).view_as(similarity)
    return Candidates(similarity, nearest.view(-1, *similarity.shape), votes, forward, votes >= math.ceil(len(supports) / 2))


# ---- regions


def average_linkage(similarity: Tensor, cut: float = math.inf) -> tuple[Tensor, Tensor]:
    """Average-linkage clustering of the distances 1 - similarity, up to a height.

    Reciprocal nearest neighbours are merged, all pairs of a round at once. Average linkage is reducible: the result is that of
    merging the closest pair again and again. Sums of similarities between clusters are kept, so that a merge adds two rows.

    Args:
        similarity: N N, its upper triangle counts; cut: merges below this height are made.
    Returns:
        (N int64, cluster of each row, numbered by first occurrence; heights of the merges, float64).
    """
    total = similarity.double().triu(1)
    total = total + total.T
    size = total.new_ones(len(total))
    label, heights = torch.arange(len(total), device=total.device), []
    while len(size) > 1:
        place = torch.arange(len(size), device=total.device)
        distance = (1 - total / (size[:, None] * size)).fill_diagonal_(math.inf)
        height, nearest = distance.min(1).values, distance.argmin(1)
        first = (nearest[nearest] == place) & (place < nearest) & (height < cut)
        if not first.any():
            break
        heights.append(height[first])
        parent = place.clone()
        parent[nearest[first]] = place[first]
        kept = parent == place
        number = (kept.cumsum(0) - 1)[parent]
        count = int(kept.sum())
        total = total.new_zeros(count, len(place)).index_add_(0, number, total)
        total = total.new_zeros(count, count).index_add_(1, number, total)
        size = size.new_zeros(count).index_add_(0, number, size)
        label = number[label]
    return label, torch.cat(heights) if heights else total.new_zeros(0)


def find_regions(unit: Tensor, tau: float) -> Tensor:
    """Regions of features C h w of unit length, not debiased: h w int64. Cells more than tau alike on average belong together."""
    cells = unit.flatten(1)
    label, _ = average_linkage((cells.T @ cells).clamp(-1, 1), 1 - tau)
    return label.view(unit.shape[1:])


@dataclass(frozen=True)
class Regions:
    """Regions of the target and their scores; float arrays have one value per region."""

    label: Tensor  # h w int64
    area: Tensor  # cells
    matched: Tensor  # candidate cells
    prototype: Tensor  # cosine of the mean feature to the prototype: decides the seed
    cross: Tensor  # mean similarity to the prototype
    intra: Tensor  # affinity to the seed
    weight: Tensor  # share of candidates, 1 for the seed
    seed: int  # -1: no candidate
    alpha: float

    @property
    def score(self) -> Tensor:
        return self.cross * self.intra * self.weight

    @property
    def map(self) -> Tensor:
        """Score of each cell's region, h w."""
        return self.score[self.label]

    @property
    def mask(self) -> Tensor:
        """Cells of the regions that score above alpha, h w bool."""
        return self.map > self.alpha


def judge_regions(label: Tensor, debiased: Tensor, unit: Tensor, candidates: Tensor, prototype: Tensor, alpha: float) -> Regions:
    """Scores regions: mean similarity to the prototype x affinity to the seed x share of candidates.

    Args:
        label: h w int64; debiased, unit: C h w of the target; candidates: h w bool; prototype: C.
        alpha: regions above it form the mask; the seed must exceed it too.
    """
    flat = label.flatten()
    M = int(flat.max()) + 1

    def sums(cells: Tensor) -> Tensor:
        """N or N C -> M or M C."""
        return cells.new_zeros(M, *cells.shape[1:]).index_add_(0, flat, cells)

    area = torch.bincount(flat, minlength=M)
    matched = sums(candidates.flatten().long())
    cells, share = debiased.flatten(1).T, matched.to(unit.dtype) / area
    to_prototype = F.normalize(sums(cells), dim=1) @ prototype
    cross = sums(cells @ prototype) / area
    if not candidates.any():
        nothing = torch.zeros_like(share)
        return Regions(label, area, matched, to_prototype, cross, nothing, nothing, -1, alpha)
    seed = int(to_prototype.masked_fill(matched == 0, -math.inf).argmax())
    own = F.normalize(sums(unit.flatten(1).T), dim=1)
    weight = share.index_fill(0, torch.tensor(seed, device=share.device), 1.0)
    return Regions(label, area, matched, to_prototype, cross, own @ own[seed], weight, seed, alpha)


# ---- finish


def enlarge(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Binary mask h w -> H W bool: bilinear, above one half."""
    return resize(mask.float()[None, None], size, corners=False)[0, 0] > 0.5


@dataclass(frozen=True)
class Band:
    """The strip along a mask's edge that a CRF may change: within a disc of this radius, in pixels."""

    core: Tensor  # H W bool: surely object; the image's border counts as background
    around: Tensor  # H W bool: object or strip

    @classmethod
    def of(cls, mask: Tensor, radius: int = 5) -> "Band":
        y, x = torch.meshgrid(*[torch.arange(-radius, radius + 1, device=mask.device)] * 2, indexing="ij")
        disc = (y**2 + x**2 <= radius**2).float()
        inside = F.conv2d(mask.float()[None, None], disc[None, None], padding=radius)[0, 0].round()
        return cls(inside == disc.sum(), inside > 0)

    @property
    def unary(self) -> Tensor:
        """Foreground logit for the CRF, H W: of 0.95 in the core, 0.05 outside, 0.5 in the strip; minus it for background."""
        p = torch.where(self.core, 0.95, torch.where(self.around, 0.5, 0.05))
        return p.logit()

    def merge(self, logits: Tensor) -> Tensor:
        """Result of a CRF, 2 H W (background, foreground), in the strip; the core stays object, outside stays background."""
        return self.core | (self.around & (logits[1] > logits[0]))


Crf = Callable[[Tensor, Tensor], Tensor]  # image 3 S S RGB 0..255, unary S S -> 2 S S


@dataclass(frozen=True)
class Found:
    """Result for one target."""

    mask: Tensor  # S S bool
    prototypes: Tensor  # K C, one per support
    prototype: Tensor  # C
    candidates: Candidates
    regions: Regions


class INSID3:
    """Training-free segmentation of a target by supports.

    Args:
        encoder: frozen (published: DINOv3 ViT-L/16).
        side: S of the square images; a multiple of the patch where the encoder has one.
        components: singular vectors of the positional basis (published: 500 of 1024 channels at side 1024); 0 removes nothing.
            None: the same share of a vision transformer's channels; nothing of a CNN, which has no table of positions.
        tau: cells more alike than this on average form a region; alpha: regions that score higher make the mask.
        factors: of the rotary positions in each block for the positional basis alone, as the published code draws them in
            training mode; None: the network as it is.
        crf: refines the edge of the mask.
    Raises:
        UserError: a side or number of components that does not fit the encoder.
    """

    def __init__(self, encoder: ImageEncoder, side: int = 1024, components: int | None = 500, tau: float = 0.6,
                 alpha: float = 0.2, factors: Sequence[float] | None = None, crf: Crf | None = None):  # fmt: skip
        patch = getattr(encoder, "patch", None)
        if patch and (side < patch[0] or side % patch[0] or side % patch[1]):
            shape = " x ".join(map(str, patch))
            raise UserError(f"INSID3: a side of {side} pixels is no multiple of the patch ({shape})")
        if components is None:
            components = min(round(encoder.channels * SHARE), (side // patch[0]) * (side // patch[1]) - 2) if patch else 0
            components = max(components, 0)
        self.encoder, self.side, self.components = encoder, side, components
        self.tau, self.alpha, self.factors, self.crf = tau, alpha, factors, crf
        self._projector: Tensor | None = None

    @torch.no_grad()
    def features(self, images: Tensor, factors: Sequence[float] | None = None) -> Tensor:
        """B 3 S S RGB 0..255 -> B C h w, unit length."""
        return self.encoder.cells(images) if factors is None else F.normalize(self.encoder(images, factors), dim=1)

    @property
    def projector(self) -> Tensor | None:
        """P C C of this encoder and side, computed once; None where nothing is removed."""
        if self._projector is None and self.components:
            black = next(self.encoder.parameters()).new_zeros(1, 3, self.side, self.side)
            self._projector = debias_projector(self.features(black, self.factors)[0], self.components)
        return self._projector

    def find(self, target: Tensor, supports: Tensor, masks: Tensor) -> Found:
        """Segments features.

        Args:
            target: C h w; supports: K C h w, both of unit length, not debiased.
            masks: K S S bool; supports without a foreground pixel are left out.
        Raises:
            UserError: no support has a foreground pixel.
        """
        filled = masks.flatten(1).any(1)
        if not filled.any():
            raise UserError("INSID3: no support has a foreground pixel")
        cells = torch.stack([grid_mask(mask, tuple(target.shape[1:])) for mask in masks[filled]])
        unit = torch.cat([target[None], supports[filled]])
        plain, *shown = unit if self.projector is None else debias(unit, self.projector)
        prototypes = shot_prototypes(torch.stack(shown), cells)
        prototype = F.normalize(prototypes.mean(0), dim=0)
        candidates = find_candidates(plain, torch.stack(shown), cells, prototype)
        label = find_regions(target, self.tau) if candidates.cells.any() else torch.zeros_like(candidates.votes)
        regions = judge_regions(label, plain, target, candidates.cells, prototype, self.alpha)
        return Found(enlarge(regions.mask, (self.side, self.side)), prototypes, prototype, candidates, regions)

    def predict(self, target: Tensor, supports: Tensor, masks: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Segments an image.

        Args:
            target: 3 S S; supports: K 3 S S, RGB 0..255 (published: Pillow's antialiased bilinear); masks: K S S bool.
            size: of the result; None: S x S, as the published evaluation scores it.
        Returns:
            H W bool.
        """
        unit = self.features(torch.cat([target[None], supports]))
        mask = self.find(unit[0], unit[1:], masks).mask
        if self.crf is not None and mask.any():
            band = Band.of(mask)
            mask = band.merge(self.crf(target, band.unary))
        return mask if size is None else enlarge(mask, size)
