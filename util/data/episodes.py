"""Few-shot episodes: query, class and supports of episode i, and its batch ("PI-CLIP Sec. 1").

Everything random is a hash of (seed, i, role). So an episode is the same with 0 or 16 workers, on 1 or 8 GPUs, at any batch
size, today or next year.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from util.config import Start
from util.data.folds import ClassNames, Fold, shown
from util.data.index import Index, Record
from util.data.transforms import IGNORE, Augmented, Placed, ValTransform, bbox_mask, clip_crop, clip_input, read_pair, to_tensor
from util.errors import UserError


class Transform(Protocol):
    """(generator, image, labels) -> (image, clean image, labels); squash: whether it ignores the aspect ratio."""

    squash: bool

    def __call__(self, rng: np.random.Generator | None, image: np.ndarray, labels: Sequence[np.ndarray]) -> Augmented: ...

    def placed(self, hw: tuple[int, int]) -> Placed: ...


ClipSize = Literal["original", "train", "whole", "crop"]
AnnType = Literal["mask", "bbox"]


def draw(n: int, *key: int | str) -> int:
    """Return a uniform number of 0..n-1, a pure function of the key, stable for ever."""
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % n


def generator(*key: int | str) -> np.random.Generator:
    """Return a random generator, a pure function of the key."""
    return np.random.Generator(np.random.PCG64(draw(2**128, *key)))


@lru_cache(maxsize=4)
def permutation(n: int, *key: int | str) -> np.ndarray:
    """Return a permutation of 0..n-1, int64, a pure function of the key. (NumPy promises raw PCG64 bits for ever.)"""
    return np.argsort(np.random.PCG64(draw(2**128, *key)).random_raw(n), kind="stable")


def shuffled(n: int, seed: int, i: int) -> int:
    """Return element i of an endless list of passes over 0..n-1, each pass in its own order."""
    return int(permutation(n, seed, "pass", i // n)[i % n])


@dataclass(frozen=True)
class EpisodeSpec:
    """Episode `number`; query and supports are positions in `Index.records`."""

    number: int
    query: int
    cls: int  # 1-based
    supports: tuple[int, ...]


class EpisodeList:
    """The endless list of episodes over an index.

    start  "image": each image in turn is a query, its class one of the classes in it; the supports are different images.
           "pair": each (query, class) in turn whose class counts in the image; supports may repeat (HSNet on PASCAL).
           "class": a class, all equally often, then a query of it; supports may repeat (HSNet on COCO).
           "cycle": class after class, then a query of it; supports may repeat (cross-domain sets).
    One pass has as many episodes as there are images ("image", "class"), or pairs.

    Raises UserError for a class that can be drawn but has too few images for `shot` supports besides the query.
    """

    def __init__(self, index: Index, shot: int, seed: int, shuffle: bool = False, start: Start = "image") -> None:
        if not index.records:
            raise UserError("no image of the list counts for this fold: check Train.data_set, Train.split and the list")
        self.classes = sorted(c for c, filed in index.by_class.items() if filed)
        self.pairs = sorted((query, c) for c in self.classes for query in index.by_class[c]) if start in ("pair", "cycle") else []
        self.repeats = start != "image"
        drawable = set(self.classes) if self.repeats else set().union(*index.present)
        needed = 2 if self.repeats else shot + 1
        short = {c: len(index.supports[c]) for c in sorted(drawable) if len(index.supports[c]) < needed}
        if short:
            counts = ", ".join(f"class {shown([c], index.names)} has {n} image{'s' * (n != 1)}" for c, n in short.items())
            raise UserError(
                f"{shot}-shot episodes need at least {needed} images of a class with enough labelled pixels; "
                f"{counts}. Use fewer shots (Train.shot) or a list with more images"
            )
        self.index, self.shot, self.seed, self.shuffle, self.start = index, shot, seed, shuffle, start

    def __len__(self) -> int:
        return len(self.pairs or self.index.records)

    def spec(self, i: int) -> EpisodeSpec:
        """Return episode i >= 0: query i % n (training: in the pass's own order), a uniform class of the query, and `shot`
        different other images of that class; for other values of `start` see the class."""
        if i < 0:
            raise IndexError(f"episodes are numbered from 0, got {i}")
        query, cls = self._target(i)
        filed = self.index.supports[cls]
        own = bisect_left(filed, query)
        taken = [own] if filed[own : own + 1] == [query] else []  # ascending positions in `filed` that may not be drawn
        supports = []
        for k in range(self.shot):
            position = draw(len(filed) - len(taken), self.seed, i, "support", k)
            for other in taken:
                position += position >= other
            if not self.repeats:
                insort(taken, position)
            supports.append(filed[position])
        return EpisodeSpec(i, query, cls, tuple(supports))

    def _target(self, i: int) -> tuple[int, int]:
        """Return query and class of episode i."""
        if self.start in ("class", "cycle"):
            place = i if self.start == "cycle" else draw(len(self.classes), self.seed, i, "class")
            cls = self.classes[place % len(self.classes)]
            filed = self.index.by_class[cls]
            return filed[draw(len(filed), self.seed, i, "query")], cls
        place = shuffled(len(self), self.seed, i) if self.shuffle else i % len(self)
        if self.start == "pair":
            return self.pairs[place]
        present = self.index.present[place]
        return place, present[draw(len(present), self.seed, i, "class")]


def episodes_per_class(episodes: EpisodeList, count: int) -> Counter[int]:
    """Count the episodes 0..count-1 of each class. (Takes util.data.manifest.ManifestEpisodes too.)"""
    return Counter(episodes.spec(i).cls for i in range(count))


def check_novel(episodes: EpisodeList, fold: Fold, names: ClassNames, count: int | None = None) -> None:
    """Raise UserError, naming them, where novel classes have no image or no episode: they would be missing from the mean.

    count: how many episodes are evaluated (None: only the images are checked). Checked at the start, not after hours in the
    meter. Training needs only some of the base classes.
    """

    if empty := [c for c in fold.novel if not episodes.index.by_class.get(c)]:
        empty = shown(empty, names.names)
        raise UserError(f"fold {fold.split} of {fold.data_set}: no image is filed under the novel classes {empty}; "
                        "Data.val_list must have images with at least Data.min_pixels labelled pixels of every one")
    if count is None:
        return
    found = episodes_per_class(episodes, count)
    if empty := [c for c in fold.novel if not found[c]]:
        empty = shown(empty, names.names)
        raise UserError(f"none of the {count:,} episodes of seed {episodes.seed} is of the novel classes {empty}; "
                        "evaluate more episodes (Test_Finetune.test_num, Train.val_episodes)")


class Batch:
    """A dataclass of tensors (first axis B) and lists (length B, of tensors or names)."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Called by the DataLoader."""
        return self._map(Tensor.pin_memory)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; those of a list as name.0, name.1, ..."""
        found = {}
        for name, value in vars(self).items():
            named = enumerate(value) if isinstance(value, list) else [("", value)]
            found |= {f"{name}.{i}".rstrip("."): tensor for i, tensor in named if isinstance(tensor, Tensor)}
        return found

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        def walk(value: Any) -> Any:
            if isinstance(value, list):
                return [walk(item) for item in value]
            return change(value) if isinstance(value, Tensor) else value

        return type(self)(**{f.name: walk(getattr(self, f.name)) for f in fields(self)})


BatchType = TypeVar("BatchType", bound=Batch)


def collate(samples: Sequence[BatchType]) -> BatchType:
    """Join batches: tensors along the first axis, lists end to end."""

    def join(values: list) -> Any:
        return torch.cat(values) if isinstance(values[0], Tensor) else sum(values, [])

    first = samples[0]
    return type(first)(**{f.name: join([getattr(sample, f.name) for sample in samples]) for f in fields(first)})


@dataclass
class Episode(Batch):
    """A batch of B episodes with K shots of side S. Images are RGB 0..255: every encoder normalises itself."""

    query: Tensor  # B 3 S S float32, augmented: the network's input
    query_mask: Tensor  # B S S uint8: 1 target, 0 rest, 255 ignore
    support: Tensor  # B K 3 S S float32
    support_mask: Tensor  # B K S S uint8 {0, 1, 255}
    base_label: Tensor  # B S S uint8: base rank 1..N of the query's label, 0 other, 255 ignore
    cls: Tensor  # B int64, 1-based class of the episode
    base_rank: Tensor  # B int64, its 0-based rank among the base classes, -1 for a novel class
    present: Tensor  # B C bool; column c-1: class c is in the query's annotation
    clip_query: list[Tensor]  # B of 3 H W uint8: the clean query at CLIP's size; [] where no system needs it
    annotation_hw: Tensor  # B 2 int64: height and width to which the text prior is resized
    number: Tensor  # B int64, which episode it is
    original_mask: list[Tensor]  # B of H W uint8: query_mask at file size; evaluation only, else []
    original_base: list[Tensor]  # B of H W uint8: base_label at file size; evaluation only, else []
    query_name: list[str]  # B image paths relative to the data root
    support_names: list[list[str]]  # B lists of K
    query_key: list[str] = field(default_factory=list)  # hash of each query's pixels; evaluation only, else []
    support_key: list[list[str]] = field(default_factory=list)  # B lists of K: hash of pixels and mask; evaluation only
    original_label: list[Tensor] = field(default_factory=list)  # B of H W uint8: the query's label file; evaluation only
    placed: list[Placed] = field(default_factory=list)  # B: the way back to file size; evaluation only

    def truth(self, i: int) -> Tensor:
        """Return the truth of episode i: H W uint8 at file size."""
        return self.original_mask[i]
    clip_support: list[list[Tensor]] = field(default_factory=list)  # B of K of 3 s s uint8, for CLIP; [] where no system needs it


def content_key(*arrays: np.ndarray) -> str:
    """Hash arrays, 32 hex digits: the key of an image in the cache of an evaluation."""
    digest = blake2b(digest_size=16)
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()


def mask_table(cls: int) -> np.ndarray:
    """Return a look-up table, 256 uint8: class id -> 1, ignore -> ignore, the rest 0."""
    return look_up({cls: 1})


def base_table(fold: Fold) -> np.ndarray:
    """Return a look-up table, 256 uint8: base class -> its rank 1..N, ignore -> ignore, the rest 0."""
    return look_up({c: rank for rank, c in enumerate(fold.base, start=1)})


def look_up(values: Mapping[int, int]) -> np.ndarray:
    """Return a look-up table, 256 uint8: old value -> new value, ignore -> ignore, the rest 0."""
    table = np.zeros(256, np.uint8)
    table[list(values)] = list(values.values())
    table[IGNORE] = IGNORE
    return table


@dataclass(frozen=True)
class Shot:
    """An annotated example as the network sees it."""

    image: Tensor  # 3 S S float32
    mask: Tensor  # S S uint8 {0, 1, 255}
    name: str
    key: str  # hash of pixels and mask; evaluation only, else ""
    clip: Tensor | None  # 3 s s uint8 where supports go to CLIP too


class EpisodeMaker:
    """Build an `Episode` of B = 1 from arrays: those of a data set (`EpisodeDataset`) or of a user's photos (`model.predict`).

    clip_size    the size that the clean query is brought to for CLIP: "original" = that of the file (PASCAL, undoes
                 the squash), "train" = S (COCO), rounded up to multiples of `patch`; None = no CLIP input; for query and
                 supports, s = `patch` pixels square: "whole" = all of the image, "crop" = its centre from the file (IMR-HSNet)
    evaluation   keep the masks at file size too, and the keys of what may be kept
    """

    def __init__(self, transform: Transform, fold: Fold, *, clip_size: ClipSize | None, patch: int, evaluation: bool) -> None:
        if clip_size is not None and clip_size not in get_args(ClipSize):
            raise UserError(f"CLIP.clip_size: unknown size {clip_size!r}; choose original or train, or whole or crop")
        if clip_size == "crop" and not (isinstance(transform, ValTransform) and transform.squash):
            raise UserError("CLIP.clip_size=crop cuts a square out of the file and does not follow augmentation or letterboxing: "
                            "use it with Train.augment=false and Train.resized_val=true, or choose whole")
        self.transform, self.clip_size, self.patch, self.evaluation = transform, clip_size, patch, evaluation
        self._base_table = base_table(fold)

    def shot(self, image: np.ndarray, mask: np.ndarray, name: str, rng: np.random.Generator | None = None) -> Shot:
        """image: H W 3 float32 RGB 0..255; mask: H W uint8 {0, 1, 255}."""
        file = image
        image, clean, (mask,) = self.transform(rng, image, [mask])
        clip = self._square(file, clean) if self.clip_size in ("whole", "crop") else None
        return Shot(to_tensor(image), to_tensor(mask), name, content_key(image, mask) if self.evaluation else "", clip)

    def _square(self, file: np.ndarray, clean: np.ndarray) -> Tensor:
        side = self.patch
        return clip_crop(file, side) if self.clip_size == "crop" else clip_input(clean, (side, side), side)

    def episode(
        self, image: np.ndarray, original: np.ndarray, shots: Sequence[Shot], *, cls: int, base_rank: int, present: Tensor,
        name: str, number: int = 0, rng: np.random.Generator | None = None,
    ) -> Episode:  # fmt: skip
        """image: H W 3 float32 RGB 0..255 of the query; original: H W uint8, its label; the rest as in `Episode`."""
        to_mask = mask_table(cls)
        query, clean, (label,) = self.transform(rng, image, [original])
        square = self.clip_size in ("whole", "crop")
        # Undo the squash; a crop or a letterbox kept the shape of things.
        hw = original.shape if self.clip_size == "original" and self.transform.squash else label.shape
        return Episode(
            query=to_tensor(query)[None],
            query_mask=to_tensor(to_mask[label])[None],
            support=torch.stack([shot.image for shot in shots])[None],
            support_mask=torch.stack([shot.mask for shot in shots])[None],
            base_label=to_tensor(self._base_table[label])[None],
            cls=torch.tensor([cls]),
            base_rank=torch.tensor([base_rank]),
            present=present[None],
            clip_query=[self._square(image, clean) if square else clip_input(clean, hw, self.patch)] if self.clip_size else [],
            clip_support=[[shot.clip for shot in shots]] if square else [],
            annotation_hw=torch.tensor([hw]),
            number=torch.tensor([number]),
            original_mask=[to_tensor(to_mask[original])] if self.evaluation else [],
            original_base=[to_tensor(self._base_table[original])] if self.evaluation else [],
            query_name=[name],
            support_names=[[shot.name for shot in shots]],
            query_key=[content_key(query)] if self.evaluation else [],
            support_key=[[shot.key for shot in shots]] if self.evaluation else [],
            original_label=[to_tensor(original)] if self.evaluation else [],
            placed=[self.transform.placed(original.shape)] if self.evaluation else [],
        )


class EpisodeDataset(Dataset):
    """Episode i, for any i >= 0, as an `Episode` of B = 1 read from disk and augmented.

    num_classes  C, the width of `Episode.present`
    values       256 uint8, label value -> class; None: values are classes
    ann_type     support annotation: "mask", or "bbox" = each component's bounding box filled
    The rest: see `EpisodeMaker`.
    """

    def __init__(
        self,
        episodes: EpisodeList,
        fold: Fold,
        data_root: str | Path,
        transform: Transform,
        *,
        num_classes: int,
        clip_size: ClipSize | None,
        patch: int,
        ann_type: AnnType = "mask",
        evaluation: bool,
        values: np.ndarray | None = None,
    ) -> None:
        if ann_type not in get_args(AnnType):
            raise UserError(f"Test_Finetune.ann_type: unknown annotation {ann_type!r}; choose mask or bbox")
        self.episodes, self.fold, self.root = episodes, fold, Path(data_root)
        self.num_classes, self.ann_type, self.values = num_classes, ann_type, values
        self.maker = EpisodeMaker(transform, fold, clip_size=clip_size, patch=patch, evaluation=evaluation)

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, i: int) -> Episode:
        return self.swapped(i, i)

    def swapped(self, i: int, donor: int) -> Episode:
        """Return episode i with the supports of episode `donor`, which show that episode's class."""
        spec, other = self.episodes.spec(i), self.episodes.spec(donor)
        record = self.episodes.index.records[spec.query]
        supports, to_mask = [self.episodes.index.records[s] for s in other.supports], mask_table(other.cls)
        shots = [self._shot(s, to_mask, generator(self.episodes.seed, donor, "shot", k)) for k, s in enumerate(supports)]
        image, label = read_pair(self.root / record.image, self.root / record.label, self.values)
        present = torch.zeros(self.num_classes, dtype=torch.bool)
        present[[c - 1 for c in record.annotated]] = True
        return self.maker.episode(
            image, label, shots, cls=spec.cls, base_rank=self.fold.base_rank(spec.cls), present=present, name=record.image,
            number=spec.number, rng=generator(self.episodes.seed, i, "query"),
        )  # fmt: skip

    def _shot(self, record: Record, to_mask: np.ndarray, rng: np.random.Generator) -> Shot:
        image, label = read_pair(self.root / record.image, self.root / record.label, self.values)
        mask = to_mask[label]
        if self.ann_type == "bbox":  # drawn on the file's mask, then augmented like any other
            mask = bbox_mask(mask)
        return self.maker.shot(image, mask, record.image, rng)
