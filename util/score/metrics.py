"""Scores from whole-number counts, so that any split of the episodes over GPUs and batches gives the same bits.

A meter keeps one int64 tensor (`state`), to be summed over ranks; every ratio is taken once, at the end, in `result()`.
Definitions: spec "PI-CLIP" section 1, Evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from util.errors import UserError

IGNORE = 255


def to_original(logits: Tensor, hw: tuple[int, int], squash: bool) -> Tensor:
    """Brings the network-size logits of one image (or of several of one size) to the size of its file.

    logits: C S S or B C S S, any float type; returns float32 C H W or B C H W, (H, W) = hw.
    squash=True: the image was resized to S x S ignoring its aspect ratio, and so is the way back.
    squash=False: it was letterboxed, so the square goes back to the longer side and the padding, right or below, is cut
    (PFENet pads the truth to that square with 255 instead: the same counts). Bilinear, align_corners=True.
    Raises UserError for NaN or infinite logits: their argmax is background, so they would pass for a poor result.
    """
    if not torch.isfinite(logits).all():
        raise UserError("the prediction is not finite: are the weights those of a training that diverged, or damaged? "
                        "Use another checkpoint (Test_Finetune.weight), or Runtime.precision=fp32")
    height, width = hw
    size = (height, width) if squash else (max(hw), max(hw))
    batch = logits.float() if logits.dim() == 4 else logits.float()[None]
    full = F.interpolate(batch, size=size, mode="bilinear", align_corners=True)[..., :height, :width]
    return full if logits.dim() == 4 else full[0]


def vote(masks: Tensor) -> Tensor:
    """K H W {0, 1} -> H W int64: foreground where at least half as many shots say so as where most of them do (HSNet).

    The share is of the largest number of votes in the image, not of K: if no pixel has more than two, one is enough.
    """
    votes = masks.long().sum(0)
    return (2 * votes >= votes.max().clamp(min=1)).long()


def decide(final: Tensor, votes: Tensor | None, hw: tuple[int, int], squash: bool) -> Tensor:
    """H W int64 at file size: the class of the best score (C S S), or where shots vote (K 2 h w) their vote."""
    if votes is None:
        return to_original(final, hw, squash).argmax(0)
    return vote(to_original(votes, hw, squash).argmax(1))


def confusion(pred: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Pixels counted by (truth, prediction): num_classes x num_classes int64, on the device of `pred`.

    pred: integers 0..num_classes-1; target: the same shape and range, or 255 where the pixel does not count.
    Raises ValueError for other values or shapes: a wrong value would otherwise be counted in a wrong cell.
    """
    if pred.shape != target.shape:
        raise ValueError(f"prediction {tuple(pred.shape)} and truth {tuple(target.shape)} differ in size")
    target = target.to(pred.device)
    valid = target != IGNORE
    pred, target = pred[valid].long(), target[valid].long()
    for name, values in (("prediction", pred), ("truth", target)):
        if ((values < 0) | (values >= num_classes)).any():
            raise ValueError(f"the {name} holds {values.unique().tolist()}; expected 0..{num_classes - 1}")
    return torch.bincount(target * num_classes + pred, minlength=num_classes**2).view(num_classes, num_classes)


def _intersection_union(confusion: Tensor) -> Tensor:
    """C x C counts -> C x 2 (intersection, union)."""
    hit = confusion.diagonal()
    return torch.stack([hit, confusion.sum(0) + confusion.sum(1) - hit], dim=1)


class Counts(NamedTuple):
    """Pixels of one episode."""

    intersection: int
    union: int
    background_intersection: int
    background_union: int

    @property
    def iou(self) -> float:
        """Of the foreground, 0..1 (1 where neither mask has a pixel)."""
        return self.intersection / self.union if self.union else 1.0


