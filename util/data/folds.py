"""Classes: their names and texts, and which of them a fold trains on (base) and tests (novel).

Classes are the values of the label PNGs: 1..C, with 0 background and 255 ignore ("PI-CLIP Sec. 1, Folds"). The folds of the
published data sets follow from rules; your own are in a file (docs/custom-data.md).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util.config import Config
from util.errors import UserError, nearest
from util.yaml_text import parse_yaml

NUM_CLASSES = {"pascal": 20, "coco": 80}  # data sets whose folds follow from a rule
NUM_FOLDS = 4


@dataclass(frozen=True)
class Fold:
    """The base and novel classes of one split; class ids are 1-based and ascending."""

    data_set: str
    split: int
    novel: tuple[int, ...]
    base: tuple[int, ...]

    @property
    def num_classes(self) -> int:
        return len(self.novel) + len(self.base)

    def base_rank(self, cls: int) -> int:
        """Return the 0-based rank of a class among the base classes, -1 for a novel class."""
        return self.base.index(cls) if cls in self.base else -1


@dataclass(frozen=True)
class ClassNames:
    """Entry c-1 belongs to PNG value c: its name in the annotations, and the text for CLIP."""

    names: tuple[str, ...]
    texts: tuple[str, ...]


def shown(classes: Iterable[int], names: Sequence[str] = ()) -> str:
    """Return classes for a message: "3 (bird), 4 (boat)"; without names the numbers."""
    return ", ".join(f"{c} ({names[c - 1]})" if c <= len(names) else str(c) for c in classes)


def has_folds(config: Config) -> bool:
    """Return whether the classes of a config are divided into folds. Weakly supervised and open-vocabulary systems need none."""
    data = config.Data
    return config.Train.data_set in NUM_CLASSES or bool(
        data.folds or (data.class_names and Path(data.class_names).with_name("folds.yaml").is_file()))


def fold_of(config: Config) -> Fold:
    """Return the fold of a config: by the rule of its data set, or from Data.folds, else from folds.yaml beside the class names.

    In a split without novel classes all classes are base (seen) classes: full supervision. In a file with the one word `all` all
    classes are novel in every split: a data set that is only tested on.
    """
    train, data = config.Train, config.Data
    if data.folds and train.data_set in NUM_CLASSES:
        raise UserError(f"Data.folds = {data.folds}: {train.data_set} has its own folds; give yours another Train.data_set")
    file = Path(data.folds or Path(data.class_names).with_name("folds.yaml"))
    if train.data_set in NUM_CLASSES or not (data.class_names and (data.folds or file.is_file())):
        try:
            return fold(train.data_set, train.split, train.use_split_coco)
        except UserError as error:
            beside = f" Data.class_names = {data.class_names} has no folds.yaml beside it." if data.class_names else ""
            raise UserError(f"{error}.{beside}") from None
    names = read_class_names(data.class_names)
    if _is_test_set(file):
        return Fold(train.data_set, train.split, tuple(range(1, len(names.names) + 1)), ())
    folds = read_folds(file, names)
    if train.split not in range(len(folds)):
        raise UserError(f"Train.split: unknown fold {train.split!r}; {file} has split0 to split{len(folds) - 1}")
    novel = folds[train.split]
    base = tuple(c for c in range(1, len(names.names) + 1) if c not in novel)
    return Fold(train.data_set, train.split, novel, base)


def check_disjoint(home: Fold, home_names: ClassNames, tested: Fold, names: ClassNames) -> None:
    """Raise UserError where weights learnt a class that they are tested on, under the same name or a known other one."""
    learnt = {_plain(home_names.names[c - 1]): home_names.names[c - 1] for c in home.base}
    shared = [names.names[c - 1] for c in tested.novel if _plain(names.names[c - 1]) in learnt]
    if shared:
        raise UserError(f"the weights of {home.data_set} split{home.split} learnt {len(shared)} of the {len(tested.novel)} "
                        f"classes they would be tested on: {', '.join(shared)}. Test classes that they never saw (COCO to "
                        "PASCAL: the data set coco2pascal, the same split), or name others in Data.folds")


SAME = {"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa", "tv": "tvmonitor"}  # COCO's names -> PASCAL's


def _plain(name: str) -> str:
    letters = "".join(character for character in name.lower() if character.isalnum())
    return SAME.get(letters, letters)


def _is_test_set(file: Path) -> bool:
    try:
        return parse_yaml(file.read_text(encoding="utf-8-sig"), f"Data.folds: {file}") == "all"
    except (OSError, ValueError):  # `read_folds` says what is wrong
        return False


def fold(data_set: str, split: int, use_split_coco: bool = True) -> Fold:
    """Return fold `split` (0..3) of a published data set.

    PASCAL holds out contiguous fives. COCO holds out every fourth class (`use_split_coco`, what nearly all
    papers report) or a contiguous twenty (PANet); numbers of the two are not comparable.
    """
    if data_set not in NUM_CLASSES:
        near = nearest(data_set, NUM_CLASSES)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(f"Train.data_set: unknown data set {data_set!r}; {hint}choose one of {', '.join(NUM_CLASSES)}, "
                        "or name a file of folds in Data.folds (docs/custom-data.md)")
    if split not in range(NUM_FOLDS):
        raise UserError(f"Train.split: unknown fold {split!r}; choose 0, 1, 2 or 3")
    classes = range(1, NUM_CLASSES[data_set] + 1)
    if data_set == "coco" and use_split_coco:
        novel = tuple(classes[split::NUM_FOLDS])
    else:
        size = len(classes) // NUM_FOLDS
        novel = tuple(classes[split * size : (split + 1) * size])
    return Fold(data_set, split, novel, tuple(c for c in classes if c not in novel))


def read_folds(path: str | Path, names: ClassNames) -> list[tuple[int, ...]]:
    """Read the novel classes of each fold, ascending, from YAML: `split0: [name, name]`, `split1: ...`.

    A class in no fold is a base class of all; a fold without names has only base classes. Raises UserError, naming the fold,
    where a name does not exist or is in two folds, or a fold leaves no base class.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"Data.folds: {path} cannot be read ({error})") from error
    content = parse_yaml(text, f"Data.folds: {path}")
    if not isinstance(content, dict) or not content or [*content] != [f"split{i}" for i in range(len(content))]:
        raise UserError(f"{path}: expected the lines `split0: [class, class]`, `split1: ...`, numbered from 0, each once")
    folds: list[tuple[int, ...]] = []
    place: dict[str, str] = {}
    for split, members in content.items():
        if not isinstance(members, list) or not all(isinstance(name, str) for name in members):
            raise UserError(f"{path}: {split} must be a list of class names, [bird, boat]; put no, on, 7 and the like in quotes")
        for name in members:
            if name not in names.names:
                near = nearest(name, names.names)
                hint = f"did you mean {near!r}?" if near else f"there are {', '.join(names.names)}"
                raise UserError(f"{path}: {split} names {name!r}, which is no class; {hint}")
            if name in place:
                raise UserError(f"{path}: {name!r} is in {place[name]} and in {split}; a class is novel in one fold only")
            place[name] = split
        if len(members) == len(names.names):
            raise UserError(f"{path}: {split} has all classes; a fold needs base classes to train on")
        folds.append(tuple(sorted(names.names.index(name) + 1 for name in members)))
    return folds


