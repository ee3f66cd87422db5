"""Which classes a fold trains on and which it tests, and what the classes are called.

Classes are the values of the label PNGs: 1..C, with 0 background and 255 ignore ("PI-CLIP Sec. 1, Folds").
"""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from util.errors import UserError

NUM_CLASSES = {"pascal": 20, "coco": 80, "demo": 20}
NUM_FOLDS = 4


@dataclass(frozen=True)
class Fold:
    """One of the four splits of a data set; class ids are 1-based and ascending."""

    data_set: str
    split: int
    novel: tuple[int, ...]
    base: tuple[int, ...]

    @property
    def num_classes(self) -> int:
        return len(self.novel) + len(self.base)

    def base_rank(self, cls: int) -> int:
        """0-based rank of a class among the base classes, -1 for a novel class."""
        return self.base.index(cls) if cls in self.base else -1


@dataclass(frozen=True)
class ClassNames:
    """Entry c-1 belongs to PNG value c: the name in the annotations, and what CLIP's text tower reads."""

    names: tuple[str, ...]
    texts: tuple[str, ...]


def fold(data_set: str, split: int, use_split_coco: bool = True) -> Fold:
    """The classes of fold `split` (0..3).

    PASCAL and the demo hold out contiguous fives. COCO holds out every fourth class (`use_split_coco`, what nearly all
    papers report) or a contiguous twenty (PANet); numbers of the two are not comparable.
    """
    if data_set not in NUM_CLASSES:
        close = get_close_matches(str(data_set).lower(), NUM_CLASSES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"Train.data_set: unknown data set {data_set!r}; {hint}choose one of {', '.join(NUM_CLASSES)}")
    if split not in range(NUM_FOLDS):
        raise UserError(f"Train.split: unknown fold {split!r}; choose 0, 1, 2 or 3")
    classes = range(1, NUM_CLASSES[data_set] + 1)
    if data_set == "coco" and use_split_coco:
        novel = tuple(classes[split::NUM_FOLDS])
    else:
        size = len(classes) // NUM_FOLDS
        novel = tuple(classes[split * size : (split + 1) * size])
    return Fold(data_set, split, novel, tuple(c for c in classes if c not in novel))


def read_class_names(path: str | Path) -> ClassNames:
    """Read one class a line, `NAME` or `NAME | text for CLIP`; line c is PNG value c. The text defaults to the name."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"Data.class_names: no such file: {path} (one class a line: NAME or NAME | text for CLIP)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"Data.class_names: {path} cannot be read as UTF-8 text ({error})") from error
    names, texts = [], []
    for number, line in enumerate(text.rstrip().splitlines(), start=1):
        name, bar, spoken = (part.strip() for part in line.partition("|"))
        if not name or "|" in spoken or (bar and not spoken):
            raise UserError(f"{path}:{number}: expected `NAME` or `NAME | text for CLIP`, got {line!r}")
        if name in names:
            raise UserError(f"{path}:{number}: class {name!r} is already on line {names.index(name) + 1}")
        names.append(name)
        texts.append(spoken or name)
    return ClassNames(tuple(names), tuple(texts))