class FewShotMeter:
    """Counts of binary (target class or not) predictions, kept by class.

    state     int64, flat: everything the meter knows. All-reduce (sum) this one tensor; the two below are views of it.
    counts    C 2 2: class (in the order of `classes`), background or foreground, intersection or union, in pixels.
    episodes  C: episodes seen of each class.
    """

    def __init__(self, classes: Sequence[int], device: torch.device | str = "cpu"):
        self.classes = tuple(classes)
        n = len(self.classes)
        self.state = torch.zeros(5 * n, dtype=torch.int64, device=device)
        self.counts = self.state[: 4 * n].view(n, 2, 2)
        self.episodes = self.state[4 * n :]

    def update(self, pred: Tensor, target: Tensor, cls: int) -> Counts:
        """Adds one episode and returns its counts.

        pred: H W {0, 1}; target: H W {0, 1, 255}; cls: one of `classes`, else ValueError.
        """
        if cls not in self.classes:
            raise ValueError(f"class {cls} is not one of the counted classes {list(self.classes)}")
        row = self.classes.index(cls)
        counts = _intersection_union(confusion(pred, target, 2))
        self.counts[row] += counts.to(self.counts.device)
        self.episodes[row] += 1
        background, foreground = counts.tolist()
        return Counts(*foreground, *background)

    def merge(self, other: FewShotMeter) -> None:
        """Adds what another meter of the same classes has seen."""
        if self.classes != other.classes:
            raise ValueError(f"meters of different classes: {self.classes} and {other.classes}")
        self.state += other.state.to(self.state.device)

    def result(self) -> dict:
        """Scores as fractions 0..1.

        miou                mean over classes of the summed foreground intersection / union
        fg_iou, fb_iou      foreground IoU (pIoU) / mean of foreground and background IoU, over all episodes pooled
        per_class           {class: IoU};  episodes, episodes_per_class: how many
        Raises UserError naming the classes without an episode (or a foreground pixel): they have no score, not zero.
        """
        counts, episodes = self.counts.tolist(), self.episodes.tolist()
        empty = [c for c, (_, (_, union)), n in zip(self.classes, counts, episodes, strict=True) if not n or not union]
        if empty:
            raise UserError(f"no episode with a foreground pixel was evaluated for class {', '.join(map(str, empty))}: "
                            "its IoU is undefined. Evaluate more episodes, or check that the list has images of it.")
        per_class = {c: fg[0] / fg[1] for c, (_, fg) in zip(self.classes, counts, strict=True)}
        background, foreground = (i / u if u else 1.0 for i, u in self.counts.sum(0).tolist())
        return {
            "miou": sum(per_class.values()) / len(per_class),
            "fb_iou": (background + foreground) / 2,
            "fg_iou": foreground,
            "per_class": per_class,
            "episodes": sum(episodes),
            "episodes_per_class": dict(zip(self.classes, episodes, strict=True)),
        }


class SemanticMeter:
    """Counts of ordinary segmentation (base learner, zero-shot). `state`: C C int64, (truth, prediction)."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.state = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, pred: Tensor, target: Tensor) -> None:
        """pred: integers 0..num_classes-1, any shape; target: same shape, 255 does not count. 0 is background."""
        self.state += confusion(pred, target, self.num_classes).to(self.state.device)

    def merge(self, other: SemanticMeter) -> None:
        """Adds what another meter has seen."""
        self.state += other.state.to(self.state.device)

    def result(self) -> dict:
        """Scores as fractions 0..1.

        miou_foreground, miou_with_background   mean IoU over classes 1.. / over classes 0..
        pixel_accuracy                          right pixels / counted pixels
        per_class                               {class, background 0 too: IoU, or None if neither truth nor prediction
                                                has it}; such classes are in `absent` and in no mean
        Raises UserError when no foreground class was seen at all.
        """
        counts = _intersection_union(self.state).tolist()
        per_class = {c: i / u if u else None for c, (i, u) in enumerate(counts)}
        seen = {c: iou for c, iou in per_class.items() if iou is not None}
        foreground = [iou for c, iou in seen.items() if c > 0]
        if not foreground:
            raise UserError("no foreground class was seen in the evaluated images, so there is no mIoU. "
                            "Check the list and the labels.")
        return {
            "miou_foreground": sum(foreground) / len(foreground),
            "miou_with_background": sum(seen.values()) / len(seen),
            "pixel_accuracy": int(self.state.diagonal().sum()) / int(self.state.sum()),
            "per_class": per_class,
            "absent": [c for c in per_class if c not in seen],
        }