def read_class_names(path: str | Path, key: str = "Data.class_names") -> ClassNames:
    """Read one class a line, `NAME` or `NAME | text for CLIP`; line c is PNG value c. The text defaults to the name.

    key: the config key that names the file, for messages.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{key}: no such file: {path} (one class a line: NAME or NAME | text for CLIP)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be read as UTF-8 text ({error})") from error
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


def clean_name(where: str, name: object) -> str:
    """Return a class name on one line: line breaks and runs of blanks become one blank, those at the ends are removed.

    Raises UserError, beginning with `where`: no text, an empty one, or one with '|', which separates name and text for CLIP.
    """
    clean = " ".join(name.replace("\ufeff", "").split()) if isinstance(name, str) else ""
    if not clean or "|" in clean or clean.encode(errors="replace").decode() != clean:
        raise UserError(f"{where}: {name!r} is no name of a class: needed is a text of one line, without '|'")
    return clean


def read_label_table(path: str | Path, classes: int) -> np.ndarray:
    """256 uint8, label value -> class 1..C, 0 background or 255 ignore, from YAML `VALUE: CLASS` (255 needs no line).

    Values without a line become what is no class (their own number, or 254 where that is one): reading such a label is an error.

    Raises:
        UserError: no such file, or something else than whole numbers in these ranges.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"Data.label_table: {path} cannot be read ({error})") from error
    content = parse_yaml(text, f"Data.label_table: {path}")
    table = np.array([value if value > classes else 254 for value in range(256)], np.uint8)
    for value, cls in content.items() if isinstance(content, dict) else [(None, None)]:
        if type(value) is not int or type(cls) is not int or not 0 <= value <= 255 or not (0 <= cls <= classes or cls == 255):
            raise UserError(f"{path}: expected lines `VALUE: CLASS`, values 0..255, classes 0..{classes} or 255; got {value!r}: "
                            f"{cls!r}")
        table[value] = cls
    return table
