"""mIoU, FB-IoU, hIoU and the vote of shots, from whole-number counts: any split over GPUs and batches gives the same bits.

A meter keeps one int64 tensor (`state`), to be summed over ranks. Ratios are computed once, at the end, in `result()`.
Definitions: spec "PI-CLIP" section 1, Evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from util.data.folds import shown
from util.data.transforms import IGNORE
from util.errors import UserError


def vote(masks: Tensor) -> Tensor:
    """Let K shots vote, K H W {0, 1} -> H W int64: foreground where votes / most votes of a pixel in the image >= 1/2 (HSNet).

    The denominator is the largest number of votes in the image, not K: if no pixel has more than two votes, one is enough.
    """
    votes = masks.long().sum(0)
    return (2 * votes >= votes.max().clamp(min=1)).long()


def confusion(pred: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count pixels by (truth, prediction): num_classes x num_classes int64, on the device of `pred`.

    pred: integers 0..num_classes-1; target: the same shape and range, or 255 where the pixel does not count.
    Raises ValueError for other values or shapes: a wrong value would be counted in a wrong cell.
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


def intersection_union(confusion: Tensor) -> Tensor:
    """Reduce C x C counts to C x 2 (intersection, union)."""
    hit = confusion.diagonal()
    return torch.stack([hit, confusion.sum(0) + confusion.sum(1) - hit], dim=1)


def worst_pairs(confusion: Tensor, classes: Sequence[int], number: int = 12) -> list[tuple[int, int, int, float]]:
    """Return the largest cells beside the diagonal of C x C counts, by their share of the truth's pixels: (class in the truth,
    predicted class, pixels, share). classes: of the channels."""
    counts = confusion.cpu().double()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    share.fill_diagonal_(0)
    order = share.flatten().argsort(descending=True, stable=True)[:number].tolist()
    cells = [(i // len(classes), i % len(classes)) for i in order]
    return [(classes[a], classes[b], int(counts[a, b]), float(share[a, b])) for a, b in cells if share[a, b] > 0]


class Counts(NamedTuple):
    """Pixels of one episode."""

    intersection: int
    union: int
    background_intersection: int
    background_union: int

    @property
    def iou(self) -> float:
        """IoU of the foreground, 0..1 (1 where neither mask has a pixel)."""
        return self.intersection / self.union if self.union else 1.0


class FewShotMeter:
    """Counts of binary (target class or not) predictions, kept by class.

    names     of all classes, for messages.
    absent    how many further classes count 0 in the mean, having no episode (`util.score.rules.Rule.absent`).
    state     int64, flat: all counts. All-reduce (sum) this one tensor; the two below are views of it.
    counts    C 2 2: class (in the order of `classes`), background or foreground, intersection or union, in pixels.
    episodes  C: episodes seen of each class.
    """

    def __init__(
        self, classes: Sequence[int], device: torch.device | str = "cpu", names: Sequence[str] = (), absent: int = 0
    ) -> None:
        self.classes, self.names, self.absent = tuple(classes), names, absent
        n = len(self.classes)
        self.state = torch.zeros(5 * n, dtype=torch.int64, device=device)
        self.counts = self.state[: 4 * n].view(n, 2, 2)
        self.episodes = self.state[4 * n :]

    def update(self, pred: Tensor, target: Tensor, cls: int) -> Counts:
        """Add one episode and return its counts.

        pred: H W {0, 1}; target: H W {0, 1, 255}; cls: one of `classes`, else ValueError.
        """
        if cls not in self.classes:
            raise ValueError(f"class {cls} is not one of the counted classes {list(self.classes)}")
        background, foreground = intersection_union(confusion(pred, target, 2)).tolist()
        return self.add(Counts(*foreground, *background), cls)

    def add(self, counts: Counts, cls: int) -> Counts:
        """Add the counts of one episode and return them."""
        row = self.classes.index(cls)
        pairs = torch.tensor([counts[2:], counts[:2]], dtype=torch.int64)
        self.counts[row] += pairs.to(self.counts.device)
        self.episodes[row] += 1
        return counts

    def merge(self, other: FewShotMeter) -> None:
        """Add the counts of another meter of the same classes."""
        if self.classes != other.classes:
            raise ValueError(f"meters of different classes: {self.classes} and {other.classes}")
        self.state += other.state.to(self.state.device)

    def result(self) -> dict:
        """Scores as fractions 0..1.

        miou                mean over classes, `absent` ones as 0, of the summed foreground intersection / union
        fg_iou, fb_iou      foreground IoU (pIoU) / mean of foreground and background IoU, over all episodes pooled
        per_class           {class: IoU};  episodes, episodes_per_class: how many
        Raises UserError naming the classes without an episode (or a foreground pixel): they have no score, not zero.
        """
        counts, episodes = self.counts.tolist(), self.episodes.tolist()
        empty = [c for c, (_, (_, union)), n in zip(self.classes, counts, episodes, strict=True) if not n or not union]
        if empty:
            raise UserError(f"no episode with a foreground pixel was evaluated for class {shown(empty, self.names)}: "
                            "its IoU is undefined. Evaluate more episodes, or check that the list has images of it.")
        per_class = {c: fg[0] / fg[1] for c, (_, fg) in zip(self.classes, counts, strict=True)}
        background, foreground = (i / u if u else 1.0 for i, u in self.counts.sum(0).tolist())
        return {
            "miou": sum(per_class.values()) / (len(per_class) + self.absent),
            "fb_iou": (background + foreground) / 2,
            "fg_iou": foreground,
            "per_class": per_class,
            "episodes": sum(episodes),
            "episodes_per_class": dict(zip(self.classes, episodes, strict=True)),
        }


class SemanticMeter:
    """Counts of ordinary segmentation. `state`: C C int64, (truth, prediction); it does not grow with the data.

    classes: class id of each channel; 0 is the background.
    """

    def __init__(self, classes: Sequence[int], device: torch.device | str = "cpu"):
        self.classes = tuple(classes)
        self.state = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64, device=device)

    def update(self, pred: Tensor, target: Tensor) -> Tensor:
        """Add one image and return its counts, C C int64 on the device of `pred`.

        pred: channel numbers 0..C-1, any shape; target: same shape, 255 does not count.
        """
        found = confusion(pred, target, len(self.classes))
        self.state += found.to(self.state.device)
        return found

    def merge(self, other: SemanticMeter) -> None:
        """Add the counts of another meter."""
        self.state += other.state.to(self.state.device)

    def result(self, seen: Sequence[int] = (), unseen: Sequence[int] = ()) -> dict:
        """Scores as fractions 0..1.

        miou, background_miou   mean IoU over the classes without / with background; classes that are neither seen nor unseen,
                                where any are given, compete for pixels but are in no mean
        seen_miou, unseen_miou, hiou   means over these classes and their harmonic mean, where both are given and found
        pixel_accuracy          right pixels / counted pixels
        per_class               {class, background 0 too: IoU, or None if neither truth nor prediction has it}; such classes
                                are in no mean
        Raises UserError when no class but background was seen at all.
        """
        counts = intersection_union(self.state).tolist()
        per_class = {c: i / u if u else None for c, (i, u) in zip(self.classes, counts, strict=True)}

        def mean(classes: Iterable[int]) -> float | None:
            found = [per_class[c] for c in classes if per_class.get(c) is not None]
            return sum(found) / len(found) if found else None

        counted = {*seen, *unseen} or {*self.classes}
        scores = {"miou": mean(c for c in self.classes if c and c in counted)}
        if scores["miou"] is None:
            raise UserError("no class but background was seen in the evaluated images, so there is no mIoU. "
                            "Check the list and the labels.")
        if 0 in self.classes:
            scores["background_miou"] = mean(self.classes)
        groups = mean(seen), mean(unseen)
        if None not in groups:
            scores |= {"seen_miou": groups[0], "unseen_miou": groups[1],
                       "hiou": 2 * groups[0] * groups[1] / max(sum(groups), 1e-12)}  # fmt: skip
        accuracy = int(self.state.diagonal().sum()) / int(self.state.sum())
        return scores | {"pixel_accuracy": accuracy, "per_class": per_class}
