"""Single images with labels, for the base learner and the dense systems: training and test data.

Every image of the list is used, not the filtered index of a fold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from util.data.episodes import Batch, Transform, content_key, generator, look_up, shuffled
from util.data.index import Record
from util.data.transforms import IGNORE, Placed, read_image, read_pair, to_tensor
from util.errors import UserError

Masks = Literal["all", "found", "none"]


@dataclass
class Images(Batch):
    """B images of one size. Images are RGB 0..255: every encoder normalises itself. Joined by `episodes.collate`."""

    image: Tensor  # B 3 h w float32
    label: Tensor  # B h w uint8: channel that each pixel belongs to, 255 ignore
    present: Tensor  # B C bool, image-level labels; column c-1: class c is annotated in the image; stays on the CPU
    valid: Tensor  # B 4 int64: y0 y1 x0 x1 (ends exclusive) of what shows the image; a crop may reach beyond it
    number: Tensor  # B int64, which image it is
    original_label: list[Tensor]  # B of H W uint8: `label` at file size; evaluation only, else []
    placed: list[Placed]  # B: the way back to file size; evaluation only, else []
    name: list[str]  # B image paths relative to the data root
    key: list[str]  # hash of each image's pixels; evaluation only, else []

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Images":
        """Move all tensors but `present`. It decides how much is computed, and reading it from a GPU would wait for the GPU."""
        moved = super().to(device, non_blocking)
        moved.present = self.present
        return moved

    def truth(self, i: int) -> Tensor:
        """Return the truth of image i: H W uint8 at file size."""
        return self.original_label[i]


class SemanticDataset(Dataset):
    """Item i, for any i >= 0, as `Images` of B = 1; in training every pass has its own order.

    target        class -> channel, or 255; classes without an entry are background, 0. `classes`: class of each channel
    values        256 uint8, label value -> class (`util.data.folds.read_label_table`); None: values are classes
    num_classes   C, the width of `Images.present`
    masks         label files that are read: all; found: those that exist; none (image-level labels are all there is). Every
                  pixel of another `label` is 255
    """

    def __init__(
        self,
        records: Sequence[Record],
        target: Mapping[int, int],
        num_classes: int,
        data_root: str | Path,
        transform: Transform,
        seed: int,
        evaluation: bool,
        values: np.ndarray | None = None,
        masks: Masks = "all",
    ) -> None:
        if not records:
            raise UserError("no images to read: the list is empty")
        self.records, self.root, self.transform = records, Path(data_root), transform
        self.num_classes, self.seed, self.evaluation = num_classes, seed, evaluation
        self._table, self.values, self.masks = look_up(target), values, masks
        self.classes = sorted((c for c in target if target[c] != IGNORE), key=target.get)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Images:
        n = len(self)
        number = i % n if self.evaluation else shuffled(n, self.seed, i)
        record = self.records[number]
        image, label = self._read(record)
        present = torch.zeros(self.num_classes, dtype=torch.bool)
        present[[c - 1 for c in record.annotated]] = True
        found = images_of(image, self._table[label], self.transform, present, record.image, generator(self.seed, i, "semantic"))
        found.number[0] = number
        return found if self.evaluation else replace(found, original_label=[], placed=[], key=[])

    def _read(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        file = self.root / record.label
        if self.masks == "all" or (self.masks == "found" and record.label and file.is_file()):
            return read_pair(self.root / record.image, file, self.values)
        image = read_image(self.root / record.image)
        return image, np.full(image.shape[:2], IGNORE, np.uint8)


def images_of(image: np.ndarray, label: np.ndarray, transform: Transform, present: Tensor, name: str,
              rng: np.random.Generator | None = None) -> Images:  # fmt: skip
    """Build a batch of one image, as evaluation needs it.

    Args:
        image: H W 3 float32 RGB 0..255; label: H W uint8, channels or 255; present: C bool; rng: of transforms that draw.
    """
    moved, _, (small, shown) = transform(rng, image, [label, np.zeros_like(label)])
    return Images(
        image=to_tensor(moved)[None], label=to_tensor(small)[None], present=present[None],
        valid=torch.tensor([box_of(shown != IGNORE)]), number=torch.zeros(1, dtype=torch.int64),
        original_label=[to_tensor(label)], placed=[transform.placed(label.shape)], name=[name], key=[content_key(moved)],
    )  # fmt: skip


def box_of(shown: np.ndarray) -> tuple[int, int, int, int]:
    """Return y0 y1 x0 x1 of the smallest box around the true pixels of H W bool, ends exclusive."""
    rows, columns = (np.flatnonzero(shown.any(axis)) for axis in (1, 0))
    return (0, 0, 0, 0) if not len(rows) else (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
