"""Plain semantic segmentation over a fold's base classes: what the base learner is trained on ("PI-CLIP Sec. 2").

Every image of the list is used, not the filtered index: novel objects are painted background.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from util.data.episodes import Batch, Transform, base_table, generator, shuffled
from util.data.folds import Fold
from util.data.index import Record
from util.data.transforms import read_pair, to_tensor
from util.errors import UserError


@dataclass
class SemanticBatch(Batch):
    """B images of side S; labels hold 0 background, 1..N base classes, 255 ignore. Joined by `episodes.collate`."""

    image: Tensor  # B 3 S S float32 RGB 0..255
    label: Tensor  # B S S uint8
    original_label: list[Tensor]  # B of H W uint8: the label at file size; evaluation only, else []
    name: list[str]  # B image paths relative to the data root


class SemanticDataset(Dataset):
    """Item i, for any i >= 0, as a `SemanticBatch` of B = 1; in training every pass has its own order."""

    def __init__(
        self,
        records: Sequence[Record],
        fold: Fold,
        data_root: str | Path,
        transform: Transform,
        seed: int,
        evaluation: bool,
    ) -> None:
        if not records:
            raise UserError("no images to read: the list is empty")
        self.records, self.root, self.transform = records, Path(data_root), transform
        self.seed, self.evaluation = seed, evaluation
        self._table = base_table(fold)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> SemanticBatch:
        n = len(self)
        record = self.records[i % n if self.evaluation else shuffled(n, self.seed, i)]
        image, label = read_pair(self.root / record.image, self.root / record.label)
        original = self._table[label]
        image, _, (label,) = self.transform(generator(self.seed, i, "semantic"), image, [original])
        return SemanticBatch(
            image=to_tensor(image)[None],
            label=to_tensor(label)[None],
            original_label=[to_tensor(original)] if self.evaluation else [],
            name=[record.image],
        )
